"""Networks and autoencoders as the entries of the config describe them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixflow.models import VelocityNetwork, load_model
from mixflow.models.load import FAMILIES
from mixflow.runtime.downloads import downloaded, downloaded_file
from mixflow.runtime.errors import UserError, did_you_mean

# What the records of an autoencoder's downloads are for: an sd_vae is one network, a rae has the other three.
AUTOENCODER_ROLES = ("network", "encoder", "decoder", "statistics")

# What the shapes of the weights tell; the file is believed.
_SIZES = {
    "input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_classes", "learn_sigma", "z_dims",
    "projector_dim",
}  # fmt: skip


def network_from_file(model: Mapping[str, Any], weights: Path) -> VelocityNetwork:
    """Return the network in `weights`, float32 on the CPU in eval mode, for a resolved entry {family: ..., ...}.

    Of the entry only what shapes cannot tell counts. Raises `UserError` as `load_model` does.
    """
    family = model["family"]
    accepted = inspect.signature(FAMILIES[family]).parameters.keys() - _SIZES if family in FAMILIES else set()
    if family == "rae" and len(set(model["hidden_size"])) == 1:
        accepted = accepted | {"depth"}  # equally wide, so that nothing tells where the trunk ends and the head begins
    return load_model(family, weights, **{name: value for name, value in model.items() if name in accepted})


def autoencoder_files(records: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files of an autoencoder by name, from the records of their downloads by role; {} for a kind of none.

    The names are what `load_autoencoder` takes, and part of every result's provenance. Raises `UserError` for a role
    that no autoencoder has, and as `downloaded` and `downloaded_file` do.
    """
    files: dict[str, Path] = {}
    for role, record in records.items():
        if role not in AUTOENCODER_ROLES:
            hint = did_you_mean(role, AUTOENCODER_ROLES)
            raise UserError(f"'{role}' is no part of an autoencoder{hint}")
        if role == "network":
            files |= {path.name: path for path in downloaded(record).values()}
        elif role == "encoder":
            files |= {f"encoder/{path.name}": path for path in downloaded(record).values()}
        else:
            files[role] = downloaded_file(record)
    return files
