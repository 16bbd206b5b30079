"""Say what targets need before anything runs: jobs, GPU hours, wall time, downloads and disk. No torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mixflow.config import Config
from mixflow.config import costs as networks
from mixflow.runtime import paths
from mixflow.runtime.files import free_bytes, read_json
from mixflow.runtime.progress import duration
from mixflow.stages.costs import (
    CPU,
    CPU_GFLOPS,
    GPUS_OF_A_NODE,
    HEAD_SECONDS,
    JPEGS_PER_SECOND,
    Cost,
    Machine,
    Rates,
    Works,
    gpu_seconds,
    wall_seconds,
)
from mixflow.stages.jobs import Job, Jobs, Made

BYTES_PER_WEIGHT = 4
# A resume point holds the network, its EMA, and both moments of AdamW, and is written beside the one before it.
RESUME_COPIES = 2 * 4
# Inception's features of an image while it is evaluated: pool, spatial and logits.
FEATURE_BYTES = 4 * (2048 + 2023 + 1008)


class Plan:
    """The jobs of targets, and what is left of them."""

    def __init__(
        self,
        config: Config,
        targets: Iterable[str],  # tables, figures, `paper`, paths below results/
        *,
        root: Path | None = None,  # the folder whose finished work is left out; None: nothing is
    ) -> None:
        """Raises `UserError` for an unknown target."""
        self.config = config
        self.jobs = Jobs(config, targets)
        self.left: set[Job] = set(self.jobs) if root is None else Made(self.jobs, root).left

    def counts(self) -> dict[str, int]:
        """Return the number of jobs of each rule that are left."""
        return dict(sorted(Counter(job.rule for job in self.left).items()))

    def names(self, rule: str) -> list[tuple[str, ...]]:
        """Return the wildcards of a rule's jobs that are left, in order."""
        return sorted(job.names for job in self.left if job.rule == rule)

    def latents(self) -> dict[str, int]:
        """Return the latent caches and their sizes in bytes."""
        return {name: self.config.bytes_of(name) for (name,) in self.names("cache_latents")}

    def encoded_while_training(self) -> list[str]:
        """Return the latents that have no cache."""
        used = {self.config.latents_of(name) for (name,) in self.names("train")}
        used |= {self.config.latents_of(name) for name, _ in self.names("slow_flow")}
        return sorted(name for name in used if self.config.latents[name].encoded_from is not None)

    def weights(self) -> dict[str, int]:
        """Return the checkpoints and the sizes of their weights in bytes."""
        names = [name for rule in ("train", "import_weights", "make_exact") for (name,) in self.names(rule)]
        return {name: BYTES_PER_WEIGHT * self.config.num_parameters(name) for name in names}

    def samples(self) -> int:
        """Return the size of all sample files in bytes: pixels and labels."""
        total = 0
        for checkpoint, sampler in self.names("sample"):
            dataset = self.config.dataset_of(self.config.latents_of(checkpoint))
            total += self.config.samplers[sampler].num_images * (3 * dataset.resolution**2 + 8)
        return total

    def resume_point(self) -> int:
        """Return the bytes in scratch/ of the largest training run, while it writes its resume point."""
        weights = self.weights()
        return max((RESUME_COPIES * weights[name] for (name,) in self.names("train")), default=0)

    def features(self) -> int:
        """Return the bytes in scratch/ of the largest set of samples that Inception looks at."""
        sizes = [
            self.config.samplers[sampler].num_images * FEATURE_BYTES
            for checkpoint, sampler in self.names("evaluate")
            if self.config.extractors[
                self.config.references[self.config.reference_of(checkpoint)].extractor
            ].kind == "inception"
        ]  # fmt: skip
        return max(sizes, default=0)

    def downloads(self, root: Path = Path()) -> dict[str, int | None]:
        """Return the downloads and their sizes in bytes: as recorded here, as their networks have it, else None."""
        return {name: self._download_bytes(name, root) for (name,) in self.names("download")}

    def _download_bytes(self, name: str, root: Path) -> int | None:
        config = self.config
        if (record := root / paths.download(name)).exists():
            return sum(file["bytes"] for file in read_json(record)["files"].values())
        if config.stand_ins is not None:
            return None
        for checkpoint, entry in config.checkpoints.items():
            if entry.weights is not None and entry.weights.download == name:
                return BYTES_PER_WEIGHT * config.num_parameters(checkpoint)
        for latents in config.latents:
            autoencoder = config.autoencoder_of(latents)
            for role, download in autoencoder.files_for("encode", "latents", "decode").items():
                if download == name:
                    return autoencoder.file_bytes(role, config.dataset_of(latents))
        for encoder in config.encoders.values():
            if encoder.download == name:
                return BYTES_PER_WEIGHT * networks.dinov2_parameters(encoder.num_features)
        for extractor in config.extractors.values():
            if extractor.download == name:
                return BYTES_PER_WEIGHT * extractor.num_parameters()
        return None


def default_cores() -> int:
    return len(os.sched_getaffinity(0))


def render(plan: Plan, targets: list[str], machine: Machine, root: Path = Path()) -> str:
    """Return the plan for people."""
    made = len(plan.jobs.needs) - len(plan.left)
    name = ", ".join(targets)
    if not plan.left:
        return f"{name}: nothing to do, all {made} jobs are done"
    done = f", {made} are done" if made else ""
    lines = [f"{name}: {len(plan.left)} jobs{done}", *_time(plan, machine, root)]
    if sizes := plan.downloads(root):
        known = sum(size for size in sizes.values() if size is not None)
        unknown = sum(size is None for size in sizes.values())
        beside = f", and {unknown} of unknown size" if unknown else ""
        lines += [f"downloads: about {size_text(known)}{beside}"]
        lines += [
            f"  {plan.config.downloads[download].address}: {'size unknown' if size is None else size_text(size)}"
            for download, size in sizes.items()
        ]
    return "\n".join([*lines, *_disk(plan, root)])


def _time(plan: Plan, machine: Machine, root: Path) -> list[str]:
    works = Works(plan.config)
    rates = Rates(works, machine, root)
    costs = {job: rates.cost(job) for job in plan.left}
    rows: list[tuple[str, ...]] = [("", "jobs", "GPU hours", "CPU time", "from")]
    for rule, number in plan.counts().items():
        if rule in (*plan.config.tables, *plan.config.figures, "paper"):
            continue
        of_rule = [cost for job, cost in costs.items() if job.rule == rule]
        cpu = sum(cost.seconds for cost in of_rule if cost.devices == 0)
        rows.append((rule, str(number), _hours(gpu_seconds(of_rule)), _time_text(cpu), _basis(of_rule)))
    cpu = sum(cost.seconds for cost in costs.values() if cost.devices == 0)
    rows.append(("in all", "", _hours(gpu_seconds(costs.values())), _time_text(cpu), ""))
    if not any(cost.devices for cost in costs.values()):
        rows = [(row[0], row[1], *row[3:]) for row in rows]
    seconds = HEAD_SECONDS + wall_seconds(plan.jobs.needs, plan.left, costs, machine)
    return [
        *_table(rows),
        f"wall time: about {duration(seconds)} {_on(costs.values(), machine)}",
        *_notes(plan, rates, costs),
    ]


def _on(costs: Iterable[Cost], machine: Machine) -> str:
    cores = f"{machine.cores} core{'s' if machine.cores > 1 else ''}"
    if not any(cost.devices for cost in costs):
        return f"on {cores}, no GPU is needed" if machine.gpus else f"on {cores}"
    nodes = f", {GPUS_OF_A_NODE} to a job" if machine.gpus > GPUS_OF_A_NODE else ""
    return f"on {machine.gpus} GPU{'s' if machine.gpus > 1 else ''}{nodes}, and {cores}"


def _basis(costs: list[Cost]) -> str:
    found = Counter(cost.basis for cost in costs if cost.basis != "start")
    if len(found) > 1:
        return f"{found['measured']} measured, {found['FLOPs']} from FLOPs"
    return next(iter(found), "job start alone")


def _notes(plan: Plan, rates: Rates, costs: dict[Job, Cost]) -> list[str]:
    """Say where the times come from."""
    machine, lines = rates.machine, []
    used = [job for job, cost in costs.items() if cost.basis == "measured"]
    if used:
        kinds = sorted({rates.gpu or CPU if costs[job].devices else CPU for job in used})
        lines.append(f"  measured: images per second of finished runs in this folder, on {', '.join(kinds)}")
    assumed = [cost for cost in costs.values() if cost.basis == "FLOPs"]
    if any(cost.devices for cost in assumed):
        rate = machine.tflops
        lines.append(
            f"  FLOPs: assumed are {rate:g} TFLOP/s of a GPU in TF32, {2 * rate:g} in bf16, {rate / 4:g} in float32 "
            "(--tflops: TF32's, the others in proportion), and that GPUs share work without loss"
        )
    if any(cost.devices == 0 for cost in assumed):
        lines.append(f"  FLOPs on the CPU: assumed are {CPU_GFLOPS:g} GFLOP/s of a job")
    works = {job: rates.works.of(job) for job in costs}
    if any(work is not None and work.jpegs for work in works.values()):
        lines.append(f"  images: assumed are {JPEGS_PER_SECOND:g} JPEGs read, decoded and cropped by a core a second")
    lines.append(
        "  every job's start (imports, hashes: 0.5 to 20 s) is in it; waiting in a queue and downloads are not"
    )
    uncounted = sorted("/".join(job.names) for job, work in works.items() if work is not None and not work.countable)
    if uncounted:
        lines.append(f"  not counted, for the solver chooses its steps: {', '.join(uncounted)}")
    return lines


def _disk(plan: Plan, root: Path) -> list[str]:
    disk = {f"latents {name}": size for name, size in plan.latents().items()}
    disk["weights, trained and imported"] = sum(plan.weights().values())
    disk["samples"] = plan.samples()
    disk["downloads of known size"] = sum(size or 0 for size in plan.downloads(root).values())
    disk["scratch/, the largest training run at a time"] = plan.resume_point()
    disk["scratch/, features of the largest sample set"] = plan.features()
    disk = {name: size for name, size in disk.items() if size}
    lines = ["disk, on top of what is there", *_columns({name: size_text(size) for name, size in disk.items()})]
    free = size_text(free_bytes(root / "results"))
    lines += [f"  {size_text(sum(disk.values()))} at its peak, {free} free here"]
    for name in plan.encoded_while_training():
        lines.append(
            f"  latents {name} are encoded while training, from {plan.config.cache_of(name)}: no files of their own"
        )
    return lines


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return "" if not seconds else f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}"


def _time_text(seconds: float) -> str:
    return "" if not seconds else duration(max(seconds, 1))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            [
                f"{row[0]:{widths[0]}}",
                *(f"{text:>{width}}" for text, width in zip(row[1:-1], widths[1:-1], strict=True)),
                row[-1],
            ]
        ).rstrip()
        for row in rows
    ]


def _columns(rows: dict[str, str]) -> list[str]:
    names, values = (max((len(text) for text in column), default=0) for column in (rows, rows.values()))
    return [f"  {name:{names}}  {value:>{values}}" for name, value in rows.items()]


def size_text(num_bytes: float) -> str:
    """Return bytes in decimal units, as disks have them."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
