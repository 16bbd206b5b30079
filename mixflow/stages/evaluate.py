"""From sample files to metrics: feature extractor, reference, and every metric of a sample set in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixflow.autoencoders import load_autoencoder
from mixflow.data.latents import LatentCache
from mixflow.evaluation import (
    Classifier,
    class_accuracy,
    frechet_distance,
    load_classifier,
    memorisation,
    moments,
    save_classifier,
    train_classifier,
    variance_ratio,
)
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path, write_json
from mixflow.runtime.progress import log
from mixflow.runtime.provenance import RunRecord

BATCH = 500  # images per pass of the feature network; features do not depend on it beyond float rounding


def train_extractor(settings: dict[str, Any], *, latents: Path, out: Path) -> None:
    """Train the classifier whose features compare digits; its accuracy on held-out images stands in run.json."""
    record = RunRecord("train-extractor", settings, {"latents": latents})
    cache = LatentCache(latents)
    cache.verify()
    options = settings["extractor"]
    images, labels = _images(cache, settings["autoencoder"], "train")
    network = train_classifier(
        images,
        labels,
        num_classes=cache.num_classes,
        width=options["width"],
        num_features=options["num_features"],
        num_steps=options["num_steps"],
        batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        seed=options["seed"],
    )
    held_out_images, held_out_labels = _images(cache, settings["autoencoder"], "held_out")
    accuracy = class_accuracy(_features(network, held_out_images)[1], held_out_labels)
    save_classifier(out, network)
    record.write(out.parent / "run.json", [out], held_out_accuracy=accuracy)
    log.info("%s: %.1f%% of held-out images classified rightly", settings["extractor_name"], 100 * accuracy)


def make_reference(settings: dict[str, Any], *, latents: Path, extractor: Path, out: Path) -> None:
    """Write what samples are compared with: feature moments of both splits, and their pixels."""
    record = RunRecord("make-reference", settings, {"latents": latents, "extractor": extractor})
    cache = LatentCache(latents)
    cache.verify()
    network = load_classifier(extractor)
    tensors: dict[str, Tensor] = {}
    for split in ("train", "held_out"):
        images, _ = _images(cache, settings["autoencoder"], split)
        mu, sigma = moments(_features(network, images)[0])
        tensors |= {f"{split}.images": images, f"{split}.mu": mu, f"{split}.sigma": sigma}
    # What a perfect generator could reach at the held-out set's size: real images against real images.
    floor = frechet_distance(
        tensors["held_out.mu"], tensors["held_out.sigma"], tensors["train.mu"], tensors["train.sigma"]
    )
    with atomic_path(out) as temporary:
        save_file(tensors, temporary)
    record.write(out.parent / "run.json", [out], fd_held_out_to_train=floor)
    log.info("%s: Fréchet distance of held-out to training images %.2f", settings["reference_name"], floor)


def evaluate(settings: dict[str, Any], *, samples: Path, reference: Path, extractor: Path, out: Path) -> None:
    """Write metrics.json: {metrics, protocol, parents}. It holds no times, so equal inputs give equal bytes."""
    record = RunRecord("evaluate", settings, {"samples": samples, "reference": reference, "extractor": extractor})
    real = load_file(reference)
    images, labels = load_samples(samples)
    if images.shape[1:3] != real["train.images"].shape[1:3]:
        raise UserError(
            f"'{samples}' holds images of {images.shape[2]}x{images.shape[1]} but '{reference}' was made at "
            f"{real['train.images'].shape[2]}x{real['train.images'].shape[1]}: name a reference of that resolution"
        )
    network = load_classifier(extractor)
    features, logits = _features(network, images)
    mu, sigma = moments(features)
    grey = images[..., : real["train.images"].shape[-1]]  # grey images are stored with three equal channels
    metrics = {
        "fd": frechet_distance(real["train.mu"], real["train.sigma"], mu, sigma),
        "fd_held_out": frechet_distance(real["held_out.mu"], real["held_out.sigma"], mu, sigma),
        "accuracy": class_accuracy(logits, labels),
        "variance_ratio": variance_ratio(grey, real["train.images"]),
        **memorisation(grey, real["train.images"], real["held_out.images"]),
    }
    write_json(
        out,
        {
            "metrics": {name: float(value) for name, value in metrics.items()},
            "num_images": len(images),
            "protocol": settings,
            "parents": record.parent_hashes,
        },
    )
    record.write(out.parent / "run.json", [out], images=len(images))
    log.info("%s: %s", out, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def load_samples(path: Path) -> tuple[Tensor, Tensor]:
    """Return (images uint8 [N,H,W,3], labels int64 [N]) of a sample file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["arr_0"], archive["arr_1"]
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"'{path}' is not a whole sample file with arr_0 and arr_1 ({error}): sample again") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise UserError(f"arr_0 of '{path}' is {images.dtype} {list(images.shape)}: it must be uint8 [N,H,W,3]")
    return torch.from_numpy(images), torch.from_numpy(labels)


def _images(cache: LatentCache, autoencoder: dict[str, Any], split: str) -> tuple[Tensor, Tensor]:
    """Return (images uint8 [N,H,W,C], labels [N]) of a split, through the autoencoder: the best a model can reach."""
    stored, labels = cache.split(split).gather(np.arange(len(cache.split(split))))
    codec = load_autoencoder(autoencoder)
    channels = cache.latent_shape[0] if autoencoder["kind"] == "pixels" else 3
    return codec.decode(codec.latents(stored, None))[..., :channels].contiguous(), labels


def _features(network: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return (features [N,d], logits [N,K]), batch by batch."""
    with torch.inference_mode():
        parts = [network.features_and_logits(chunk) for chunk in images.split(BATCH)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
