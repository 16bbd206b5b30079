"""Train a learned clock: a small network that reads the time t off true interpolants x_t of latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixflow.config import slice_key
from mixflow.flow import INTERPOLANTS
from mixflow.models import Clock, save_clock
from mixflow.runtime.devices import start_accelerator
from mixflow.runtime.files import WorkFolder, require_writable
from mixflow.runtime.progress import log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.seeds import Stream, normal, uniform
from mixflow.runtime.stopping import StopRequest
from mixflow.stages.networks import autoencoder_files
from mixflow.stages.real_latents import RealLatents
from mixflow.training import Decay, Recipe, train

BETAS, GRADIENT_CLIP, EMA_DECAY = (0.9, 0.999), 1.0, 0.99


def train_clock(
    settings: dict[str, Any],
    *,
    latents: Path,  # index.json of the cache: of latents, or of pixels where the slice says "encode"
    out: Path,  # model.safetensors; run.json is written beside it
    scratch: Path,
    autoencoder: Mapping[str, Path] = {},  # role -> record of a download, where latents need files to be made
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Train as the slice `train_clock` of the config says; running it again after any interruption continues.

    The loss is (g(x_t) - t)^2, t ~ U[0, 1] for every image: every draw depends on (seed, step, position in the batch).
    """
    name, recipe = settings["clock_name"], settings["clock"]
    require_writable(out.parent)
    files = autoencoder_files(autoencoder)
    record = RunRecord("train-clock", settings, {"latents": latents, **files})
    stop = StopRequest(time_budget_minutes)
    accelerator = start_accelerator(recipe["precision"], expected_gpus)
    real = RealLatents(settings, latents, files, accelerator.device)
    work = WorkFolder(scratch, "train-clock", name, slice_key(settings, *record.parent_hashes.values()))
    if accelerator.is_main_process:
        real.cache.verify()
        work.open()
    accelerator.wait_for_everyone()
    if record.already_made(out.parent / "run.json"):
        log.info("%s: already made, nothing to do", name)
        work.remove()
        return

    real.check_shape(f"clock {name}", tuple(settings["latent_shape"]), real.cache.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        clock = Clock(settings["latent_shape"][0], recipe["width"])
    interpolant, seed, batch_size = INTERPOLANTS[recipe["interpolant"]], recipe["seed"], recipe["batch_size"]

    def loss(wrapped: nn.Module, step: int, positions: Tensor) -> Tensor:
        data, _ = real.draw(seed, step, positions, first=step * batch_size)
        at = positions.to(data.device)
        noise = normal(seed, Stream.NOISE, step, at, real.shape)
        t = uniform(seed, Stream.TIME, step, at)[:, 0]
        return (wrapped(interpolant.interpolate(noise, data, t)) - t).square()

    num_steps = recipe["num_steps"]
    weights, history = train(
        accelerator,
        clock.to(accelerator.device),
        loss,
        Recipe(
            num_steps=num_steps,
            batch_size=batch_size,
            learning_rate=recipe["learning_rate"],
            betas=BETAS,
            weight_decay=0.0,
            warmup_steps=0,
            decay=Decay(0, num_steps, 0.0),
            gradient_clip=GRADIENT_CLIP,
            ema_decay=EMA_DECAY,
        ),
        work.path / "resume.pt",
        name=f"clock {name}",
        stop=stop,
    )
    if accelerator.is_main_process:
        save_clock(out, weights, clock.options)
        record.write(
            out.parent / "run.json",
            [out],
            images=num_steps * batch_size,
            root_mean_squared_error=history["loss"][-1] ** 0.5,
        )
        work.remove()
        log.info("%s: clock in %s, off by %.4f (root mean square)", name, out, history["loss"][-1] ** 0.5)
    accelerator.end_training()
