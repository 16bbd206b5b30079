"""Weights files: reading the peers' formats and ours, writing ours."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor, nn

from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path
from mixflow.runtime.progress import log
from mixflow.runtime.torch_file import read_torch_file
from mixflow.runtime.weights_header import (
    METADATA_KEY,
    guess_architecture,
    legacy_encoder_depth,
    plain_names,
    saved_model_options,
)

WRAPPERS = ("ema", "model", "state_dict")  # in the order of preference: the published numbers are those of the EMA
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")


class Weights(NamedTuple):
    source: str  # what to call them in messages
    wrapper: str | None  # the entry of the file that held them
    tensors: dict[str, Tensor]  # under the peer's key names of today
    told: dict[str, Any]  # model options that the file says in words: our metadata, or the peer's command line
    legacy: bool  # whether REPA's former key names were translated
    beside: dict[str, Any]  # the file's other entries, described


def read_weights(weights: str | os.PathLike[str] | Mapping[str, Any], *, trust: bool = False) -> Weights:
    """Return what a weights file or a state dict (wrapped or flat) holds, memory-mapped on the CPU where possible.

    No code from a file is ever run unless `trust`. Raises `UserError`.
    """
    if isinstance(weights, Mapping):
        return _unwrap(weights, "the given state dict", {})
    path = Path(weights)
    source = f"weights file '{path}'"
    if path.suffix == ".safetensors":
        told = saved_model_options(path)  # also finds a damaged file
        try:
            return _unwrap(safetensors.torch.load_file(path), source, told)
        except safetensors.SafetensorError as error:
            raise UserError(f"{source} is garbled ({error}): download or make it again") from error
    if path.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{source} has none of the endings .safetensors, {', '.join(TORCH_SUFFIXES)}: rename it")
    return _unwrap(read_torch_file(path, source, trust=trust), source, {})


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the weights in a file, unwrapped and under the peer's key names, on the CPU. Raises `UserError`."""
    return read_weights(path).tensors


def save_model(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    model_options: Mapping[str, Any],  # such as `net.options`, perhaps with "family"; read back by load_model
) -> None:
    """Write weights as safetensors, atomically; equal weights and options give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    # One metadata entry only: safetensors writes several in random order.
    metadata = {METADATA_KEY: json.dumps({"model": dict(model_options)}, sort_keys=True)}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(tensors, temporary, metadata)
        temporary.chmod(mode)  # safetensors leaves files that only their owner can read, whatever the umask


def convert_weights(file: str | os.PathLike[str], out: str | os.PathLike[str], *, trust: bool = False) -> None:
    """Write the weights in `file` to `out` as safetensors, under the peer's key names and in their own precision.

    For files that cannot be loaded safely, which takes `trust`: reading them may run any code that is in them.
    Raises `UserError`, also for a file that is refused without `trust`.
    """
    if Path(out).suffix != ".safetensors":
        raise UserError(f"'{out}' does not end in .safetensors, which is what is written: rename it")
    try:
        read = read_weights(file)
    except UserError:
        if not trust or not Path(file).is_file():
            raise
        log.warning("'%s' cannot be loaded safely and is read all the same: any code in it runs now", file)
        read = read_weights(file, trust=True)
    # Copies, for safetensors refuses tensors that share memory.
    save_model(out, {name: tensor.clone() for name, tensor in read.tensors.items()}, read.told)
    log.info("%d tensors of '%s' are in '%s'", len(read.tensors), file, out)


def check_fit(read: Weights, network: nn.Module, described: str) -> None:
    """Check that the weights are those of `network`, name by name and shape by shape. Raises `UserError`."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in read.tensors.items()}
    misfits = [
        ("missing", [f"'{name}'" for name in wanted if name not in found]),
        ("unexpected", [f"'{name}'" for name in found if name not in wanted]),
        ("misshapen", [f"'{n}' {list(found[n])}" for n in wanted if n in found and found[n] != wanted[n]]),
    ]
    complaints = [f"{kind} {_some(names)}" for kind, names in misfits if names]
    if complaints:
        raise UserError(
            f"{read.source} does not fit {described} ({'; '.join(complaints)}) and seems to hold "
            f"{guess_architecture(found)}: correct the path or the family"
        )


def _unwrap(payload: Any, source: str, told: dict[str, Any]) -> Weights:
    if not isinstance(payload, Mapping):
        raise UserError(f"{source} holds a {type(payload).__name__}, not a state dict: save the network's state_dict()")
    wrapper = next((name for name in WRAPPERS if isinstance(payload.get(name), Mapping)), None)
    entries = payload if wrapper is None else payload[wrapper]
    strangers = [
        repr(name) for name, value in entries.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if strangers or not entries:
        raise UserError(
            f"{source} holds no flat state dict ({_some(strangers) or 'it is empty'}): give one, or wrap it under "
            f"{', '.join(repr(name) for name in WRAPPERS)}"
        )
    others = {} if wrapper is None else {str(name): value for name, value in payload.items() if name != wrapper}
    legacy_depth = legacy_encoder_depth(entries)
    depth = legacy_depth if legacy_depth is not None else _encoder_depth_of_arguments(others.get("args"))
    names = plain_names(entries)
    return Weights(
        source,
        wrapper,
        {names[name]: value for name, value in entries.items()},
        told if depth is None else told | {"encoder_depth": depth},
        legacy_depth is not None,
        {name: _describe(value) for name, value in others.items()},
    )


def _encoder_depth_of_arguments(arguments: Any) -> int | None:
    """Return the one fact of REPA's command line, as its training checkpoints keep it, that shapes do not tell."""
    depth = vars(arguments).get("encoder_depth") if isinstance(arguments, argparse.Namespace) else None
    return depth if isinstance(depth, int) else None


def _describe(value: Any) -> Any:
    if isinstance(value, int | float | str) or value is None:
        return value
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, Mapping | list) else type(value).__name__


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
