"""Write a velocity field that is known exactly as a weights file, like any network's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixflow.autoencoders import load_autoencoder
from mixflow.config import spectrum_variances
from mixflow.data.latents import LatentCache
from mixflow.models import GaussianField, MixtureField, save_model
from mixflow.runtime.errors import UserError
from mixflow.runtime.progress import log
from mixflow.runtime.provenance import RunRecord


def make_exact(
    settings: dict[str, Any],
    *,
    latents: Path | None,  # index.json of the cache; None where the dataset's own spectrum says all
    out: Path,  # model.safetensors; run.json is written beside it
) -> None:
    """Make the field of the slice `make_exact` of the config. Raises `UserError` for latents of another shape."""
    name, exact, model = settings["checkpoint"], settings["exact"], settings["model"]
    record = RunRecord("make-exact", settings, {} if latents is None else {"latents": latents})
    options = {"num_classes": model["num_classes"], "law": exact["law"], "gamma": exact["gamma"]}
    shape = (model["in_channels"], model["input_size"], model["input_size"])
    network: GaussianField | MixtureField
    if "spectrum" in exact:
        variances = torch.tensor(spectrum_variances(exact["spectrum"], shape[0] * shape[1] * shape[2]))
        network = GaussianField.from_spectrum(torch.zeros(shape), variances, **options)
    else:
        if latents is None:
            raise UserError(f"the field '{name}' is made of the latents '{exact['latents']}': name their index.json")
        data, labels = _training_latents(latents, settings["autoencoder"])
        if data.shape[1:] != shape:
            raise UserError(
                f"the latents '{latents}' are {list(data.shape[1:])} where '{name}' has {list(shape)}: name other ones"
            )
        if exact["kind"] == "gaussian":
            network = GaussianField.fit(data, **options)
        else:
            network = MixtureField.fit(data, labels, exact["bandwidth"], **options)
    save_model(out, network.state_dict(), {"family": model["family"], **network.options})
    record.write(out.parent / "run.json", [out])
    log.info("%s: exact field in %s", name, out)


def _training_latents(index: Path, autoencoder: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all training latents of a cache, float32 [N,C,h,w], and their labels."""
    cache, codec = LatentCache(index), load_autoencoder(autoencoder)
    cache.verify()
    cache.check_autoencoder(autoencoder)
    if codec.is_random:
        raise UserError(f"the latents '{index}' are drawn from a posterior each time: name those of a kind without one")
    split = cache.split("train")
    stored, labels = split.gather(np.arange(len(split)))
    return codec.latents(stored, None), labels
