"""FID, sFID, Inception Score, precision and recall, each as OpenAI's ADM evaluator (guided-diffusion) defines it."""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixflow.evaluation.archives import ImageArchive, read_statistics
from mixflow.evaluation.frechet import frechet_distance_to
from mixflow.evaluation.inception import SPATIAL_FEATURES, Inception
from mixflow.evaluation.inception_score import inception_score
from mixflow.evaluation.precision_recall import precision_recall
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path
from mixflow.runtime.progress import Progress

_BATCH = 64  # images per pass of the network; features do not depend on it beyond float rounding
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
_KIND = "adm reference"


class Features(NamedTuple):
    """What the network sees in a set of images, float32, in file order, on the network's device."""

    pool: Tensor  # [N, num_features]: FID, precision and recall
    spatial: Tensor  # [N, 2023]: sFID
    logits: Tensor  # [N, 1008], without bias: IS


def image_features(network: Inception, images: ImageArchive) -> Features:
    """Run all images through the network; they are never in memory together (their features take 20 kB each)."""
    device = network.device
    widths = (network.num_features, SPATIAL_FEATURES, network.num_classes)
    features = Features(*(torch.empty(len(images), width, device=device) for width in widths))
    progress = Progress(f"features of {images.path}", len(images), "image")
    done = 0
    # Nothing here makes the host wait for the device, which works on one batch while the next is read.
    for batch in images.batches(_BATCH):
        pixels = torch.from_numpy(batch)
        seen = network(pixels.pin_memory() if device.type == "cuda" else pixels)
        for whole, part in zip(features, seen, strict=True):
            whole[done : done + len(batch)] = part
        done += len(batch)
        progress.advance(len(batch), len(batch))
    progress.close()
    return features


class Reference(NamedTuple):
    """What samples are compared with, on the device asked for."""

    mu: Tensor  # [num_features] of the whole training set, like the next three; float64
    sigma: Tensor  # [num_features, num_features]
    mu_s: Tensor  # [2023]
    sigma_s: Tensor  # [2023, 2023]
    pool: Tensor  # [M, num_features], float32: features of the M images that precision and recall are measured with
    size: tuple[int, int]  # height and width of the images in pixels
    extractor: str  # SHA-256 of the network's weights


def make_adm_reference(
    source: str | os.PathLike[str],  # .npz with mu, sigma, mu_s, sigma_s and images arr_0
    network: Inception,
    extractor: str,  # SHA-256 of the network's weights
    out: str | os.PathLike[str],  # .safetensors
) -> int:
    """Write the statistics of a published reference and the features of its images; return how many these are.

    Raises `UserError` for a file without them, or of other shapes than the network's.
    """
    images = ImageArchive(source)
    statistics = read_statistics(source, _STATISTICS)
    d, s = network.num_features, SPATIAL_FEATURES
    for name, shape in zip(_STATISTICS, ([d], [d, d], [s], [s, s]), strict=True):
        if list(statistics[name].shape) != shape:
            raise UserError(
                f"{name} of '{source}' has shape {list(statistics[name].shape)} where the extractor's features make "
                f"{shape}: name the extractor that the reference was made with"
            )
        if not np.isfinite(statistics[name]).all():
            raise UserError(f"{name} of '{source}' holds NaN or infinity: fetch the file again")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in statistics.items()}
    tensors["pool"] = image_features(network, images).pool.cpu()
    facts = {"kind": _KIND, "size": list(images.size), "num_images": len(images), "extractor": extractor}
    with atomic_path(out) as temporary:
        # One metadata key only: safetensors writes several in no fixed order.
        save_file(tensors, temporary, metadata={"mixflow": json.dumps(facts, sort_keys=True)})
    return len(images)


def load_adm_reference(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Reference:
    """Read what `make_adm_reference` wrote. `UserError` for a missing, broken or other file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            facts = json.loads((file.metadata() or {}).get("mixflow", "{}"))
            if facts.get("kind") != _KIND:
                raise UserError(f"'{path}' is no reference for Inception features: make it again")
            tensors = {name: file.get_tensor(name).to(device) for name in (*_STATISTICS, "pool")}
    except FileNotFoundError:
        raise UserError(f"reference '{path}' does not exist: make it first, or correct the path") from None
    except SafetensorError as error:
        raise UserError(f"reference '{path}' cannot be read ({error}): delete it and make it again") from None
    height, width = facts["size"]
    return Reference(**tensors, size=(height, width), extractor=facts["extractor"])


def adm_metrics(reference: Reference, samples: Features) -> dict[str, float]:
    """Return fid, sfid, is, precision and recall of N images in file order.

    IS is the mean over chunks of 5000 images. Raises `UserError` for NaN, infinity, or fewer than four images.
    """
    precision, recall = precision_recall(reference.pool, samples.pool, k=3, mode="adm")
    return {
        "fid": frechet_distance_to(reference.mu, reference.sigma, samples.pool),
        "sfid": frechet_distance_to(reference.mu_s, reference.sigma_s, samples.spatial),
        "is": inception_score(samples.logits, split_size=5000),
        "precision": precision,
        "recall": recall,
    }
