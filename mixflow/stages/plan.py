"""Say what tables need before anything runs: which jobs, which downloads, and how much disk. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mixflow.config import Config
from mixflow.runtime import paths
from mixflow.runtime.files import free_bytes
from mixflow.tables import figure_files, figure_paths, metric_files

BYTES_PER_WEIGHT = 4
# A resume point holds the network, its EMA, and both moments of AdamW, and is written beside the one before it.
RESUME_COPIES = 2 * 4


class Job(NamedTuple):
    rule: str
    names: tuple[str, ...]  # the wildcards


class Plan:
    """The jobs that make tables from nothing, each once."""

    def __init__(self, config: Config, tables: Iterable[str]) -> None:
        """Raises `UserError` for an unknown table."""
        self.config = config
        self.jobs: set[Job] = set()
        for table in tables:
            self._table(table)

    def counts(self) -> dict[str, int]:
        """Return the number of jobs of each rule."""
        rules = sorted({job.rule for job in self.jobs})
        return {rule: sum(job.rule == rule for job in self.jobs) for rule in rules}

    def names(self, rule: str) -> list[tuple[str, ...]]:
        """Return the wildcards of a rule's jobs, in order."""
        return sorted(job.names for job in self.jobs if job.rule == rule)

    def latents(self) -> dict[str, int]:
        """Return the latent caches and their sizes in bytes."""
        return {name: self.config.bytes_of(name) for (name,) in self.names("cache_latents")}

    def encoded_while_training(self) -> list[str]:
        """Return the latents that have no cache."""
        used = {self.config.latents_of(name) for (name,) in self.names("train")}
        return sorted(name for name in used if self.config.latents[name].encoded_from is not None)

    def weights(self) -> dict[str, int]:
        """Return the checkpoints and the sizes of their weights in bytes."""
        names = [name for rule in ("train", "import_weights") for (name,) in self.names(rule)]
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

    def _job(self, rule: str, *names: str) -> bool:
        """Add a job; False where it is planned already."""
        job = Job(rule, names)
        known = job in self.jobs
        self.jobs.add(job)
        return not known

    def _table(self, table: str) -> None:
        config = self.config
        entry = config.get("tables", table)
        self._job(table)
        self._job("render", table)
        for row in entry.rows:
            self._job("row", table, row.key)
            for file in metric_files(config.slice("row", table, row.key)):
                self._metrics(*Path(file).parts[2:-1])
        for figure in [Path(path).stem for path in figure_paths(config, table)]:
            self._job("figure", table, figure)
            if figure == "samples":
                for file in figure_files(config.slice("figure", table, figure)):
                    self._samples(*paths.sampled(Path(file)))

    def _metrics(self, checkpoint: str, sampler: str, reference: str | None = None) -> None:
        if reference is None:
            self._job("evaluate", checkpoint, sampler)
        else:
            self._job("evaluate_further", checkpoint, sampler, reference)
        self._samples(checkpoint, sampler)
        self._reference(reference or self.config.reference_of(checkpoint))

    def _reference(self, name: str) -> None:
        if not self._job("make_reference", name):
            return
        entry = self.config.get("references", name)
        self._downloads(entry.download)
        if entry.latents is not None:
            self._latents(entry.latents)
        extractor = self.config.extractors[entry.extractor]
        self._downloads(extractor.download)
        if extractor.download is None and self._job("train_extractor", entry.extractor):
            self._latents(extractor.latents)

    def _samples(self, checkpoint: str, sampler: str) -> None:
        if not self._job("sample", checkpoint, sampler):
            return
        self._checkpoint(checkpoint)
        self._autoencoder(self.config.latents_of(checkpoint), "decode")
        if (guide := self.config.samplers[sampler].guidance.guide) is not None:
            self._checkpoint(guide)

    def _checkpoint(self, name: str) -> None:
        origin = self.config.checkpoints[name]
        if origin.weights is not None:
            self._job("import_weights", name)
            self._downloads(origin.weights.download)
            return
        assert origin.train is not None
        if not self._job("train", name):
            return
        if (parent := self.config.parent(name)) is not None:
            self._checkpoint(parent)
        latents, align = origin.train.latents, origin.train.align
        uses = ("latents",) if self.config.latents[latents].encoded_from is None else ("encode", "latents")
        self._autoencoder(latents, *uses)
        self._latents(self.config.cache_of(latents))
        if align is not None:
            self._latents(align.images)
            self._downloads(self.config.encoders[align.encoder].download)

    def _latents(self, name: str) -> None:
        if self._job("cache_latents", name):
            self._autoencoder(name, "encode")
            folder = getattr(self.config.dataset_of(name), "folder", None)
            self._made_here(folder)

    def _autoencoder(self, latents: str, *uses: Any) -> None:
        self._downloads(*self.config.autoencoder_of(latents).files_for(*uses).values())

    def _downloads(self, *names: str | None) -> None:
        for name in names:
            if name is not None:
                self._job("download", name)
                self._made_here(self.config.downloads[name].folder)

    def _made_here(self, folder: str | None) -> None:
        made = self.config.stand_ins
        if made is not None and folder is not None and f"{folder}/".startswith(f"{made.folder}/"):
            self._job("stand_ins")


def render(plan: Plan, tables: list[str]) -> str:
    """Return the plan for people."""
    config, counts = plan.config, plan.counts()
    work = {rule: number for rule, number in counts.items() if rule not in config.tables}
    lines = [
        f"{', '.join(tables)}: {sum(counts.values())} jobs where nothing is made yet",
        *_columns({rule: str(number) for rule, number in work.items()}),
    ]
    downloads = [config.downloads[name] for (name,) in plan.names("download")]
    if downloads:
        lines += ["downloads", *(f"  {download.address}" for download in downloads)]

    weights, caches = plan.weights(), plan.latents()
    disk = {f"latents {name}": size for name, size in caches.items()}
    disk["weights, trained and imported"] = sum(weights.values())
    if resume := plan.resume_point():
        disk["scratch/, the largest training run at a time"] = resume
    disk["samples"] = plan.samples()
    total = sum(disk.values())
    lines += ["disk, beside the downloads", *_columns({name: _size(size) for name, size in disk.items()})]
    lines += [f"  {_size(total)} in all, {_size(free_bytes(Path('results')))} free here"]
    for name in plan.encoded_while_training():
        lines.append(
            f"  latents {name} are encoded while training, from {config.cache_of(name)}: no files of their own"
        )
    return "\n".join(lines)


def _columns(rows: dict[str, str]) -> list[str]:
    names, values = (max((len(text) for text in column), default=0) for column in (rows, rows.values()))
    return [f"  {name:{names}}  {value:>{values}}" for name, value in rows.items()]


def _size(num_bytes: int) -> str:
    """Return bytes in decimal units, as disks have them."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
