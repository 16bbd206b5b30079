"""Encode a dataset once: shards of what the autoencoder keeps of each image, and the index that describes them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mixflow.autoencoders import Autoencoder, load_autoencoder
from mixflow.config import slice_key, spectrum_variances
from mixflow.data.imagenet import ImageNet
from mixflow.data.images import Images, draw_gaussian, load_digits, read_ahead
from mixflow.data.latents import FORMAT, LatentSplit, shard_entry, write_shard
from mixflow.runtime.devices import start_accelerator
from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.files import WorkFolder, atomic_path, free_bytes, write_json
from mixflow.runtime.progress import Progress, log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.stopping import StopRequest, Unfinished
from mixflow.stages.networks import autoencoder_files

UNREADABLE = "unreadable.txt"  # beside the index: images that could not be read, one a line, with the reason
MAX_NAMED = 3  # of them in the error
LABEL_AND_INDEX_BYTES = 16  # of an image, beside what the autoencoder keeps


@dataclass(frozen=True)
class Shard:
    """One file of a cache: which images it holds, and where."""

    path: Path
    split: str
    images: Images
    positions: range


class _Unreadable(Exception):
    """A shard is not written because images of it could not be read."""


def load_images(dataset: dict[str, Any], folder: Path | None = None) -> dict[str, Images]:
    """Return the splits of a resolved dataset entry; `folder` is where the files of an imagenet lie."""
    kinds = ("digits", "imagenet", "gaussian")
    if dataset["kind"] not in kinds:
        raise UserError(f"dataset kind '{dataset['kind']}' is not known{did_you_mean(dataset['kind'], kinds)}")
    if dataset["kind"] == "digits":
        return dict(load_digits(dataset["resolution"], dataset["num_held_out"], dataset["seed"]))
    if dataset["kind"] == "gaussian":
        channels, resolution = dataset["channels"], dataset["resolution"]
        variances = np.array(spectrum_variances(dataset["spectrum"], channels * resolution**2))
        return dict(draw_gaussian(variances, channels, resolution, dataset["num_images"], dataset["seed"]))
    if folder is None:
        raise UserError("the images of a dataset of kind imagenet lie in a folder: name the one that holds train/")
    numbers = (dataset[key] for key in ("resolution", "num_classes", "num_images"))
    return {"train": ImageNet(folder, *numbers)}


def cache_latents(
    settings: dict[str, Any],
    out: Path,  # index.json; shards, run.json and, for a while, unreadable.txt lie beside it
    *,
    images: Path | None = None,  # the folder that holds train/, for imagenet; where it lies changes no result
    autoencoder: Mapping[str, Path] = {},  # role -> record of a download, for kinds that have files
    scratch: Path = Path("scratch"),
    batch: int = 64,  # images that are read and encoded at a time; no effect on the result beyond float rounding
    workers: int | None = None,  # threads that read images; None: the cores of this machine, shared by its processes
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Write `out` and the shards. Running it again after any interruption keeps the shards that are whole.

    `settings` is the slice `cache_latents` of the config: {latents, dataset, autoencoder, shard_size} and, where the
    autoencoder leaves the choice, {mirrors}. Images that cannot be read do not end the run: all of them are listed in
    the end, and only the shards they belong to are missing. Raises `UserError` then, and before anything is encoded
    where the disk is too small; `Unfinished` when stopped in time.
    """
    name = settings["latents"]
    files = autoencoder_files(autoencoder)
    record = RunRecord("cache-latents", settings, files)
    stop = StopRequest(time_budget_minutes)
    accelerator = start_accelerator(settings["autoencoder"].get("precision", "fp32"), expected_gpus)
    splits = load_images(settings["dataset"], images)
    shards = plan_shards(settings, splits, out.parent, record.parent_hashes)
    codec = load_autoencoder(settings["autoencoder"], files, accelerator.device, mirrors=settings.get("mirrors"))
    work = WorkFolder(scratch, "cache-latents", name, slice_key(settings, *record.parent_hashes.values()))
    with contextlib.closing(work):  # gives its lock back, also where the work is not finished
        if accelerator.is_main_process:
            work.open()
        accelerator.wait_for_everyone()
        missing = [shard for shard in shards if not shard.path.exists()]
        num_images = sum(len(split.labels) for split in splits.values())
        num_missing = sum(len(shard.positions) for shard in missing)
        if missing:
            _check_room(settings, codec, missing[0].images, num_images, num_missing, out.parent)
        accelerator.wait_for_everyone()  # all have looked before anyone writes
        folder = work.path if accelerator.is_main_process else None
        progress = Progress(name, num_images, "image", num_images - num_missing, folder=folder)
        if 0 < num_missing < num_images:
            log.info("%s: %d of %d shards are there already", name, len(shards) - len(missing), len(shards))

        mine = missing[accelerator.process_index :: accelerator.num_processes]
        entries, unreadable = _encode_shards(codec, mine, accelerator, batch, workers, stop, progress)
        progress.close()
        reasons = [reason for reason in gather_object([stop.reason]) if reason]
        unreadable = {path: why for part in gather_object([unreadable]) for path, why in part.items()}
        if reasons:
            whole = sum(shard.path.exists() for shard in shards)
            raise Unfinished(f"'{name}' has {whole} of {len(shards)} shards because {reasons[0]}")
        if accelerator.is_main_process:
            _list_unreadable(out.parent / UNREADABLE, unreadable)
        if unreadable:
            raise _unreadable_error(out.parent / UNREADABLE, unreadable, num_images)

        to_encode = {shard.path for shard in missing}
        kept = [shard for shard in shards if shard.path not in to_encode]
        with ThreadPoolExecutor(max_workers=8) as pool:
            share = kept[accelerator.process_index :: accelerator.num_processes]
            hashed = pool.map(lambda shard: shard_entry(shard.path, len(shard.positions)), share)
            entries |= {entry["file"]: entry for entry in hashed}
        entries = {file: entry for part in gather_object([entries]) for file, entry in part.items()}
        if accelerator.is_main_process:
            index = make_index(settings, splits, shards, entries, codec, record.parent_hashes)
            write_json(out, index)
            _remove_other_shards(out, entries)
            record.write(
                out.parent / "run.json",
                [out],
                images=num_images,
                images_this_attempt=num_missing,
                images_per_second=round(progress.images_per_second, 3),
            )
            work.remove()
            log.info("%s: %d images in %s", name, num_images, out)
    accelerator.end_training()


def plan_shards(
    settings: dict[str, Any], splits: dict[str, Images], folder: Path, autoencoder_sha256: dict[str, str]
) -> list[Shard]:
    """Return the files that make up a cache. Their names hash all that decides what is in them."""
    shards = []
    for name, images in splits.items():
        for start in range(0, len(images.labels), settings["shard_size"]):
            positions = range(start, min(start + settings["shard_size"], len(images.labels)))
            fingerprint = images.fingerprint(positions.start, positions.stop)
            hashes = [*autoencoder_sha256.values(), *([] if fingerprint is None else [fingerprint])]
            number = start // settings["shard_size"]
            path = folder / f"{name}-{number:05d}-{slice_key(settings, *hashes)[:8]}.safetensors"
            shards.append(Shard(path, name, images, positions))
    return shards


def make_index(
    settings: dict[str, Any],
    splits: dict[str, Images],
    shards: list[Shard],
    entries: dict[str, dict[str, Any]],
    codec: Autoencoder,
    autoencoder_sha256: dict[str, str],
) -> dict[str, Any]:
    """Return the index of a cache whose shards all exist."""
    index: dict[str, Any] = {"format": FORMAT, "settings": settings, "splits": {}}
    index["num_classes"] = settings["dataset"]["num_classes"]
    for name, images in splits.items():
        files = [entries[shard.path.name] for shard in shards if shard.split == name]
        index["splits"][name] = {"num_images": len(images.labels), "shards": files}
    first = entries[shards[0].path.name]
    stored, _ = LatentSplit(shards[0].path.parent, [first], codec.mirrors).gather(np.zeros(1, np.int64))
    # Only of a posterior more is stored than the latents; what turns them into latents, such as statistics, may not be
    # at hand.
    latents = codec.latents(stored, None) if codec.is_random else stored
    index["latent_shape"] = list(latents.shape[1:])
    if autoencoder_sha256:
        index |= {"mirrors": codec.mirrors, "autoencoder_sha256": autoencoder_sha256}
    return index


def _check_room(
    settings: dict[str, Any],
    codec: Autoencoder,
    images: Images,
    num_images: int,  # of the whole cache
    num_missing: int,
    folder: Path,
) -> None:
    """Say what the images that are still missing take, and raise `UserError` unless the disk has room for them."""
    blank = torch.from_numpy(np.zeros((1, *images.shape), images.dtype))
    with torch.inference_mode():
        per_image = codec.encode(blank).nbytes + LABEL_AND_INDEX_BYTES
    needed, free = num_missing * per_image, free_bytes(folder)
    name = settings["latents"]
    log.info("%s: %s for %d images, %s free", name, _size(needed), num_missing, _size(free))
    if needed <= free:
        return
    less = ""
    if settings["autoencoder"]["kind"] == "rae":
        pixels = num_images * (math.prod(images.shape) + LABEL_AND_INDEX_BYTES)
        less = f", or train on the fly (encoded_from), which takes {_size(pixels)} for the pixels and nothing else"
    raise UserError(
        f"the latents '{name}' need {_size(needed)} for {num_missing:,} images but '{folder}' has {_size(free)} free: "
        f"make room, or name a place on another disk{less}"
    )


def _size(num_bytes: int) -> str:
    """Return bytes for people, in decimal units as disks have them."""
    scale, unit = next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= s), (1e3, "kB"))
    return f"{num_bytes / scale:,.1f} {unit}"


def _encode_shards(
    codec: Autoencoder,
    shards: list[Shard],
    accelerator: Accelerator,
    batch: int,
    workers: int | None,
    stop: StopRequest,
    progress: Progress,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Write `shards`, the share of this process, until told to stop; return (entries by file, unreadable images)."""
    entries: dict[str, dict[str, Any]] = {}
    unreadable: dict[str, str] = {}
    if not shards:
        return entries, unreadable
    # Batches are aligned to shards, so that a shard has the same bytes whoever makes it.
    starts = [(shard, range(0, len(shard.positions), batch)) for shard in shards]
    batches = [(shard.images, shard.positions[at : at + batch]) for shard, ats in starts for at in ats]
    threads = workers or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    buffers = _pixel_buffers(batch, shards[0].images, accelerator.device)
    with contextlib.closing(read_ahead(batches, buffers, threads)) as reading:

        def encoded(shard: Shard) -> Iterator[np.ndarray]:
            unreadable_before = len(unreadable)
            for _ in range(0, len(shard.positions), batch):
                if stop:
                    raise Unfinished
                pixels, broken = next(reading)
                for path, reason in broken.items():
                    log.warning("cannot read %s (%s)", path, reason)
                unreadable.update(broken)
                if len(unreadable) == unreadable_before:  # else only look for more of them
                    yield _encode(codec, pixels, accelerator.device)
                images = len(pixels) * accelerator.num_processes  # the others are about as far
                progress.advance(min(images, progress.total - progress.done), images)
            if len(unreadable) > unreadable_before:
                raise _Unreadable

        for shard in shards:
            labels, indices = (part[shard.positions.start : shard.positions.stop] for part in
                               (shard.images.labels, shard.images.indices))  # fmt: skip
            try:
                entries[shard.path.name] = write_shard(shard.path, labels, indices, encoded(shard))
            except _Unreadable:
                continue
            except Unfinished:
                break
    return entries, unreadable


def _pixel_buffers(batch: int, images: Images, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Two buffers for a batch of images: one is read into while the other is encoded; pinned where there is a GPU."""
    pinned = device.type == "cuda"
    dtype = torch.from_numpy(np.empty(0, images.dtype)).dtype
    shape = (batch, *images.shape)
    first, second = (torch.empty(shape, dtype=dtype, pin_memory=pinned).numpy() for _ in range(2))
    return first, second


def _encode(codec: Autoencoder, pixels: np.ndarray, device: torch.device) -> np.ndarray:
    images: Tensor = torch.from_numpy(pixels).to(device, non_blocking=True)
    with torch.inference_mode():
        return codec.encode(images).cpu().numpy()  # waits for the device, so that the pixels may be overwritten


def _list_unreadable(path: Path, unreadable: dict[str, str]) -> None:
    """Write the list, or remove that of an earlier attempt."""
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{image}\t{why}\n" for image, why in sorted(unreadable.items())), "utf-8")


def _unreadable_error(path: Path, unreadable: dict[str, str], num_images: int) -> UserError:
    named = ", ".join(f"'{image}'" for image in sorted(unreadable)[:MAX_NAMED])
    more = " and others" if len(unreadable) > MAX_NAMED else ""
    return UserError(
        f"{len(unreadable):,} of {num_images:,} images cannot be read ({named}{more}): replace the files listed in "
        f"'{path}' and run the same command again, which makes only the shards that hold them"
    )


def _remove_other_shards(out: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Remove shards of earlier settings, which the index no longer names, and what killed processes left."""
    for path in [*out.parent.glob("*.safetensors"), *out.parent.glob(".*.safetensors.*.tmp")]:
        if path.name not in entries:
            path.unlink()
