"""The jobs behind targets: what each needs and makes, and which of them are made already. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mixflow.config import Config, to_json
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import read_json
from mixflow.tables import build_row, figure_files, figure_paths, metric_files, render_markdown

PAPER, SCIENCE, THEORY, REPORT = "paper", "digits_science", "theory", "report"
MAX_NAMED = 3  # of the settings that differ


class Job(NamedTuple):
    rule: str
    names: tuple[str, ...] = ()  # the wildcards


Needs = Callable[[], Iterable[Job]]
# The stage whose slice of the config decides a rule's result.
_STAGES = {"evaluate_further": "evaluate", "slow_flow_comparison": "slow_flow_figure"}
# Rules that draw: nothing in their files tells what they were made from.
_DRAWN = ("figure", "slow_flow_figure", "slow_flow_comparison")
# Rules that only gather what others make.
_WITHOUT_RECORD = ("download", "stand_ins", "row", "render", REPORT, *_DRAWN)
WITHOUT_WORK = ("row", "figure", "render")  # what they gather is made by others


class Jobs:
    """The jobs that make targets from nothing, each once, with the jobs that each one waits for."""

    def __init__(self, config: Config, targets: Iterable[str]) -> None:
        """`targets`: tables, figures, `paper`, `digits_science`, `theory`, `report`, paths below results/.

        Raises `UserError` for any other.
        """
        self.config = config
        self.needs: dict[Job, tuple[Job, ...]] = {}  # every job after those that it needs
        self.targets = [self._target(target) for target in targets]

    def __iter__(self) -> Iterator[Job]:
        return iter(self.needs)

    def outputs(self, job: Job) -> list[str]:
        """Return the files that a job makes, the most telling one first; none for a target that only gathers."""
        rule, names = job
        if rule == "render":
            return [paths.table(names[0], ending) for ending in ("md", "html")]
        if rule == REPORT:
            return [paths.report()]
        if rule == "stand_ins":
            assert self.config.stand_ins is not None
            return [paths.stand_ins(self.config.stand_ins.folder)]
        place: dict[str, Callable[..., str]] = {
            "download": paths.download,
            "cache_latents": paths.latents,
            "train": paths.weights,
            "import_weights": paths.weights,
            "make_exact": paths.weights,
            "sample": paths.samples,
            "train_clock": paths.clock,
            "slow_flow": paths.slow_flow,
            "slow_flow_figure": lambda checkpoint, sampler: paths.slow_flow(checkpoint, sampler, "png"),
            "slow_flow_comparison": paths.comparison,
            "theory": lambda: paths.theory("json"),
            "train_extractor": paths.extractor,
            "make_reference": paths.reference,
            "evaluate": paths.metrics,
            "evaluate_further": paths.metrics,
            "row": paths.row,
            "figure": paths.figure,
        }
        if rule not in place:
            return []
        files = [place[rule](*names)]
        files += [paths.losses(*names)] if rule == "train" else []
        files += [paths.theory("png")] if rule == "theory" else []
        return files if rule in _WITHOUT_RECORD else [*files, paths.record(files[0])]

    def settings(self, job: Job) -> dict[str, Any]:
        """Return the slice of the config that decides a job's result, as its run record holds it."""
        return json.loads(to_json(self.config.slice(_STAGES.get(job.rule, job.rule), *job.names)))

    # --- what is needed for what

    def _add(self, job: Job, needs: Needs) -> Job:
        if job not in self.needs:
            found = tuple(dict.fromkeys(needs()))
            self.needs[job] = found
        return job

    def _target(self, target: str) -> Job:
        if target in (PAPER, SCIENCE):
            tables = self.config.paper_tables() if target == PAPER else self.config.science_tables()
            return self._add(Job(target), lambda: [part for table in tables for part in self._table_parts(table)])
        if target == THEORY:
            return self._theory()
        if target in (REPORT, paths.report()):
            self.config.slice(REPORT)
            assert self.config.report is not None
            made = self.config.report.made
            return self._add(Job(REPORT), lambda: [part for table in made for part in self._table_parts(table)])
        if target in self.config.figures:
            return self._add(Job(target), lambda: [self._comparison(target)])
        if "/" not in target:
            self.config.get("tables", target)
            return self._add(Job(target), lambda: self._table_parts(target))
        return self._result(target)

    def _result(self, path: str) -> Job:
        parts = Path(path).parts
        section, names, file = "/".join(parts[:2]), parts[2:-1], parts[-1]
        stem, ending = Path(file).stem, Path(file).suffix
        makers: dict[tuple[str, int], tuple[tuple[str, ...], Callable[..., Job]]] = {
            ("results/downloads", 0): ((file,), lambda: self._download(stem)),
            ("results/latents", 1): (("index.json",), self._latents),
            ("results/checkpoints", 1): (("model.safetensors", "losses.json"), self._checkpoint),
            ("results/extractors", 1): (("model.safetensors",), self._extractor),
            ("results/references", 1): (("reference.safetensors",), self._reference),
            ("results/samples", 2): (("samples.npz",), self._samples),
            ("results/metrics", 2): (("metrics.json",), self._metrics),
            ("results/metrics", 3): (("metrics.json",), self._metrics),
            ("results/clocks", 1): (("model.safetensors",), self._clock),
            ("results/slow_flow", 0): ((f"{stem}.png",), lambda: self._comparison(stem)),
            ("results/slow_flow", 2): (
                ("slow_flow.json", "slow_flow.png"),
                self._slow_flow_figure if ending == ".png" else self._slow_flow,
            ),
            ("results/theory", 0): (("theory.json", "theory.png"), self._theory),
            ("results/tables", 0): ((f"{stem}.md", f"{stem}.html"), lambda: self._render(stem)),
            ("results/tables", 1): (
                (f"{stem}.json", f"{stem}.png"),
                lambda table: self._row(table, stem) if ending == ".json" else self._figure(table, stem),
            ),
        }
        files, make = makers.get((section, len(names)), ((), self._render))
        if file not in (*files, "run.json") or (file == "run.json" and not names):
            raise UserError(
                f"'{path}' is no result of the pipeline: name a table, paper, report, or a path such as "
                "results/metrics/CHECKPOINT/SAMPLER/metrics.json (see the README)"
            )
        return make(*names)

    def _table_parts(self, table: str) -> list[Job]:
        figures = [Path(path).stem for path in figure_paths(self.config, table)]
        return [self._render(table), *(self._figure(table, figure) for figure in figures)]

    def _render(self, table: str) -> Job:
        entry = self.config.get("tables", table)
        figures = [Path(path).stem for path in figure_paths(self.config, table)]
        return self._add(
            Job("render", (table,)),
            lambda: [
                *(self._row(table, row.key) for row in entry.rows),
                *(self._figure(table, figure) for figure in figures),
            ],
        )

    def _row(self, table: str, row: str) -> Job:
        files = metric_files(self.config.slice("row", table, row))
        return self._add(Job("row", (table, row)), lambda: [self._result(file) for file in files])

    def _figure(self, table: str, figure: str) -> Job:
        files = figure_files(self.config.slice("figure", table, figure))
        return self._add(Job("figure", (table, figure)), lambda: [self._result(file) for file in files])

    def _metrics(self, checkpoint: str, sampler: str, reference: str | None = None) -> Job:
        self.config.slice("evaluate", checkpoint, sampler, *([reference] if reference else []))
        wanted = reference or self.config.reference_of(checkpoint)
        job = Job("evaluate", (checkpoint, sampler))
        if reference is not None:
            job = Job("evaluate_further", (checkpoint, sampler, reference))
        return self._add(job, lambda: [self._samples(checkpoint, sampler), self._reference(wanted)])

    def _reference(self, name: str) -> Job:
        entry = self.config.get("references", name)
        return self._add(
            Job("make_reference", (name,)),
            lambda: [
                *self._downloads(entry.download),
                *([self._latents(entry.latents)] if entry.latents is not None else []),
                *self._extractor_parts(entry.extractor),
            ],
        )

    def _extractor_parts(self, name: str) -> list[Job]:
        download = self.config.get("extractors", name).download
        return [self._extractor(name)] if download is None else self._downloads(download)

    def _extractor(self, name: str) -> Job:
        latents = self.config.slice("train_extractor", name)["extractor"]["latents"]
        return self._add(Job("train_extractor", (name,)), lambda: [self._latents(latents)])

    def _samples(self, checkpoint: str, sampler: str) -> Job:
        clock = self.config.slice("sample", checkpoint, sampler).get("clock")
        guide = self.config.samplers[sampler].guidance.guide
        return self._add(
            Job("sample", (checkpoint, sampler)),
            lambda: [
                self._checkpoint(checkpoint),
                *self._autoencoder(self.config.latents_of(checkpoint), "decode"),
                *([self._checkpoint(guide)] if guide is not None else []),
                *([self._clock(clock)] if clock is not None else []),
            ],
        )

    def _theory(self) -> Job:
        self.config.slice("theory")
        return self._add(Job("theory"), list)

    def _clock(self, latents: str) -> Job:
        self.config.slice("train_clock", latents)
        return self._add(Job("train_clock", (latents,)), lambda: self._reading_parts(latents))

    def _reading_parts(self, latents: str) -> list[Job]:
        """Return what it takes to read the training latents."""
        uses = ("latents",) if self.config.latents[latents].encoded_from is None else ("encode", "latents")
        return [*self._autoencoder(latents, *uses), self._latents(self.config.cache_of(latents))]

    def _slow_flow(self, checkpoint: str, sampler: str) -> Job:
        self.config.slice("slow_flow", checkpoint, sampler)
        guide, clock = self.config.samplers[sampler].guidance.guide, self.config.clock_of(checkpoint)
        return self._add(
            Job("slow_flow", (checkpoint, sampler)),
            lambda: [
                self._checkpoint(checkpoint),
                *self._reading_parts(self.config.latents_of(checkpoint)),
                *([self._checkpoint(guide)] if guide is not None else []),
                *([self._clock(clock)] if clock is not None else []),
            ],
        )

    def _slow_flow_figure(self, checkpoint: str, sampler: str) -> Job:
        arms = self._arms(checkpoint, sampler)
        return self._add(Job("slow_flow_figure", (checkpoint, sampler)), arms)

    def _comparison(self, figure: str) -> Job:
        return self._add(Job("slow_flow_comparison", (figure,)), self._arms(figure))

    def _arms(self, *names: str) -> Needs:
        settings = self.config.slice("slow_flow_figure", *names)
        return lambda: [self._slow_flow(arm["checkpoint"], settings["sampler"]) for arm in settings["arms"]]

    def _checkpoint(self, name: str) -> Job:
        origin = self.config.get("checkpoints", name)
        if (weights := origin.weights) is not None:
            return self._add(Job("import_weights", (name,)), lambda: self._downloads(weights.download))
        if (exact := origin.exact) is not None:
            drawn = "spectrum" in self.config.slice("make_exact", name)["exact"]
            return self._add(Job("make_exact", (name,)), lambda: [] if drawn else [self._latents(exact.latents)])
        return self._add(Job("train", (name,)), lambda: self._training_parts(name))

    def _training_parts(self, name: str) -> Iterator[Job]:
        train = self.config.checkpoints[name].train
        assert train is not None
        if (parent := self.config.parent(name)) is not None:
            yield self._checkpoint(parent)
        uses = ("latents",) if self.config.latents[train.latents].encoded_from is None else ("encode", "latents")
        yield from self._autoencoder(train.latents, *uses)
        yield self._latents(self.config.cache_of(train.latents))
        if train.align is not None:
            yield self._latents(train.align.images)
            yield from self._downloads(self.config.encoders[train.align.encoder].download)

    def _latents(self, name: str) -> Job:
        self.config.slice("cache_latents", name)
        folder = getattr(self.config.dataset_of(name), "folder", None)
        return self._add(
            Job("cache_latents", (name,)),
            lambda: [*self._autoencoder(name, "encode"), *self._made_here(folder)],
        )

    def _autoencoder(self, latents: str, *uses: Any) -> list[Job]:
        return self._downloads(*self.config.autoencoder_of(latents).files_for(*uses).values())

    def _downloads(self, *names: str | None) -> list[Job]:
        return [self._download(name) for name in names if name is not None]

    def _download(self, name: str) -> Job:
        folder = self.config.get("downloads", name).folder
        return self._add(Job("download", (name,)), lambda: self._made_here(folder))

    def _made_here(self, folder: str | None) -> list[Job]:
        made = self.config.stand_ins
        if made is None or folder is None or not f"{folder}/".startswith(f"{made.folder}/"):
            return []
        return [self._add(Job("stand_ins"), list)]


class Made:
    """What lies in the results folder, compared with the config: by settings and hashes, never by file times."""

    def __init__(self, jobs: Jobs, root: Path = Path()) -> None:
        self.jobs, self.root = jobs, root
        self.missing = cache(self._missing)
        self.fault = cache(self._fault)
        self.changes = cache(self._changes)

    def _missing(self, job: Job) -> bool:
        return not all((self.root / file).exists() for file in self.jobs.outputs(job))

    def _fault(self, job: Job) -> str | None:
        """Return why the files of a job, all there, are not what the config asks for now; None where they are."""
        try:
            return self._compare(job)
        except UserError as error:
            return str(error)

    def _compare(self, job: Job) -> str | None:
        outputs = self.jobs.outputs(job)
        if not outputs or job.rule in (*_DRAWN, "stand_ins", REPORT):
            return None  # nothing in them tells
        settings = self.jobs.settings(job)
        if job.rule in ("row", "render"):
            same = self._is_row(settings, outputs[0]) if job.rule == "row" else self._is_table(settings, outputs[0])
            return None if same else "its entry, or what it is made of, has changed"
        told = read_json(self.root / outputs[0 if job.rule == "download" else -1])
        if job.rule == "download":
            return _difference(told.get("source", {}), settings["source"])
        return _difference(told.get("settings", {}), settings) or self._other_parent(told)

    def _is_row(self, settings: dict[str, Any], file: str) -> bool:
        def read(path: str) -> Any:
            return read_json(self.root / path) if (self.root / path).exists() else None

        return json.loads(json.dumps(build_row(settings, read))) == read_json(self.root / file)

    def _is_table(self, settings: dict[str, Any], file: str) -> bool:
        table = settings["table"]
        files = [self.root / paths.row(table, row) for row in settings["rows"]]
        text = (self.root / file).read_text("utf-8")
        if not all(path.exists() for path in files):  # without its rows no more can be said than whether it has them
            return all(self.jobs.config.row(table, row).label in text for row in settings["rows"])
        figures = {name: f"{table}/{name}.png" for name in settings["figures"]}
        return text == render_markdown(settings, [read_json(path) for path in files], figures)

    def _other_parent(self, told: dict[str, Any]) -> str | None:
        """Return which file a result was made from is another one now."""
        for role, parent in told.get("parents", {}).items():
            record = self.root / paths.record(parent["file"])
            if not record.exists():
                continue
            now = read_json(record).get("outputs", {}).get(Path(parent["file"]).name)
            if now not in (None, parent["sha256"]):
                return f"its {role} '{parent['file']}' are others now"
        return None

    def _changes(self, job: Job) -> bool:
        """Is it, or anything that it is made from, other than the config asks for?"""
        own = not self.missing(job) and self.fault(job) is not None
        return own or any(self.changes(need) for need in self.jobs.needs[job])

    @cached_property
    def left(self) -> set[Job]:
        """The jobs that still have to run, as Snakemake would have it if file times agreed."""
        left: set[Job] = set()

        def ask(job: Job) -> None:
            if job in left:
                return
            if not self.jobs.outputs(job):  # a target that only gathers
                for need in self.jobs.needs[job]:
                    ask(need)
                if left & set(self.jobs.needs[job]):
                    left.add(job)
            elif self.missing(job) or self.changes(job):
                left.add(job)
                for need in self.jobs.needs[job]:
                    ask(need)

        for target in self.jobs.targets:
            ask(target)
        return left


def _difference(old: Any, new: Any) -> str | None:
    """Return in words where two settings differ, None where they do not."""
    found = list(_differences(old, new, ""))
    if not found:
        return None
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return "made with " + ", ".join(found[:MAX_NAMED]) + more


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where} {json.dumps(old)} instead of {json.dumps(new)}"
