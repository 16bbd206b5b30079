"""Checks of files that the config or an earlier run names, before any job starts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mixflow.config.resolved import Config
from mixflow.runtime.errors import UserError
from mixflow.runtime.weights_header import options_from_shapes, safetensors_shapes, saved_model_options


def check_weights_file(config: Config, name: str) -> str:
    """Return the path of an own weights file, after a check that it exists and fits the entry's model.

    Of a .safetensors file the header alone is read; other formats are checked when imported. Raises `UserError`.
    """
    weights = config.get("checkpoints", name).weights
    assert weights is not None, f"{name} is trained here"
    assert weights.file is not None, f"{name} is downloaded"
    where = f"checkpoints.{name}.weights"
    path = Path(weights.file)
    if not path.is_file():
        raise UserError(f"{where}.file: '{path}' does not exist: put the weights there, or correct the path")
    if path.suffix == ".safetensors":
        _compare_header(path, where, config.network_options(name))
    return weights.file


def check_image(image: str) -> None:
    """Check that an image is a file (or a folder) that exists, or an address with a digest.

    Raises `UserError`: an address without one is pulled once and never again, whatever it comes to stand for.
    """
    if "://" not in image:
        if not Path(image).exists():
            raise UserError(f"image: '{image}' does not exist: convert one (docs/container.md), or correct the path")
    elif not re.search(r"@sha256:[0-9a-f]{64}$", image):
        raise UserError(
            f"image: '{image}' has no digest: take a file that was converted from it, --config image=FILE "
            "(docs/container.md), or the address with @sha256:DIGEST"
        )


def _compare_header(path: Path, where: str, wanted: dict[str, Any]) -> None:
    found = options_from_shapes(
        wanted["family"],
        safetensors_shapes(path),
        source=f"{where}.file '{path}'",
        null_row=wanted["label_dropout"] > 0,
    )
    found |= saved_model_options(path)
    if found.get("z_dims") == []:  # without projectors, which is enough for sampling
        found = {key: value for key, value in found.items() if key not in ("z_dims", "projector_dim")}
    differing = [key for key in wanted if key in found and found[key] != wanted[key]]
    if differing:
        held = ", ".join(f"{key} {found[key]}" for key in differing)
        asked = ", ".join(f"{key} {wanted[key]}" for key in differing)
        raise UserError(
            f"{where}.file: '{path}' holds a network with {held}, the entry says {asked}: correct one of them"
        )


def check_latents(index_path: str | os.PathLike[str]) -> None:
    """Check, where a latent cache was made already, that its shards have the sizes in the index. Raises `UserError`."""
    index_path = Path(index_path)
    if not index_path.exists():
        return
    fix = f"delete '{index_path.parent}' and run the same command again"
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        shards = [shard for split in index["splits"].values() for shard in split["shards"]]
        sizes = [(index_path.parent / shard["file"], int(shard["bytes"])) for shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"'{index_path}' is not the index of a latent cache: {fix}") from None
    for path, wanted in sizes:
        if not path.is_file():
            raise UserError(f"latent shard '{path}' is missing: {fix}")
        if (size := path.stat().st_size) != wanted:
            raise UserError(f"latent shard '{path}' has {size:,} bytes where the index says {wanted:,}: {fix}")
