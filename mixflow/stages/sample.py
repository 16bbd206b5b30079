"""Draw images from a checkpoint: noise, solver, guidance, decoder, and one ADM-style sample file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixflow.autoencoders import Autoencoder, load_autoencoder
from mixflow.config import slice_key
from mixflow.flow import INTERPOLANTS, shift_time
from mixflow.models import load_clock
from mixflow.runtime.devices import start_accelerator
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import WorkFolder, require_writable
from mixflow.runtime.npz import NpzWriter
from mixflow.runtime.progress import Progress, log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.seeds import Stream, normal, random_words
from mixflow.runtime.stopping import StopRequest, Unfinished
from mixflow.sampling import (
    Callback,
    CountedNetwork,
    autoguided_velocity,
    differential_correction,
    epsilon_scaled,
    guided_velocity,
    sample,
    time_grid,
    time_shifted,
)
from mixflow.sampling.guidance import Network
from mixflow.stages.networks import autoencoder_files, network_from_file

NOISE_STEP = 0  # step number of the draws that belong to a whole image


def run(
    settings: dict[str, Any],
    *,
    weights: Path,
    out: Path,  # samples.npz: arr_0 uint8 [N,H,W,3], arr_1 labels int64 [N]; run.json is written beside it
    scratch: Path,
    batch: int = 250,  # images per forward pass on one device; no effect on the result beyond float rounding
    guide: Path | None = None,  # weights of the network that guides, for samplers that name one
    clock: Path | None = None,  # weights of the learned clock, for samplers with a time shift
    autoencoder: Mapping[str, Path] = {},  # role -> record of a download, for kinds that have files
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Sample as the slice `sample` of the config says; running it again after any interruption continues."""
    sampler = settings["sampler"]
    check_guide_is_named(settings, guide)
    _check_clock_is_given(settings, clock)
    require_writable(out.parent)
    files = autoencoder_files(autoencoder)
    optional = {role: path for role, path in (("guide", guide), ("clock", clock)) if path is not None}
    record = RunRecord("sample", settings, {"weights": weights, **optional, **files})
    stop = StopRequest(time_budget_minutes)
    accelerator = start_accelerator(sampler["precision"], expected_gpus)
    device = accelerator.device
    name = f"{settings['checkpoint']}/{settings['sampler_name']}"
    key = slice_key(settings, *record.parent_hashes.values())
    with contextlib.closing(WorkFolder(scratch, "sample", name, key)) as work:
        if accelerator.is_main_process:
            work.open()
        accelerator.wait_for_everyone()
        if record.already_made(out.parent / "run.json"):
            log.info("%s: already made, nothing to do", name)
            work.remove()
            return

        labels = draw_labels(sampler["labels"], sampler["seed"], sampler["num_images"], settings["num_classes"])
        network = load_network(settings, "model", weights, f"'{weights}'", "other weights").to(device)
        counted, counted_guide = CountedNetwork(network), None
        if guide is not None:
            source = f"the guide '{sampler['guidance']['guide']}', '{guide}',"
            guiding = load_network(settings, "guide_model", guide, source, "another guide").to(device)
            counted_guide = CountedNetwork(guiding)
        reader = None if clock is None else CountedNetwork(load_clock(clock, device))
        codec = load_autoencoder(settings["autoencoder"], files, device)
        num_images, size = sampler["num_images"], settings["resolution"]
        archive = NpzWriter(
            work.path, {"arr_0": ((num_images, size, size, 3), np.uint8), "arr_1": ((num_images,), np.int64)}
        )
        if accelerator.is_main_process:
            archive.create()
        accelerator.wait_for_everyone()
        done = archive.done
        accelerator.wait_for_everyone()  # all have read the same flags before the first sets more

        # Batches are aligned to multiples of `batch`, so that a resumed run has the batches of an undisturbed one.
        batches = range(0, num_images, batch)
        starts = [start for start in batches if not done[start : start + batch].all()]
        mine = starts[accelerator.process_index :: accelerator.num_processes]
        folder = work.path if accelerator.is_main_process else None
        progress = Progress(name, len(batches), "batch", len(batches) - len(starts), folder=folder)
        sampled = 0
        with BackgroundWriter(archive, codec, sampler["to_uint8"], device) as writer:
            for start in mine:
                if stop:
                    break
                indices = torch.arange(start, min(start + batch, num_images))
                classes = labels[indices]
                with torch.inference_mode(), accelerator.autocast():
                    on_device = indices.to(device, non_blocking=True), classes.to(device, non_blocking=True)
                    latents = sample_latents(
                        counted, settings, *on_device, network.null_label, counted_guide, reader
                    )  # fmt: skip
                writer.add(start, latents, classes)
                sampled += len(indices)
                progress.advance(accelerator.num_processes, len(indices) * accelerator.num_processes)
        progress.close()
        speed = progress.images_per_second
        accelerator.wait_for_everyone()
        done = archive.done
        if not done.all():
            reason = stop.reason or "another process was told to stop"
            raise Unfinished(f"'{name}' was saved at {int(done.sum())} of {num_images} images because {reason}")

        calls = {"network_calls_per_image": counted.rows}
        if counted_guide is not None:
            calls["guide_calls_per_image"] = counted_guide.rows
        if reader is not None:
            calls["clock_calls_per_image"] = reader.rows
        totals = torch.tensor([*calls.values(), sampled], dtype=torch.float64, device=device)
        *rows, images = accelerator.reduce(totals, "sum").tolist()
        if accelerator.is_main_process:
            archive.finish(out)
            record.write(
                out.parent / "run.json",
                [out],
                images=num_images,
                images_this_attempt=int(images),
                images_per_second=round(speed, 3),
                **({name: total / images for name, total in zip(calls, rows, strict=True)} if images else {}),
            )
            work.remove()
            log.info("%s: %d images in %s", name, num_images, out)
    accelerator.end_training()


class BackgroundWriter:
    """Decode, copy to the host and write one batch while the next one is sampled.

    On CUDA decoder and copy are queued on a stream of their own; a thread waits for them and writes. They are queued by
    the caller's thread, because what the decoder asks of the backends (TF32 or not) holds for the whole process and
    must not meet the network halfway. At most two batches of pixels are on the host: one is written, one comes next.
    """

    def __init__(self, archive: NpzWriter, autoencoder: Autoencoder, to_uint8: str, device: torch.device) -> None:
        self.archive, self.autoencoder, self.to_uint8 = archive, autoencoder, to_uint8
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-samples")
        self._pending: Future[None] | None = None

    def add(self, first: int, latents: Tensor, labels: Tensor) -> None:
        """Take latents [n,C,h,w] and labels [n] (on the CPU) of images first ... first + n - 1.

        Raises what the writing of the batch before raised.
        """
        pixels, ready = self._decode(latents)
        self._wait()
        self._pending = self._thread.submit(self._write, first, pixels, labels, ready)

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Return uint8 pixels [n,H,W,3] on the host, and the event after which they are there."""
        if self._stream is None:
            return self.autoencoder.decode(latents, self.to_uint8), None
        self._stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self._stream):
            pixels = self.autoencoder.decode(latents, self.to_uint8)
            latents.record_stream(self._stream)  # not to be overwritten by the next batch before it is decoded
            host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            host.copy_(pixels, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return host, ready

    def _write(self, first: int, pixels: Tensor, labels: Tensor, ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            ready.synchronize()
        self.archive.write(first, arr_0=pixels.numpy(), arr_1=labels.numpy())

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()  # after the batch that is being written


def draw_labels(rule: str, seed: int, num_images: int, num_classes: int) -> Tensor:
    """Return the class of each sample, int64 [num_images].

    'balanced': sample i has class i mod num_classes (equally many of each, never sorted by class, which would ruin the
    Inception score). 'balanced_shuffled': equally many of each, in the order that RAE's `--label-sampling equal` gives
    one process with this seed. 'random': uniform, a function of (seed, i). Raises `UserError` where 'balanced_shuffled'
    cannot be balanced.
    """
    if rule == "balanced":
        return torch.arange(num_images) % num_classes
    if rule == "balanced_shuffled":
        if num_images % num_classes:
            raise UserError(
                f"{num_images} images cannot be equally many of {num_classes} classes: set num_images to a multiple of "
                f"{num_classes}, or labels to balanced"
            )
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
        return order // (num_images // num_classes)
    return random_words(seed, Stream.LABELS, NOISE_STEP, torch.arange(num_images), 1)[:, 0] % num_classes


def sample_latents(
    network: Network,
    settings: dict[str, Any],
    indices: Tensor,  # [n] int64
    labels: Tensor,  # [n] int64
    null_label: int | None,
    guide: Network | None = None,  # for autoguidance, where the sampler names one
    clock: Callable[[Tensor], Tensor] | None = None,  # states -> times [n], where the sampler has a time shift
    *,
    initial: tuple[Tensor, float] | None = None,  # state [n,C,h,w] and time to start from; None: the samples' noise
    callback: Callback | None = None,  # sees every state; not called by dopri5, which has no steps of its own
) -> Tensor:
    """Return latents [n,C,h,w] of the samples with these indices: functions of (seed, index) alone.

    From an `initial` time as many steps are taken as from 0.
    """
    sampler, model = settings["sampler"], settings["model"]
    seed, guidance = sampler["seed"], sampler["guidance"]
    state = {"float32": torch.float32, "float64": torch.float64}[sampler["state"]]
    shape = (model["in_channels"], model["input_size"], model["input_size"])
    acting: dict[str, Any] = {"interval": tuple(guidance["interval"]), "network_dtype": torch.float32}
    if guide is not None:
        velocity = autoguided_velocity(network, guide, labels, guidance["scale"], **acting)
    else:
        channels = None if guidance["channels"] == "all" else guidance["channels"]
        velocity = guided_velocity(network, labels, null_label, guidance["scale"], channels=channels, **acting)
    # The label first: what the noise is, is judged by what the network says.
    if (shift := sampler.get("time_shift")) is not None:
        assert clock is not None, "a time shift needs a clock"
        velocity = time_shifted(velocity, clock, shift["window"], tuple(shift["interval"]))
    if (scaling := sampler.get("epsilon_scaling")) is not None:
        velocity = epsilon_scaled(velocity, scaling["factor"], scaling["start"])
    x, start = (normal(seed, Stream.NOISE, NOISE_STEP, indices, shape), 0.0) if initial is None else initial
    x = x.to(state)
    solver = sampler["solver"]
    options: dict[str, Any] = {} if callback is None else {"callback": callback}
    if solver == "dopri5":
        options, times = {"atol": sampler["atol"], "rtol": sampler["rtol"]}, time_grid(1, start=start)
    elif solver == "euler_maruyama":
        options |= {
            "interpolant": INTERPOLANTS[settings["interpolant"]],
            "diffusion": sampler["diffusion"]["form"],
            "norm": sampler["diffusion"]["norm"],
            "last_step": sampler["last_step"],
            "noise_at": lambda step: normal(seed, Stream.SOLVER, step, indices, shape).to(state),
        }
        times = time_grid(sampler["num_steps"], start=start, last_step_size=sampler["last_step_size"])
    else:
        grid = sampler.get("grid", {})
        # A grid starts before its shift.
        before = float(shift_time(torch.tensor(start, dtype=torch.float64), 1 / grid.get("shift", 1.0)))
        times = time_grid(sampler["num_steps"], start=before, **grid)
        if (correction := sampler.get("differential_correction")) is not None:
            options["correction"] = differential_correction(correction["band"], correction["strength"])
    return sample(velocity, x, solver=solver, times=times, **options)


def check_guide_is_named(settings: dict[str, Any], guide: Path | None) -> None:
    """Check that weights of a guide are given exactly where the sampler names one."""
    name = settings["sampler"]["guidance"].get("guide")
    if guide is None and name is not None:
        raise UserError(f"'{settings['sampler_name']}' is guided by '{name}': give the weights of that with --guide")
    if guide is not None and name is None:
        raise UserError(f"'{settings['sampler_name']}' names no guide: leave out '{guide}', or set guidance.guide")


def _check_clock_is_given(settings: dict[str, Any], clock: Path | None) -> None:
    """Check that weights of a clock are given exactly where the sampler asks it."""
    if clock is None and "clock" in settings:
        raise UserError(f"'{settings['sampler_name']}' has a time shift: give the clock of its latents with --clock")
    if clock is not None and "clock" not in settings:
        raise UserError(f"'{settings['sampler_name']}' has no time shift: leave out '{clock}', or add time_shift")


def load_network(settings: dict[str, Any], entry: str, weights: Path, source: str, other: str) -> Any:
    """Return the network of a resolved entry, checked to make what is sampled.

    `source` says what it is, `other` what to name in its place. Raises `UserError`.
    """
    model, network = settings["model"], network_from_file(settings[entry], weights)
    wanted, found = [model["in_channels"], model["input_size"]], network.options
    if [found["in_channels"], found["input_size"]] != wanted:
        raise UserError(
            f"{source} makes latents of {found['in_channels']} channels and size {found['input_size']} where "
            f"'{settings['checkpoint']}' has {wanted[0]} and {wanted[1]}: name {other}, or other latents"
        )
    if found["num_classes"] < settings["num_classes"]:
        raise UserError(
            f"{source} knows {found['num_classes']} classes but '{settings['checkpoint']}' is sampled with "
            f"{settings['num_classes']}: name {other}, or a dataset with as few classes"
        )
    return network.requires_grad_(False)
