"""Networks and autoencoders as the entries of the config describe them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixflow.models import SiT, load_model
from mixflow.models.load import FAMILIES
from mixflow.runtime.downloads import downloaded
from mixflow.runtime.errors import UserError

# What the shapes of the weights tell; the file is believed.
_SIZES = {
    "input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_classes", "learn_sigma", "z_dims",
    "projector_dim",
}  # fmt: skip


def network_from_file(model: Mapping[str, Any], weights: Path) -> SiT:
    """Return the network in `weights`, float32 on the CPU in eval mode, for a resolved entry {family: ..., ...}.

    Of the entry only what shapes cannot tell counts. Raises `UserError` as `load_model` does.
    """
    family = model["family"]
    accepted = inspect.signature(FAMILIES[family]).parameters.keys() - _SIZES if family in FAMILIES else set()
    return load_model(family, weights, **{name: value for name, value in model.items() if name in accepted})


def autoencoder_files(record: Path | None) -> dict[str, Path]:
    """Return the files of an autoencoder by name, from the record of their download; {} without one."""
    return {} if record is None else {path.name: path for path in downloaded(record).values()}


def autoencoder_folder(files: Mapping[str, Path]) -> Path | None:
    """Return where an autoencoder's files lie, None for a kind that has none. `UserError` without a config.json."""
    if not files:
        return None
    if "config.json" not in files:
        raise UserError(f"the autoencoder's download has no config.json among {', '.join(files)}: add it to its files")
    return files["config.json"].parent
