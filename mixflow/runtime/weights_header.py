"""What a safetensors file holds, read from its header alone: no torch, no tensor data, microseconds for any size."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixflow.runtime.errors import UserError

METADATA_KEY = "mixflow"

# A fragment of a key name that only this architecture has, and what to call it; the first match counts.
_ARCHITECTURES = (
    ("decoder_blocks.", "a REPA network under its legacy key names"),
    ("projectors.", "a SiT with REPA projectors"),
    ("s_embedder.", "an RAE network (DiT with a wide head)"),
    ("transformer_blocks.", "a diffusers transformer such as SD3"),
    ("encoder.down_blocks.", "a diffusers autoencoder"),
    ("decoder.up_blocks.", "a diffusers autoencoder"),
    ("down_blocks.", "a diffusers U-Net"),
    ("mlp.w12.", "a DiT with SwiGLU, as LightningDiT's"),
    ("attn.q_norm.", "a SiT with qk-norm"),
    ("cls_token", "a vision transformer"),
    ("adaLN_modulation.", "a SiT network"),
)
_SIT_KEYS = (
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "blocks.0.attn.qkv.weight",
)


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


def sit_options_from_shapes(
    shapes: Mapping[str, tuple[int, ...]],  # weight name -> shape
    *,
    source: str = "the weights",  # what to call them in messages
    null_row: bool = True,  # whether the label table ends with a null class; shapes cannot tell
) -> dict[str, Any]:
    """Return the SiT options that shapes tell: all but num_heads and label_dropout. Raises `UserError`."""
    missing = [name for name in _SIT_KEYS if name not in shapes]
    if missing:
        raise UserError(
            f"{source} cannot be loaded as SiT, for '{missing[0]}' is missing and it seems to hold "
            f"{guess_architecture(shapes)}: correct the path or the family"
        )
    blocks = [
        int(name.split(".")[1]) for name in shapes if name.startswith("blocks.") and name.split(".")[1].isdecimal()
    ]
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
        sizes = ", ".join(f"'{name}' {list(shapes[name])}" for name in _SIT_KEYS[:4])
        raise UserError(
            f"{source} cannot be loaded as SiT, for its shapes ({sizes}) belong to no SiT on square latents: "
            "correct the path or the family"
        )
    return dict(
        input_size=grid * patch_size,
        in_channels=in_channels,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=1 + max(blocks, default=-1),
        num_classes=label_rows - null_row,
        learn_sigma=head_rows != rows_per_channel,
    )
