"""Slow Flow: at which time of the true path generated states are, beside what an exact sampler shows.

Trajectories start at the noise x0 of real pairs (x0, x1), and once more at their x_start; every state is measured. What
is measured, and why a perfect network does not give m = t, stands in docs/slow-flow.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixflow.config import slice_key
from mixflow.evaluation.clocks import (
    axis_moments,
    energy_time,
    exact_own_end_times,
    exact_paired_times,
    kl_time,
    least_energy,
    null_space_time,
    paired_time,
    quantiles,
    wasserstein_time,
)
from mixflow.evaluation.latent_law import LatentLaw, fit_law
from mixflow.flow import INTERPOLANTS
from mixflow.flow.gaussian import velocity_slope
from mixflow.models import Clock, load_clock
from mixflow.runtime.arithmetic import float32_products
from mixflow.runtime.devices import start_accelerator
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import WorkFolder, atomic_path, require_writable, write_json
from mixflow.runtime.progress import Progress, log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.seeds import Stream, normal
from mixflow.runtime.stopping import StopRequest, Unfinished
from mixflow.sampling import CountedNetwork
from mixflow.sampling.guidance import Network
from mixflow.stages.networks import autoencoder_files
from mixflow.stages.real_latents import RealLatents
from mixflow.stages.sample import NOISE_STEP, check_guide_is_named, load_network, sample_latents

BLOCK = 250  # images between two savings: what is summed in one go, so that a resumed run gives the same bytes
FIT_BATCH = 256
STATES_BYTES = 1 << 31  # of one pass: all states of its trajectories are held on the device
DIGITS = 6  # decimals of a result

LINEAR = INTERPOLANTS["linear"]
Arrays = dict[str, Tensor]
Sampled = tuple[Network, int | None, Network | None, dict[str, Any]]  # network, null label, guide, settings


def run(
    settings: dict[str, Any],
    *,
    weights: Path,
    latents: Path,  # index.json of the cache: of latents, or of pixels where the slice says "encode"
    out: Path,  # slow_flow.json; run.json is written beside it
    scratch: Path,
    guide: Path | None = None,  # weights of the network that guides, for samplers that name one
    clock: Path | None = None,  # weights of the learned clock, where the slice names one
    autoencoder: Mapping[str, Path] = {},  # role -> record of a download, where latents need files to be made
    batch: int = 250,  # images per forward pass on one device, fewer where their states would not fit
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Measure as the slice `slow_flow` of the config says; running it again after any interruption continues."""
    check_guide_is_named(settings, guide)
    if (clock is None) != ("clock" not in settings):
        raise UserError(f"'{settings['checkpoint']}': give the learned clock with --clock exactly where there is one")
    require_writable(out.parent)
    files = autoencoder_files(autoencoder)
    optional = {role: path for role, path in (("guide", guide), ("clock", clock)) if path is not None}
    record = RunRecord("slow-flow", settings, {"weights": weights, "latents": latents, **optional, **files})
    stop = StopRequest(time_budget_minutes)
    accelerator = start_accelerator(settings["sampler"]["precision"], expected_gpus)
    name = f"{settings['checkpoint']}/{settings['sampler_name']}"
    key = slice_key(settings, *record.parent_hashes.values())
    with contextlib.closing(WorkFolder(scratch, "slow-flow", name, key)) as work:
        if accelerator.is_main_process:
            work.open()
        accelerator.wait_for_everyone()
        if record.already_made(out.parent / "run.json"):
            log.info("%s: already made, nothing to do", name)
            work.remove()
            return

        real = RealLatents(settings, latents, files, accelerator.device)
        if accelerator.is_main_process:
            real.cache.verify()
            _fit(settings, real, work.path / "law.safetensors")
        accelerator.wait_for_everyone()
        # By way of the host: safetensors does not know the device "cpu:0" of one process among several.
        tensors = load_file(work.path / "law.safetensors")
        law = LatentLaw.of_tensors({name: tensor.to(accelerator.device) for name, tensor in tensors.items()})

        network = load_network(settings, "model", weights, f"'{weights}'", "other weights").to(accelerator.device)
        model = settings["model"]
        real.check_shape(name, (model["in_channels"], model["input_size"], model["input_size"]), model["num_classes"])
        counted, guiding = CountedNetwork(network), None
        if guide is not None:
            source = f"the guide '{settings['sampler']['guidance']['guide']}', '{guide}',"
            guiding = load_network(settings, "guide_model", guide, source, "another guide").to(accelerator.device)
        sampled: dict[str, Sampled] = {
            "measured": (counted, network.null_label, guiding, settings),
            **_null_fields(settings, law, network.null_label),
        }
        reader = None if clock is None else load_clock(clock, accelerator.device)

        num_images = settings["sampler"]["num_images"]
        starts = range(0, num_images, BLOCK)
        accelerator.wait_for_everyone()
        left = [start for start in starts if not _block_file(work.path, start).exists()]
        accelerator.wait_for_everyone()  # all have seen the same files before the first writes more
        folder = work.path if accelerator.is_main_process else None
        progress = Progress(name, len(starts), "block", len(starts) - len(left), folder=folder)
        measured_here = 0
        for start in left[accelerator.process_index :: accelerator.num_processes]:
            if stop:
                break
            indices = torch.arange(start, min(start + BLOCK, num_images))
            with torch.inference_mode(), accelerator.autocast():
                block = _measure_block(settings, real, sampled, law, reader, indices, batch)
            with atomic_path(_block_file(work.path, start)) as temporary:
                save_file({name: array.cpu().contiguous() for name, array in block.items()}, temporary)
            measured_here += len(indices)
            progress.advance(accelerator.num_processes, len(indices) * accelerator.num_processes)
        progress.close()
        speed = progress.images_per_second
        accelerator.wait_for_everyone()
        finished = sum(_block_file(work.path, start).exists() for start in starts)
        if finished < len(starts):
            reason = stop.reason or "another process was told to stop"
            raise Unfinished(f"'{name}' was saved at {finished} of {len(starts)} blocks because {reason}")

        totals = torch.tensor([counted.rows, measured_here], dtype=torch.float64, device=accelerator.device)
        rows, images = accelerator.reduce(totals, "sum").tolist()
        if accelerator.is_main_process:
            blocks = _joined([load_file(_block_file(work.path, start)) for start in starts])
            write_json(out, _result(settings, blocks, law, list(sampled)))
            record.write(
                out.parent / "run.json",
                [out],
                images=num_images,
                images_this_attempt=int(images),
                images_per_second=round(speed, 3),
                **({"network_calls_per_image": rows / images} if images else {}),
            )
            work.remove()
            log.info("%s: Slow Flow of %d images in %s", name, num_images, out)
    accelerator.end_training()


def _block_file(folder: Path, start: int) -> Path:
    return folder / f"block-{start:08d}.safetensors"


def _fit(settings: dict[str, Any], real: RealLatents, file: Path) -> None:
    """Write the moments of the training latents, where an earlier attempt has not."""
    if file.exists():
        return
    options, seed = settings["slow_flow"], settings["sampler"]["seed"]
    count = min(options["fit_images"], len(real))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.arange(count).split(FIT_BATCH):
            yield real.draw(seed, NOISE_STEP, indices)

    with torch.inference_mode():
        law = fit_law(batches(), settings["num_classes"], max_axes=options["max_axes"], seed=seed)
    with atomic_path(file) as temporary:
        save_file({name: tensor.cpu() for name, tensor in law.tensors().items()}, temporary)


# --- nulls: exact velocity fields of Gaussians with the data's moments -----------------------------------------------


def _null_fields(settings: dict[str, Any], law: LatentLaw, null_label: int | None) -> dict[str, Sampled]:
    """Return the fields that are sampled like the network: `gaussian` knows no labels, `class_gaussian` does.

    Guidance acts on them as on the network (without a label the second is the first). A guiding network has no exact
    counterpart: under autoguidance they are sampled without guidance.
    """
    guidance = settings["sampler"]["guidance"]
    if "guide" in guidance:
        unguided = {"scale": 1.0, "channels": "all", "interval": [0.0, 1.0]}
        settings = {**settings, "sampler": {**settings["sampler"], "guidance": unguided}}
    marginal = gaussian_field(law.variance, law.axes, lambda labels: law.mean)
    fields: dict[str, Sampled] = {"gaussian": (marginal, null_label, None, settings)}
    if (means := law.class_means) is not None and law.within_variance is not None:
        conditional = gaussian_field(law.within_variance, law.within_axes, lambda labels: means[labels])

        def by_label(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if null_label is None or not (hidden := y == null_label).any():
                return conditional(x, t, y)
            shown = conditional(x, t, torch.where(hidden, 0, y))
            return torch.where(hidden[:, None, None, None], marginal(x, t, y), shown)

        fields["class_gaussian"] = (by_label, null_label, None, settings)
    return fields


def gaussian_field(
    variance: Tensor,  # [d] along the axes
    axes: Tensor | None,  # [d,d] orthonormal columns; None: the coordinates
    mean_of: Callable[[Tensor], Tensor],  # labels [B] -> means [B,d] or [d]
) -> Network:
    """Return the exact velocity mean + a(t) (x - t mean) of Gaussian data, in float32 whatever the network's precision.

    See `mixflow.flow.gaussian.velocity_slope`.
    """
    turned = None if axes is None else axes.float()

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False), float32_products():
            mean = mean_of(y).float()
            slope = velocity_slope(variance, t.double()[:, None]).float()  # [B,d]
            rest = x.flatten(1).float() - t.float()[:, None] * mean
            rest = slope * rest if turned is None else (slope * (rest @ turned)) @ turned.T
            return (mean + rest).view(x.shape)

    return velocity


# --- one block of images ---------------------------------------------------------------------------------------------


def _measure_block(
    settings: dict[str, Any],
    real: RealLatents,
    sampled: Mapping[str, Sampled],
    law: LatentLaw,
    clock: Clock | None,
    indices: Tensor,  # [n] int64
    batch: int,
) -> Arrays:
    """Return what is measured of these images: per image [n,T] or [n], summed over images [T,A]."""
    latent_bytes = 4 * len(law.mean)
    steps = settings["sampler"]["num_steps"] + 1
    rows = max(1, min(batch, STATES_BYTES // (steps * latent_bytes)))
    return _joined([_measure(settings, real, sampled, law, clock, part) for part in indices.split(rows)])


def _measure(
    settings: dict[str, Any],
    real: RealLatents,
    sampled: Mapping[str, Sampled],
    law: LatentLaw,
    clock: Clock | None,
    indices: Tensor,
) -> Arrays:
    seed, start = settings["sampler"]["seed"], settings["slow_flow"]["start"]
    data, labels = real.draw(seed, NOISE_STEP, indices)
    at = indices.to(real.device)
    noise = normal(seed, Stream.NOISE, NOISE_STEP, at, real.shape)
    begun = LINEAR.interpolate(noise, data, torch.tensor(start, device=real.device))
    found: Arrays = {}
    times: list[float] = []
    for name, (network, null_label, guide, asked) in sampled.items():

        def states_from(initial: tuple[Tensor, float]) -> tuple[list[float], list[Tensor]]:
            states: list[Tensor] = []
            times: list[float] = []

            def keep(step: int, x: Tensor, t: Tensor) -> None:
                states.append(x.float())
                times.append(float(t))

            sample_latents(
                network, asked, at, labels, null_label, guide, clock, initial=initial, callback=keep  # noqa: B023
            )  # fmt: skip
            return times, states

        later, states = states_from((begun, start))
        found |= _paired(f"{name}/from_start", states, noise, data)
        times, states = states_from((noise, 0.0))
        found |= _paired(f"{name}/from_noise", states, noise, data)
        found |= _paired(f"{name}/own_end", states, noise, states[-1])
        found |= _marginal(name, states, law, clock)
    true = [LINEAR.interpolate(noise, data, torch.tensor(t, device=real.device)) for t in times]
    found |= _marginal("draws", true, law, clock)
    found["images"] = torch.tensor([len(indices)], dtype=torch.float64)
    found["times/from_noise"] = torch.tensor(times, dtype=torch.float64)
    found["times/from_start"] = torch.tensor(later, dtype=torch.float64)
    return found


def _paired(name: str, states: list[Tensor], noise: Tensor, data: Tensor) -> Arrays:
    """Return the times and distances [n,T] of the nearest interpolations of a pair, and |x1 - x0|^2 [n]."""
    times, distances, lengths = zip(*(paired_time(state, noise, data) for state in states), strict=True)
    return {
        f"{name}/m": torch.stack(times, dim=1),
        f"{name}/distance": torch.stack(distances, dim=1),
        f"{name}/length": lengths[0],
    }


def _marginal(name: str, states: list[Tensor], law: LatentLaw, clock: Clock | None) -> Arrays:
    """Return sums [T,A] on the axes, the sum of |x|^2 [T], and what the learned clock reads [n,T]."""
    sums, squares = zip(*(axis_moments(state, law.axes, law.coordinates) for state in states), strict=True)
    energies = torch.stack([state.double().square().sum() for state in states])
    found = {
        f"sum/{name}/values": torch.stack(sums), f"sum/{name}/squares": torch.stack(squares),
        f"sum/{name}/energy": energies,
    }  # fmt: skip
    if clock is not None:
        with float32_products():
            found[f"{name}/read"] = torch.stack([clock(state).double() for state in states], dim=1)
    return found


def _joined(parts: list[Arrays]) -> Arrays:
    """Return parts as one, in order: sums (and the number of images) are added, times are the same, rows are joined."""
    joined: Arrays = {}
    for name, first in parts[0].items():
        if name.startswith("times/"):
            joined[name] = first
        elif name.startswith("sum/") or name == "images":
            joined[name] = torch.stack([part[name] for part in parts]).sum(dim=0)
        else:
            joined[name] = torch.cat([part[name] for part in parts])
    return joined


# --- the result ------------------------------------------------------------------------------------------------------


def _result(settings: dict[str, Any], blocks: Arrays, law: LatentLaw, sampled: list[str]) -> dict[str, Any]:
    """Return slow_flow.json; docs/slow-flow.md tells its keys."""
    law = LatentLaw.of_tensors({name: tensor.cpu() for name, tensor in law.tensors().items()})
    nulls = [name for name in sampled if name != "measured"]
    times = {reading: blocks[f"times/{reading}"] for reading in ("from_noise", "from_start")}
    times["own_end"] = times["from_noise"]
    start = settings["slow_flow"]["start"]
    readings: dict[str, Any] = {}
    for reading, t in times.items():
        readings[reading] = {
            "times": t.tolist(),
            "measured": _paired_result(blocks, "measured", reading),
            "nulls": {name: _paired_result(blocks, name, reading) for name in nulls},
            "exact_flow": {name: _exact_flow(law, name, reading, t, start) for name in nulls},
        }
    if "measured/read" in blocks:
        readings["noise_level"] = {
            "times": times["from_noise"].tolist(),
            "measured": quantiles(blocks["measured/read"].numpy()),
            "nulls": {name: quantiles(blocks[f"{name}/read"].numpy()) for name in nulls},
            "draws": quantiles(blocks["draws/read"].numpy()),
        }
    result = {
        "checkpoint": settings["checkpoint"],
        "sampler": settings["sampler_name"],
        "num_images": int(blocks["images"]),
        "start": start,
        "law": {
            "images": law.count,
            "dimensions": len(law.mean),
            "axes": "coordinates" if law.axes is None else "principal",
            "num_axes": len(law.axis_variance),
            "energy": law.energy,
            "mean_variance": float(law.variance.mean()),
        },
        "readings": readings,
        "clocks": _clocks(blocks, law, ["measured", *nulls, "draws"]),
    }
    return _rounded(result)


def _paired_result(blocks: Arrays, name: str, reading: str) -> dict[str, Any]:
    m, length = blocks[f"{name}/{reading}/m"], blocks[f"{name}/{reading}/length"]
    return {
        **quantiles(m.numpy()),
        # What minimises the mean squared distance over all images, as the closed forms do.
        "pooled": ((m * length[:, None]).sum(dim=0) / length.sum()).tolist(),
        "distance": quantiles(blocks[f"{name}/{reading}/distance"].numpy()),
    }


def _exact_flow(law: LatentLaw, null: str, reading: str, times: Tensor, start: float) -> list[float]:
    """Return the pooled time of the null's exact flow: what infinitely many steps would show of it."""
    variance, mean_square = law.variance, (law.mean if law.axes is None else law.mean @ law.axes).square()
    if null == "class_gaussian":
        assert law.class_means is not None
        assert law.class_shares is not None
        assert law.within_axes is not None
        assert law.within_variance is not None
        variance = law.within_variance
        mean_square = law.class_shares @ (law.class_means @ law.within_axes).square()
    if reading == "own_end":
        return exact_own_end_times(times, mean_square, variance)
    return exact_paired_times(times, mean_square, variance, start if reading == "from_start" else 0.0)


def _clocks(blocks: Arrays, law: LatentLaw, series: list[str]) -> dict[str, Any]:
    """Return {times, least_energy, and for each clock the time that it reads of each series, None where it cannot}."""
    count, times = float(blocks["images"]), blocks["times/from_noise"].tolist()
    mu, lam, dimensions = law.axis_mean, law.axis_variance, len(law.mean)
    clocks: dict[str, Any] = {name: {} for name in ("wasserstein", "kl", "energy", "null_space")}
    energies = {}
    for name in series:
        means = blocks[f"sum/{name}/values"] / count
        spread = blocks[f"sum/{name}/squares"] / count - means.square()
        variances = (spread * count / max(count - 1, 1)).clamp_min(0)
        energies[name] = (blocks[f"sum/{name}/energy"] / count).tolist()
        states = list(zip(times, means, variances, energies[name], strict=True))
        clocks["wasserstein"][name] = [wasserstein_time(t, mean, v, mu, lam) for t, mean, v, _ in states]
        clocks["kl"][name] = [kl_time(t, mean, v, mu, lam) for t, mean, v, _ in states]
        clocks["energy"][name] = [energy_time(t, energy, law.energy, dimensions) for t, _, _, energy in states]
        clocks["null_space"][name] = [null_space_time(v, lam) for _, _, v, _ in states]
    if "measured/read" in blocks:
        true = blocks["draws/read"].mean(dim=0)
        clocks["learned"] = {
            name: (torch.tensor(times) + blocks[f"{name}/read"].mean(dim=0) - true).tolist() for name in series
        }
    # With fewer images than dimensions most principal axes have no variance, whatever the data.
    if clocks["null_space"]["draws"][0] is None or law.count <= dimensions:
        del clocks["null_space"]
    per_number = {name: [energy / dimensions for energy in found] for name, found in energies.items()}
    return {
        "times": times,
        **clocks,
        "energy_per_number": {**per_number, "least": least_energy(law.energy, dimensions) / dimensions},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return round(float(np.float64(value)), DIGITS)
    return value
