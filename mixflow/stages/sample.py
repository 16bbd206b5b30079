"""Draw images from a checkpoint: noise, solver, guidance, decoder, and one ADM-style sample file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from mixflow.autoencoders import load_autoencoder
from mixflow.config import slice_key
from mixflow.flow import INTERPOLANTS
from mixflow.models import load_model
from mixflow.runtime.devices import start_accelerator
from mixflow.runtime.files import WorkFolder, write_npz
from mixflow.runtime.progress import Progress, log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.seeds import Stream, normal, random_words
from mixflow.runtime.stopping import StopRequest, Unfinished
from mixflow.sampling import guided_velocity, sample, time_grid

NOISE_STEP = 0  # step number of the draws that belong to a whole image


def run(
    settings: dict[str, Any],
    *,
    weights: Path,
    out: Path,  # samples.npz: arr_0 uint8 [N,H,W,3], arr_1 labels int64 [N]; run.json is written beside it
    scratch: Path,
    batch: int = 250,  # images per forward pass on one device; no effect on the result beyond float rounding
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Sample as the slice `sample` of the config says; running it again after any interruption continues."""
    sampler = settings["sampler"]
    record = RunRecord("sample", settings, {"weights": weights})
    stop = StopRequest(time_budget_minutes)
    accelerator = start_accelerator(sampler["precision"], expected_gpus)
    device = accelerator.device
    name = f"{settings['checkpoint']}/{settings['sampler_name']}"
    work = WorkFolder(scratch, "sample", name, slice_key(settings, *record.parent_hashes.values()))
    if accelerator.is_main_process:
        work.open()
    accelerator.wait_for_everyone()
    if record.already_made(out.parent / "run.json"):
        log.info("%s: already made, nothing to do", name)
        work.remove()
        return

    options = settings["model"]
    given = {key: options[key] for key in ("num_heads", "label_dropout")}  # what shapes cannot tell
    network = load_model(options["family"], weights, **given)
    network.to(device).requires_grad_(False)
    autoencoder = load_autoencoder(settings["autoencoder"])
    size = settings["resolution"]
    if accelerator.is_main_process:
        _preallocate(work.path, sampler["num_images"], size)
    accelerator.wait_for_everyone()
    images, labels, done = (np.load(work.path / f"{part}.npy", mmap_mode="r+") for part in ("images", "labels", "done"))

    # Batches are aligned to multiples of `batch`, so that a resumed run has the batches of an undisturbed one.
    starts = [start for start in range(0, len(images), batch) if not done[start : start + batch].all()]
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    progress = Progress(name, len(starts), "batch")
    for start in mine:
        if stop:
            raise Unfinished(f"'{name}' was saved at {int(done.sum())} of {len(done)} images because {stop.reason}")
        chosen = slice(start, min(start + batch, len(images)))
        indices = torch.arange(chosen.start, chosen.stop, device=device)
        classes = draw_labels(sampler["labels"], sampler["seed"], indices, settings["num_classes"])
        with torch.inference_mode(), accelerator.autocast():
            latents = sample_latents(network, settings, indices, classes)
            pixels = autoencoder.decode(latents)
        images[chosen] = pixels.cpu().numpy()
        labels[chosen] = classes.cpu().numpy()
        images.flush()
        labels.flush()
        done[chosen] = True  # only after the images themselves are on disk
        done.flush()
        progress.advance(accelerator.num_processes, (chosen.stop - chosen.start) * accelerator.num_processes)
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_npz(out, {"arr_0": work.path / "images.npy", "arr_1": work.path / "labels.npy"})
        record.write(
            out.parent / "run.json",
            [out],
            images=len(images),
            images_this_attempt=sum(len(images[start : start + batch]) for start in starts),
            images_per_second=round(progress.images_per_second, 3),
        )
        work.remove()
        log.info("%s: %d images in %s", name, len(images), out)
    accelerator.end_training()


def _preallocate(folder: Path, num_images: int, size: int) -> None:
    """Create the work files (sparse) unless an earlier attempt did; `done` comes last, as the sign that all exist."""
    if (folder / "done.npy").exists():
        return
    open_memmap(folder / "images.npy", "w+", np.uint8, (num_images, size, size, 3)).flush()
    open_memmap(folder / "labels.npy", "w+", np.int64, (num_images,)).flush()
    open_memmap(folder / "done.partial", "w+", np.bool_, (num_images,)).flush()
    (folder / "done.partial").rename(folder / "done.npy")


def draw_labels(rule: str, seed: int, indices: Tensor, num_classes: int) -> Tensor:
    """Return the class of each sample, int64 [n].

    'balanced': sample i has class i mod num_classes (equally many of each, never sorted by class, which would ruin the
    Inception score). 'random': uniform, a function of (seed, i).
    """
    if rule == "balanced":
        return indices % num_classes
    return random_words(seed, Stream.LABELS, NOISE_STEP, indices, 1)[:, 0] % num_classes


def sample_latents(network: nn.Module, settings: dict[str, Any], indices: Tensor, labels: Tensor) -> Tensor:
    """Return latents [n,C,h,w] of the samples with these indices: functions of (seed, index) alone."""
    sampler, model = settings["sampler"], settings["model"]
    seed, guidance = sampler["seed"], sampler["guidance"]
    shape = (model["in_channels"], model["input_size"], model["input_size"])
    velocity = guided_velocity(
        network,
        labels,
        model["num_classes"] if model["label_dropout"] > 0 else None,  # the null class, where there is one
        guidance["scale"],
        channels=None if guidance["channels"] == "all" else guidance["channels"],
        interval=tuple(guidance["interval"]),
    )
    noise = normal(seed, Stream.NOISE, NOISE_STEP, indices, shape)
    solver = sampler["solver"]
    options: dict[str, Any] = {}
    if solver == "dopri5":
        options, times = {"atol": sampler["atol"], "rtol": sampler["rtol"]}, time_grid(1)
    elif solver == "euler_maruyama":
        options = {
            "interpolant": INTERPOLANTS[settings["interpolant"]],
            "diffusion": sampler["diffusion"]["form"],
            "norm": sampler["diffusion"]["norm"],
            "last_step": sampler["last_step"],
            "noise_at": lambda step: normal(seed, Stream.SOLVER, step, indices, shape),
        }
        times = time_grid(sampler["num_steps"], last_step_size=sampler["last_step_size"])
    else:
        times = time_grid(sampler["num_steps"])
    return sample(velocity, noise, solver=solver, times=times, **options)
