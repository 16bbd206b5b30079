"""What jobs cost in time: as runs in this folder were measured where there are any, else from FLOPs. No torch."""

from __future__ import annotations

import heapq
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixflow.config import Config
from mixflow.config.entries import Classifier
from mixflow.config.networks import REPA
from mixflow.config.sources import SDVAE
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import read_json
from mixflow.stages.jobs import Job, Jobs

CPU = "cpu"
GPUS_OF_A_NODE = 8
# Sustained rates where nothing was measured: assumptions, which the plan names. TF32's is given; the other precisions
# of a GPU are in proportion, as the peak rates of recent ones are about.
TFLOPS = 100.0
_OF_TF32 = {"tf32": 1.0, "bf16": 2.0, "fp32": 0.25}
CPU_GFLOPS = 25.0  # of a job, on however many cores
JPEGS_PER_SECOND = 100.0  # read, decoded and cropped by one core
TRAINING = 3  # forward passes that one step of training costs: forward, and twice as much backward

# Seconds from the start of a job's process to its first image, and from its last to the end: imports, hashes, files.
# Of digits, on 2 cores with 2 jobs at a time.
START_SECONDS = {
    "cache_latents": 8.0,
    "train": 7.0,
    "import_weights": 6.0,
    "make_exact": 6.0,
    "theory": 40.0,
    "sample": 7.0,
    "train_extractor": 6.0,
    "train_clock": 7.0,
    "slow_flow": 12.0,
    "slow_flow_figure": 2.0,
    "slow_flow_comparison": 3.0,
    "make_reference": 4.0,
    "evaluate": 4.0,
    "evaluate_further": 6.0,
    "stand_ins": 20.0,
    "figure": 2.0,
    "render": 0.5,
    "report": 3.0,
    "row": 0.5,
    "download": 0.5,
}
COMPILE_SECONDS = 60.0  # torch.compile, before the first step on a GPU
HEAD_SECONDS = 10.0  # Snakemake's own, for its start and its decisions

_GPU_WIDTH = {
    "cache_latents": 8, "train": 8, "sample": 8, "train_clock": 1, "slow_flow": 8, "make_reference": 1, "evaluate": 1,
    "evaluate_further": 1,
}  # fmt: skip
_MANY_THREADS = 16  # of cache_latents, to read images


class Work(NamedTuple):
    """What a job does to each of its images, before a machine is known."""

    images: int
    flops: dict[str, float]  # of one image, by the precision of the products
    network: str  # whose rate this is: what must be equal for a measured rate to hold
    jpegs: bool = False  # whether images are read from files of a dataset
    compiled: bool = False
    countable: bool = True  # False where a solver chooses its own steps


class Cost(NamedTuple):
    """A job on a machine."""

    seconds: float
    devices: int  # GPUs, 0 for a job of the CPU
    threads: int  # cores that Snakemake counts
    basis: str  # "measured", "FLOPs", or "start" where nothing else counts


class Machine(NamedTuple):
    """What jobs are planned for."""

    gpus: int
    cores: int
    tflops: float = TFLOPS  # sustained, of one GPU in TF32


class Works:
    """The work of jobs, from the config alone."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def on_gpu(self, job: Job) -> bool:
        """Whether a job wants a GPU: on ImageNet, and not on the rehearsal's stand-ins."""
        if job.rule not in _GPU_WIDTH or self.config.stand_ins is not None:
            return False
        if job.rule == "make_reference" and self.config.references[job.names[0]].latents is None:
            return True
        if job.rule == "cache_latents" and self.config.autoencoder_of(job.names[0]).kind == "pixels":
            return False
        return self.config.dataset_of(self._latents(job)).kind == "imagenet"

    def of(self, job: Job) -> Work | None:
        """Return the work of a job, None where there is nothing but its start."""
        makers: dict[str, Callable[..., Work | None]] = {
            "cache_latents": self._cache_latents,
            "train": self._train,
            "sample": self._sample,
            "train_clock": self._train_clock,
            "slow_flow": self._slow_flow,
            "train_extractor": self._train_extractor,
            "make_reference": self._make_reference,
            "evaluate": self._evaluate,
            "evaluate_further": self._evaluate,
        }
        return makers[job.rule](*job.names) if job.rule in makers else None

    def _latents(self, job: Job) -> str:
        if job.rule in ("cache_latents", "train_clock"):
            return job.names[0]
        if job.rule == "make_reference":
            return self.config.references[job.names[0]].latents or ""
        return self.config.latents_of(job.names[0])

    def _peers(self, flops: float) -> float:
        """Networks of peers' files: those among the stand-ins are too small to count."""
        return 0.0 if self.config.stand_ins is not None else flops

    def _cache_latents(self, name: str) -> Work:
        entry, dataset, autoencoder = (
            self.config.latents[name], self.config.dataset_of(name), self.config.autoencoder_of(name)
        )  # fmt: skip
        views = 2 if isinstance(autoencoder, SDVAE) or entry.mirrors else 1
        flops = self._peers(views * autoencoder.flops("encode", dataset))
        return Work(
            dataset.num_images,
            {getattr(autoencoder, "precision", "fp32"): flops},
            _key(autoencoder.settings(), dataset.resolution, views),
            jpegs=dataset.kind == "imagenet",
        )

    def _train(self, name: str) -> Work:
        train = self.config.checkpoints[name].train
        assert train is not None
        assert train.model is not None
        size = self.config.latent_shape(train.latents)[1]
        passes = float(TRAINING)
        if train.self_rollout is not None and train.self_rollout.weight > 0:
            passes += 1 + TRAINING  # the step without gradient, and training where it ends
        flops: dict[str, float] = {train.precision: passes * self.config.flops(name)}
        if train.align is not None:
            assert isinstance(train.model, REPA)
            extractor = self.config.encoders[train.align.encoder].flops((size // train.model.patch_size) ** 2)
            flops[train.precision] += TRAINING * train.model.projector_flops(size) + self._peers(extractor)
        self._add_encoding(flops, train.latents)
        return Work(
            train.num_steps * train.batch_size,
            flops,
            _key(self.config.network_options(name), train.precision, train.align is not None, len(flops)),
            compiled=train.compile,
        )

    def _sample(self, checkpoint: str, name: str) -> Work:
        sampler, latents = self.config.samplers[name], self.config.latents_of(checkpoint)
        flops = self._network_flops(checkpoint, name)
        autoencoder = self.config.autoencoder_of(latents)
        by_precision: dict[str, float] = {sampler.precision: flops}
        precision = getattr(autoencoder, "precision", "fp32")
        decoding = self._peers(autoencoder.flops("decode", self.config.dataset_of(latents)))
        by_precision[precision] = by_precision.get(precision, 0.0) + decoding
        if (read := len(getattr(sampler, "clock_times", ()))) and (clock := self.config.clock_of(checkpoint)):
            reading = read * self.config.clocks[clock].flops(*self.config.latent_shape(latents))
            by_precision["fp32"] = by_precision.get("fp32", 0.0) + reading
        return Work(
            sampler.num_images,
            by_precision,
            _key(self.config.network_options(checkpoint), sampler.precision),
            countable=sampler.call_times is not None,
        )

    def _network_flops(self, checkpoint: str, name: str) -> float:
        """Return the FLOPs of the networks while one image is sampled."""
        sampler, network = self.config.samplers[name], self.config.flops(checkpoint)
        guide, times = sampler.guidance.guide, sampler.call_times or []
        guided = sum(sampler.guidance.acts_at(t) for t in times)
        return float(len(times) * network + guided * (self.config.flops(guide) if guide else network))

    def _add_encoding(self, flops: dict[str, float], latents: str) -> None:
        """Add what it takes to encode an image, where latents have no cache."""
        if self.config.latents[latents].encoded_from is not None:
            autoencoder, dataset = self.config.autoencoder_of(latents), self.config.dataset_of(latents)
            precision = getattr(autoencoder, "precision", "fp32")
            flops[precision] = flops.get(precision, 0.0) + self._peers(autoencoder.flops("encode", dataset))

    def _train_clock(self, latents: str) -> Work:
        entry = self.config.clocks[latents]
        flops: dict[str, float] = {entry.precision: TRAINING * float(entry.flops(*self.config.latent_shape(latents)))}
        self._add_encoding(flops, latents)
        return Work(entry.num_steps * entry.batch_size, flops, _key(entry.width, latents))

    def _slow_flow(self, checkpoint: str, name: str) -> Work:
        """Two trajectories of the network; of the two nulls as many calls, each two products with the axes."""
        sampler, latents = self.config.samplers[name], self.config.latents_of(checkpoint)
        assert self.config.slow_flow is not None
        channels, size = self.config.latent_shape(latents)
        calls, numbers = len(sampler.call_times or []), channels * size**2
        flops: dict[str, float] = {sampler.precision: 2 * self._network_flops(checkpoint, name)}
        axes = numbers if numbers <= self.config.slow_flow.max_axes else 0
        flops["fp32"] = flops.get("fp32", 0.0) + 4.0 * calls * 4 * numbers * axes
        if (clock := self.config.clock_of(checkpoint)) is not None:
            flops["fp32"] += 4.0 * calls * self.config.clocks[clock].flops(channels, size)  # every state, of four kinds
        self._add_encoding(flops, latents)
        return Work(sampler.num_images, flops, _key(self.config.network_options(checkpoint), sampler.precision))

    def _train_extractor(self, name: str) -> Work:
        entry = self.config.extractors[name]
        assert isinstance(entry, Classifier)
        dataset = self.config.dataset_of(entry.latents)
        flops = TRAINING * float(entry.flops(dataset.num_channels, dataset.resolution))
        return Work(entry.num_steps * entry.batch_size, {"fp32": flops}, _key(entry.network(), dataset.resolution))

    def _make_reference(self, name: str) -> Work | None:
        entry = self.config.references[name]
        extractor = self.config.extractors[entry.extractor]
        if entry.latents is None or extractor.kind == "classifier":
            return None  # published statistics and some thousand images, or a network of no weight
        dataset = self.config.dataset_of(entry.latents)
        return self._seen(extractor, dataset.num_images)

    def _evaluate(self, checkpoint: str, sampler: str, reference: str | None = None) -> Work | None:
        name = reference or self.config.reference_of(checkpoint)
        extractor = self.config.extractors[self.config.references[name].extractor]
        if extractor.kind == "classifier":
            return None
        return self._seen(extractor, self.config.samplers[sampler].num_images)

    def _seen(self, extractor: Any, images: int) -> Work:
        precision = "tf32" if getattr(extractor, "tf32", False) else "fp32"
        return Work(images, {precision: self._peers(extractor.flops(3, 0))}, _key(extractor.network()))


def _key(*values: Any) -> str:
    """Return what a rate belongs to, as text."""
    return json.dumps(values, sort_keys=True)


class Measured(NamedTuple):
    """A rate that finished runs had."""

    factor: float  # the seconds of an image over those that the assumed rate gives
    runs: tuple[str, ...]


class Rates:
    """How fast work is: as finished runs in `root` were, on the same kind of device, else as assumed."""

    def __init__(self, works: Works, machine: Machine, root: Path = Path()) -> None:
        self.works, self.machine = works, machine
        records = sorted(self._records(root), key=lambda record: record[1]["started"])
        self.gpu = next((kind for _, told in reversed(records) if (kind := _device(told)) != CPU), None)
        found: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
        for job, told in records:
            work = works.of(job)
            measured, device = told["measured"], _device(told)
            if work is None or not measured.get("images_this_attempt") or device not in (CPU, self.gpu):
                continue
            each = max(1, told["machine"].get("processes", 1)) if device != CPU else 1
            assumed = self._assumed(work, device)
            if assumed and measured.get("images_per_second"):
                seconds = each / measured["images_per_second"]
                name = "/".join(job.names)
                found.setdefault((job.rule, work.network, device), []).append((seconds / assumed, name))
        self.measured = {
            key: Measured(statistics.median(factor for factor, _ in runs), tuple(name for _, name in runs))
            for key, runs in found.items()
        }

    def _records(self, root: Path) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Yield the run records here whose work is what the config says now, whatever their seeds and laws."""
        config = self.works.config
        jobs = Jobs(config, [])
        places: list[tuple[str, tuple[str, ...], str]] = [
            ("cache_latents", (name,), paths.latents(name)) for name in config.latents
        ]
        places += [("train", (name,), paths.weights(name)) for name in config.trained_checkpoints()]
        for path in sorted((root / "results/samples").glob("*/*/run.json")):
            checkpoint, sampler = path.parts[-3:-1]
            if checkpoint in config.checkpoints and sampler in config.samplers:
                places.append(("sample", (checkpoint, sampler), paths.samples(checkpoint, sampler)))
        for rule, names, file in places:
            record = root / paths.record(file)
            if not record.exists():
                continue
            try:
                told, settings = read_json(record), jobs.settings(Job(rule, names))
                alike = _costly(told["settings"]) == _costly(settings)
            except (UserError, KeyError, TypeError):
                continue
            if alike and {"measured", "machine", "started"} <= told.keys():
                yield Job(rule, names), told

    def cost(self, job: Job) -> Cost:
        """Return what a job costs on this machine."""
        start = START_SECONDS.get(job.rule, 0.0)
        work, cores = self.works.of(job), self.machine.cores
        on_gpu = self.works.on_gpu(job) and self.machine.gpus > 0
        devices = min(_GPU_WIDTH[job.rule], GPUS_OF_A_NODE, self.machine.gpus) if on_gpu else 0
        threads = self._threads(job)
        if work is None:
            return Cost(start, devices, threads, "start")
        device = (self.gpu or "gpu") if on_gpu else CPU
        seconds = self._assumed(work, device)
        known = self.measured.get((job.rule, work.network, device))
        if known is not None:
            seconds *= known.factor
        share = work.images * seconds / max(devices, 1)
        if work.jpegs and known is None:
            share = max(share, work.images / (JPEGS_PER_SECOND * min(_MANY_THREADS, cores)))
        compiling = COMPILE_SECONDS if work.compiled and on_gpu else 0.0
        return Cost(start + compiling + share, devices, threads, "measured" if known else "FLOPs")

    def _assumed(self, work: Work, device: str) -> float:
        """Return the seconds of an image on one device at the assumed rate."""
        if device == CPU:
            return sum(work.flops.values()) / (1e9 * CPU_GFLOPS)
        rate = 1e12 * self.machine.tflops
        return sum(flops / (rate * _OF_TF32[precision]) for precision, flops in work.flops.items())

    def _threads(self, job: Job) -> int:
        """Return the cores that the rules ask for, which Snakemake cuts to those that there are."""
        config, wanted = self.works.config, 1
        if job.rule == "cache_latents" and config.dataset_of(job.names[0]).kind == "imagenet":
            wanted = _MANY_THREADS
        elif job.rule == "train" and config.parent(job.names[0]) is None:
            wanted = 2
        return min(wanted, self.machine.cores)


def _device(told: Mapping[str, Any]) -> str:
    return (told["machine"].get("devices") or [CPU])[0]


_CHEAP = (
    *("seed", "law", "gamma", "shift", "learning_rate", "betas", "weight_decay", "warmup_steps", "decay", "num_steps"),
    *("gradient_clip", "ema_decay", "horizontal_flip", "init", "labels", "num_images", "to_uint8", "checkpoint"),
    *("input_perturbation", "endpoint_target", "epsilon_scaling", "differential_correction"),
)  # settings that change a result and not what an image of it costs; steps of a sampler are told by its name's entry


def _costly(settings: Any) -> Any:
    """Return the settings without those that change no cost."""
    if not isinstance(settings, dict):
        return settings
    kept = {key: _costly(value) for key, value in settings.items() if key not in _CHEAP}
    if "solver" in settings:
        kept["num_steps"] = settings.get("num_steps")
    return kept


def wall_seconds(
    needs: Mapping[Job, Collection[Job]],  # every job after those that it needs
    left: Collection[Job],
    costs: Mapping[Job, Cost],
    machine: Machine,
) -> float:
    """Return how long the jobs take together: each starts when what it needs is made and its devices are free.

    GPU jobs do not wait for cores; jobs of the CPU do.
    """
    waiting = {job: {need for need in needs[job] if need in left} for job in needs if job in left}
    free_gpus, free_cores, now = machine.gpus, machine.cores, 0.0
    running: list[tuple[float, int, Job]] = []
    while waiting or running:
        for job in [job for job, needed in waiting.items() if not needed]:
            gpus, cores = costs[job].devices, 0 if costs[job].devices else costs[job].threads
            if gpus <= free_gpus and cores <= free_cores:
                del waiting[job]
                free_gpus, free_cores = free_gpus - gpus, free_cores - cores
                heapq.heappush(running, (now + costs[job].seconds, len(waiting), job))
        now, _, job = heapq.heappop(running)
        free_gpus += costs[job].devices
        free_cores += 0 if costs[job].devices else costs[job].threads
        for needed in waiting.values():
            needed.discard(job)
    return now


def gpu_seconds(costs: Iterable[Cost]) -> float:
    return sum(cost.seconds * cost.devices for cost in costs)
