"""What a safetensors file holds, read from its header alone: no torch, no tensor data, microseconds for any size."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mixflow.runtime.errors import UserError

METADATA_KEY = "mixflow"

# A fragment of a key name that only this architecture has, and what to call it; the first match counts.
_ARCHITECTURES = (
    ("component_labels", "the exact field of a mixture"),
    ("variances", "the exact field of a Gaussian"),
    ("decoder_blocks.", "a REPA network under its legacy key names"),
    ("projectors.", "a REPA network"),
    ("r_embedder.", "a MeanFlow network of two times, as mf-rae's"),
    ("s_embedder.", "an RAE network (DiT with a wide head)"),
    ("transformer_blocks.", "a diffusers transformer such as SD3"),
    ("encoder.down_blocks.", "a diffusers autoencoder"),
    ("decoder.up_blocks.", "a diffusers autoencoder"),
    ("down_blocks.", "a diffusers U-Net"),
    ("cls_token", "a vision transformer"),
    ("mlp.w12.", "a DiT with SwiGLU, as LightningDiT's"),
    ("attn.q_norm.", "a SiT with qk-norm"),
    ("adaLN_modulation.", "a SiT network"),
)
_FAMILIES = {
    "a SiT network": "sit",
    "a SiT with qk-norm": "repa",
    "a REPA network": "repa",
    "a REPA network under its legacy key names": "repa",
    "an RAE network (DiT with a wide head)": "rae",
    "the exact field of a Gaussian": "gaussian",
    "the exact field of a mixture": "mixture",
}
_BACKBONE_KEYS = (
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "blocks.0.attn.qkv.weight",
)
_DIT_DH_KEYS = (
    "s_embedder.proj.weight",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "enc_feat_rope.freqs_cos",
    "dec_feat_rope.freqs_cos",
    "blocks.0.attn.proj.bias",
)
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_BLOCK_WIDTH = re.compile(r"blocks\.\d+\.attn\.proj\.bias")
_LEGACY_BLOCK = re.compile(r"decoder_blocks\.(\d+)\.")
_PROJECTOR_OUTPUT = re.compile(r"projectors\.(\d+)\.4\.weight")


def safetensors_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the header of a safetensors file, name -> {dtype, shape, data_offsets}, plus `__metadata__` if there.

    Raises `UserError` for a missing, truncated or garbled file (the length is checked, the data are not read).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file '{path}' does not exist: make or download it first, or correct the path")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # A garbled length would otherwise ask for petabytes.
        text = file.read(length) if length <= size - 8 else b""
    try:
        header = json.loads(text.decode("utf-8"))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        data_end = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
        garbled = not all(isinstance(side, int) for entry in tensors for side in entry["shape"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        garbled = True
    if garbled:
        raise UserError(f"weights file '{path}' is truncated or is not a safetensors file: download or make it again")
    if size != 8 + length + data_end:
        raise UserError(
            f"weights file '{path}' has {size} bytes where its header asks for {8 + length + data_end}: "
            "download or make it again"
        )
    return header


def safetensors_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor in a safetensors file; raises `UserError` as `safetensors_header` does."""
    header = safetensors_header(path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def saved_model_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the model options that mixflow wrote beside the tensors of a safetensors file, {} for a foreign file."""
    text = safetensors_header(path).get("__metadata__", {}).get(METADATA_KEY)
    return json.loads(text)["model"] if text else {}


def guess_architecture(keys: Iterable[str]) -> str:
    """Name what a set of weight names seems to belong to, for messages."""
    names = list(keys)
    for fragment, architecture in _ARCHITECTURES:
        if any(fragment in name for name in names):
            return architecture
    return "no network that mixflow knows"


def guess_family(keys: Iterable[str]) -> str | None:
    """Return the family that can load weights of these names, None if none can.

    A REPA network without projectors has the names of a SiT and is taken for one, though its time runs the other way.
    """
    return _FAMILIES.get(guess_architecture(keys))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return stored weight name -> the peer's name of today.

    Drops the prefixes of torch.compile (of the network or of a block) and of DistributedDataParallel. REPA's legacy
    files count the blocks behind the aligned one from 0 again: `decoder_blocks.i` is `blocks.(i + encoder_depth)`.
    """
    plain = {name: _without_prefixes(name) for name in names}
    encoder_depth = legacy_encoder_depth(plain.values())
    if encoder_depth is not None:
        plain = {
            name: _LEGACY_BLOCK.sub(lambda m: f"blocks.{int(m[1]) + encoder_depth}.", plain[name]) for name in plain
        }
    return plain


def legacy_encoder_depth(names: Iterable[str]) -> int | None:
    """Return the encoder_depth that REPA's legacy key names tell, None for names of today."""
    names = [_without_prefixes(name) for name in names]
    return _num_blocks(names) if any(_LEGACY_BLOCK.match(name) for name in names) else None


def options_from_shapes(
    family: str,  # "sit" | "repa" | "rae" | "gaussian" | "mixture"
    shapes: Mapping[str, tuple[int, ...]],  # weight name, as stored or plain -> shape
    *,
    source: str = "the weights",  # what to call them in messages
    null_row: bool = True,  # whether the label table ends with a null class; shapes cannot tell
) -> dict[str, Any]:
    """Return the options of a family's network that shapes tell. Raises `UserError` for another family's weights.

    Never label_dropout; num_heads only for rae, from its rotary tables; for repa, encoder_depth only from legacy names,
    and z_dims and projector_dim only where the file has projectors; for rae, depth only where trunk and head differ in
    width.
    """
    found = guess_family(shapes)
    if found not in (None, "sit") and found != family:  # a SiT may be a REPA network without projectors
        raise UserError(f"{source} seems to hold {guess_architecture(shapes)}: use the family '{found}'")
    told = {} if (depth := legacy_encoder_depth(shapes)) is None else {"encoder_depth": depth}
    names = plain_names(shapes)
    return _READERS[family]({names[name]: shape for name, shape in shapes.items()}, source, null_row) | told


def _sit_options(shapes: Mapping[str, tuple[int, ...]], source: str, null_row: bool) -> dict[str, Any]:
    return _backbone_options("SiT", shapes, source, null_row)


def _repa_options(shapes: Mapping[str, tuple[int, ...]], source: str, null_row: bool) -> dict[str, Any]:
    sizes = _backbone_options("REPA", shapes, source, null_row)
    if sizes.pop("learn_sigma"):
        raise UserError(
            f"{source} cannot be loaded as REPA, for its head has {2 * sizes['in_channels']} channels, as SiT's: "
            "use the family 'sit'"
        )
    sizes["qk_norm"] = "blocks.0.attn.q_norm.weight" in shapes
    outputs = {
        int(match[1]): shape
        for name, shape in shapes.items()
        if (match := _PROJECTOR_OUTPUT.fullmatch(name)) and len(shape) == 2
    }
    if outputs:
        sizes["z_dims"] = [outputs[number][0] for number in sorted(outputs)]
        sizes["projector_dim"] = outputs[min(outputs)][1]
    return sizes


def _rae_options(shapes: Mapping[str, tuple[int, ...]], source: str, null_row: bool) -> dict[str, Any]:
    missing = [name for name in _DIT_DH_KEYS if name not in shapes]
    if missing:
        raise UserError(
            f"{source} cannot be loaded as DiT-DH, for '{missing[0]}' is missing and it seems to hold "
            f"{guess_architecture(shapes)}: correct the path or the family"
        )
    widths = [shape[0] for name, shape in shapes.items() if _BLOCK_WIDTH.fullmatch(name) and shape]
    try:
        trunk, in_channels, *patch = shapes["s_embedder.proj.weight"]
        head, *channels_and_patch = shapes["x_embedder.proj.weight"]
        label_rows, _ = shapes["y_embedder.embedding_table.weight"]
        tokens, trunk_channels = shapes["enc_feat_rope.freqs_cos"]
        _, head_channels = shapes["dec_feat_rope.freqs_cos"]
        grid = math.isqrt(tokens)
        fits = grid**2 == tokens and patch == [1, 1] and channels_and_patch == [in_channels, 1, 1]
        fits = fits and {trunk, head} == set(widths) and not trunk % trunk_channels and not head % head_channels
    except (ValueError, ZeroDivisionError):  # another number of dimensions, an empty one
        fits = False
    if not fits:
        sizes = ", ".join(f"'{name}' {list(shapes[name])}" for name in _DIT_DH_KEYS)
        raise UserError(
            f"{source} cannot be loaded as DiT-DH, for its shapes ({sizes}) belong to no DiT-DH on square latents with "
            "one token per pixel: correct the path or the family"
        )
    told = {} if trunk == head else {"depth": [widths.count(trunk), widths.count(head)]}
    return told | dict(
        input_size=grid,
        in_channels=in_channels,
        hidden_size=[trunk, head],
        num_heads=[trunk // trunk_channels, head // head_channels],
        num_classes=label_rows - null_row,
        swiglu="blocks.0.mlp.w12.weight" in shapes,
        rms_norm="blocks.0.norm1.weight" in shapes,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        pos_embed="pos_embed" in shapes,
    )


def _gaussian_options(shapes: Mapping[str, tuple[int, ...]], source: str, null_row: bool) -> dict[str, Any]:
    return _exact_options("mean", shapes, source) | {"axes": "basis" not in shapes}


def _mixture_options(shapes: Mapping[str, tuple[int, ...]], source: str, null_row: bool) -> dict[str, Any]:
    options = _exact_options("components", shapes, source)
    return options | {"num_components": shapes["components"][0]}


def _exact_options(name: str, shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, Any]:
    *_, channels, height, width = shapes.get(name, (0, 0, -1))
    if height != width:
        raise UserError(
            f"{source} cannot be loaded as an exact field, for it has no square '{name}' and seems to hold "
            f"{guess_architecture(shapes)}: correct the path or the family"
        )
    return {"input_size": height, "in_channels": channels}


_READERS: dict[str, Callable[[Mapping[str, tuple[int, ...]], str, bool], dict[str, Any]]] = {
    "sit": _sit_options,
    "repa": _repa_options,
    "rae": _rae_options,
    "gaussian": _gaussian_options,
    "mixture": _mixture_options,
}


def _backbone_options(
    network: str, shapes: Mapping[str, tuple[int, ...]], source: str, null_row: bool
) -> dict[str, Any]:
    missing = [name for name in _BACKBONE_KEYS if name not in shapes]
    if missing:
        raise UserError(
            f"{source} cannot be loaded as {network}, for '{missing[0]}' is missing and it seems to hold "
            f"{guess_architecture(shapes)}: correct the path or the family"
        )
    try:
        _, tokens, hidden_size = shapes["pos_embed"]
        _, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        label_rows, _ = shapes["y_embedder.embedding_table.weight"]
        head_rows, _ = shapes["final_layer.linear.weight"]
        grid = math.isqrt(tokens)
        rows_per_channel = in_channels * patch_size**2
        fits = grid**2 == tokens and head_rows in (rows_per_channel, 2 * rows_per_channel)
    except ValueError:  # another number of dimensions
        fits = False
    if not fits:
        sizes = ", ".join(f"'{name}' {list(shapes[name])}" for name in _BACKBONE_KEYS[:4])
        raise UserError(
            f"{source} cannot be loaded as {network}, for its shapes ({sizes}) belong to no {network} on square "
            "latents: correct the path or the family"
        )
    return dict(
        input_size=grid * patch_size,
        in_channels=in_channels,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=_num_blocks(shapes),
        num_classes=label_rows - null_row,
        learn_sigma=head_rows != rows_per_channel,
    )


def _without_prefixes(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _num_blocks(names: Iterable[str]) -> int:
    return 1 + max((int(match[1]) for name in names if (match := _BLOCK.match(name))), default=-1)
