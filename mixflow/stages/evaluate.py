"""From sample files to metrics: feature extractor, reference, and every metric of a sample set in one pass."""

from __future__ import annotations

import os
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
    Estimate,
    class_accuracy,
    frechet_distance,
    frechet_estimate,
    load_classifier,
    load_reference,
    mean_estimate,
    memorisation,
    moments,
    open_images,
    save_classifier,
    train_classifier,
    variance_ratio_influence,
)
from mixflow.evaluation.checks import rule_kind
from mixflow.runtime.downloads import downloaded_file
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path, write_json
from mixflow.runtime.processes import start_processes
from mixflow.runtime.progress import log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.stopping import StopRequest
from mixflow.stages.image_features import Extractor, find_extractor
from mixflow.stages.measure import Measured, measure_images, measurement
from mixflow.stages.references import CachedImages, make_image_reference, require_extractor

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


def make_reference(
    settings: dict[str, Any],
    *,
    source: Path,  # index of a latent cache, or record of a download
    extractor: Path,  # weights of the network, or record of their download
    out: Path,
    scratch: Path = Path("scratch"),
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Write what samples are compared with, and run.json beside it, as the kind of extractor asks."""
    if settings["extractor"]["kind"] == "classifier":
        if _is_main_process():
            _make_classifier_reference(settings, source, extractor, out)
        return
    processes, stop = start_processes(expected_gpus), StopRequest(time_budget_minutes)
    network = _network(settings, extractor)
    parents = {"extractor": network.weights}
    images: Path | CachedImages
    if "latents" in settings["reference"]:
        parents["latents"] = source
        images = cached = CachedImages(source, settings["autoencoder"])
        if processes.is_main_process:
            cached.cache.verify()
    else:
        images = parents["source"] = downloaded_file(source)
    record = RunRecord("make-reference", settings, parents)
    num_images = make_image_reference(
        images, network, out, scratch=scratch, processes=processes, stop=stop,
        only_statistics="download" in settings["reference"],
    )  # fmt: skip
    if processes.is_main_process:
        record.write(out.parent / "run.json", [out], images=num_images)
    processes.end_training()


def evaluate(
    settings: dict[str, Any],
    *,
    samples: Path,
    reference: Path,
    extractor: Path,  # weights of the network, or record of their download
    out: Path,
    scratch: Path = Path("scratch"),
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Write metrics.json.

    {metrics, standard_errors, group_influences, num_images, labels, warnings, protocol, parents}.

    Equal inputs, equal bytes: it holds no times. Running it again after an interruption continues.
    """
    if settings["extractor"]["kind"] == "classifier":
        if _is_main_process():
            _evaluate_by_classifier(settings, samples, reference, extractor, out)
        return
    processes, stop = start_processes(expected_gpus), StopRequest(time_budget_minutes)
    network = _network(settings, extractor)
    record = RunRecord("evaluate", settings, {"samples": samples, "reference": reference, "extractor": network.weights})
    real = load_reference(reference, processes.device)
    require_extractor(real, reference, network)
    measured = measure_images(
        open_images(samples),
        record.parent_hashes["samples"],
        real,
        reference,
        network,
        real.metrics(),
        scratch=scratch,
        processes=processes,
        stop=stop,
    )
    if measured is not None:
        protocol = {**settings, "measurement": measurement(real, network, measured.num_images)}
        # The sampler knows how labels were drawn, and a table that holds many sets says each warning once.
        told = [warning.replace(f"'{samples}'", "the sample file") for warning in measured.warnings]
        measured = measured._replace(labels=rule_kind(settings["sampler"]["labels"]), warnings=told)
        _write(out, record, measured.summary(), protocol)
    processes.end_training()


def _write(out: Path, record: RunRecord, summary: dict[str, Any], protocol: dict[str, Any]) -> None:
    write_json(out, {**summary, "protocol": protocol, "parents": record.parent_hashes})
    record.write(out.parent / "run.json", [out], images=summary["num_images"])
    for warning in summary["warnings"]:
        log.warning("%s", warning)
    log.info("%s: %s", out, ", ".join(f"{name} {value:.4g}" for name, value in summary["metrics"].items()))


def _network(settings: dict[str, Any], extractor: Path) -> Extractor:
    entry = settings["extractor"]
    return find_extractor(entry["kind"], downloaded_file(extractor), entry.get("tf32", False))


def _is_main_process() -> bool:
    """A small job that one process does, whatever the number that was started."""
    return int(os.environ.get("RANK", "0")) == 0


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


def _evaluate_by_classifier(
    settings: dict[str, Any], samples: Path, reference: Path, extractor: Path, out: Path
) -> None:
    record = RunRecord("evaluate", settings, {"samples": samples, "reference": reference, "extractor": extractor})
    real = load_file(reference)
    images, labels = load_samples(samples)
    height, width = real["train.images"].shape[1:3]
    if (images.shape[1], images.shape[2]) != (height, width):
        raise UserError(
            f"'{samples}' holds images of {images.shape[2]}x{images.shape[1]} but '{reference}' was made at "
            f"{width}x{height}: name a reference of that resolution"
        )
    network = load_classifier(extractor)
    features, logits = _features(network, images)
    grey = images[..., : real["train.images"].shape[-1]]  # grey images are stored with three equal channels
    is_right = (logits.argmax(dim=1) == labels).double()
    estimates = {
        "fd": frechet_estimate(real["train.mu"], real["train.sigma"], features),
        "fd_held_out": frechet_estimate(real["held_out.mu"], real["held_out.sigma"], features),
        "accuracy": mean_estimate(class_accuracy(logits, labels), is_right),
        "variance_ratio": mean_estimate(*variance_ratio_influence(grey, real["train.images"])),
        **{
            name: Estimate(value, None)
            for name, value in memorisation(grey, real["train.images"], real["held_out.images"]).items()
        },
    }
    measured = Measured(
        estimates, len(images), (height, width), rule_kind(settings["sampler"]["labels"]), [], np.empty(0, np.uint64)
    )
    _write(out, record, measured.summary(), settings)


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
