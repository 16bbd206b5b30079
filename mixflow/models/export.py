"""Our weights as files that the peers' own scripts load."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mixflow.models.load import describe_weights, load_model
from mixflow.models.sit import SiT
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path
from mixflow.runtime.progress import log


def export_weights(
    weights: str | os.PathLike[str],  # our model.safetensors, or any file that load_model reads
    out: str | os.PathLike[str],  # .pt
    *,
    velocity_head: bool = False,  # leave out the half of SiT's 8-channel head that is never used
) -> None:
    """Write float32 weights as the peer's scripts load them, a torch file that holds nothing but tensors.

    SiT: a flat state dict, as its released files. Its train.py and its automatic download want the 8-channel head of
    those, its sample.py and sample_ddp.py with --ckpt the 4-channel one that `velocity_head` makes; the velocities are
    the same. REPA: {"ema": state dict}, where its generate.py looks; without projectors, which it wants, a warning.
    RAE: a flat state dict, for `ckpt` of stage_2 in its YAML. Raises `UserError` for weights of no family here.
    """
    if Path(out).suffix != ".pt":
        raise UserError(f"'{out}' does not end in .pt, the peers' ending: rename it")
    found = describe_weights(weights)
    if found["family"] is None:
        raise UserError(f"'{weights}' holds {found['architecture']}, which no peer here loads: name other weights")
    if found["family"] in ("gaussian", "mixture"):
        raise UserError(f"'{weights}' holds {found['architecture']}, which no peer has: name weights of a network")
    net = load_model(found["family"], weights)
    state = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    if velocity_head and isinstance(net, SiT) and net.options.get("learn_sigma"):
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            state[name] = net.final_layer.velocity_rows(state[name]).clone()  # a view would drag the whole head along
    if net.options.get("z_dims") == []:
        log.warning("'%s' has no projectors: REPA's generate.py will miss the keys 'projectors.*'", weights)
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        torch.save({"ema": state} if found["family"] == "repa" else state, file)
    log.info("%s weights of '%s' are in '%s'", type(net).__name__, weights, out)
