"""Networks as the entries of the config describe them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixflow.models import SiT, load_model
from mixflow.models.load import FAMILIES

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
