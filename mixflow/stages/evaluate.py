"""From sample files to metrics: feature extractor, reference, and every metric of a sample set in one pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixflow.autoencoders import load_autoencoder
from mixflow.data.latents import LatentCache
from mixflow.evaluation import (
    Classifier,
    ImageArchive,
    adm_metrics,
    class_accuracy,
    frechet_distance,
    image_features,
    load_adm_reference,
    load_classifier,
    load_inception,
    make_adm_reference,
    memorisation,
    moments,
    save_classifier,
    train_classifier,
    variance_ratio,
)
from mixflow.runtime.downloads import downloaded_file
from mixflow.runtime.errors import UserError, did_you_mean
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


def make_reference(settings: dict[str, Any], *, source: Path, extractor: Path, out: Path) -> None:
    """Write what samples are compared with, and run.json beside it, as the kind of extractor asks."""
    _kind_of(settings).make_reference(settings, source, extractor, out)


def evaluate(settings: dict[str, Any], *, samples: Path, reference: Path, extractor: Path, out: Path) -> None:
    """Write metrics.json, {metrics, num_images, protocol, parents}. Equal inputs, equal bytes: it holds no times."""
    record, metrics, num_images = _kind_of(settings).measure(settings, samples, reference, extractor)
    write_json(
        out,
        {
            "metrics": {name: float(value) for name, value in metrics.items()},
            "num_images": num_images,
            "protocol": settings,
            "parents": record.parent_hashes,
        },
    )
    record.write(out.parent / "run.json", [out], images=num_images)
    log.info("%s: %s", out, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


Measured = tuple[RunRecord, dict[str, float], int]  # and the number of images


# --- a classifier that the pipeline trains; `source` is the index of a latent cache, `extractor` the weights


def _make_classifier_reference(settings: dict[str, Any], source: Path, extractor: Path, out: Path) -> None:
    """Feature moments of both splits of a cache, and their pixels."""
    record = RunRecord("make-reference", settings, {"latents": source, "extractor": extractor})
    cache = LatentCache(source)
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


def _measure_by_classifier(settings: dict[str, Any], samples: Path, reference: Path, extractor: Path) -> Measured:
    record = RunRecord("evaluate", settings, {"samples": samples, "reference": reference, "extractor": extractor})
    real = load_file(reference)
    images, labels = load_samples(samples)
    height, width = real["train.images"].shape[1:3]
    _require_size(samples, (images.shape[1], images.shape[2]), reference, (height, width))
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
    return record, metrics, len(images)


# --- Inception, as in the ADM evaluator; `source` and `extractor` are records of downloads


def _make_inception_reference(settings: dict[str, Any], source: Path, extractor: Path, out: Path) -> None:
    """The statistics of a published file, and the features of its images."""
    archive, weights = downloaded_file(source), downloaded_file(extractor)
    record = RunRecord("make-reference", settings, {"source": archive, "extractor": weights})
    network = load_inception(weights, _device())
    num_images = make_adm_reference(archive, network, record.parent_hashes["extractor"], out)
    record.write(out.parent / "run.json", [out], images=num_images)
    log.info("%s: statistics, and features of %d images, in %s", settings["reference_name"], num_images, out)


def _measure_by_inception(settings: dict[str, Any], samples: Path, reference: Path, extractor: Path) -> Measured:
    weights = downloaded_file(extractor)
    record = RunRecord("evaluate", settings, {"samples": samples, "reference": reference, "extractor": weights})
    images, real = ImageArchive(samples), load_adm_reference(reference, _device())
    _require_size(samples, images.size, reference, real.size)
    if real.extractor != record.parent_hashes["extractor"]:
        raise UserError(f"'{reference}' was made with other weights than '{weights}': make the reference again")
    features = image_features(load_inception(weights, _device()), images)
    return record, adm_metrics(real, features), len(images)


class _Kind(NamedTuple):
    """What an extractor can be used for."""

    make_reference: Callable[[dict[str, Any], Path, Path, Path], None]  # settings, source, extractor, out
    measure: Callable[[dict[str, Any], Path, Path, Path], Measured]  # settings, samples, reference, extractor


_KINDS = {
    "classifier": _Kind(_make_classifier_reference, _measure_by_classifier),
    "inception": _Kind(_make_inception_reference, _measure_by_inception),
}


def _kind_of(settings: dict[str, Any]) -> _Kind:
    kind = settings["extractor"]["kind"]
    if kind not in _KINDS:
        raise UserError(f"extractor kind '{kind}' is not known{did_you_mean(kind, _KINDS)}")
    return _KINDS[kind]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _require_size(samples: Path, size: tuple[int, int], reference: Path, wanted: tuple[int, int]) -> None:
    if size != wanted:
        raise UserError(
            f"'{samples}' holds images of {size[1]}x{size[0]} but '{reference}' was made at {wanted[1]}x{wanted[0]}: "
            "name a reference of that resolution"
        )


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
