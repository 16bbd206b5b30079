"""Say where the cells of a table come from: files, their state, the entries behind them, and the command. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mixflow.config import Config
from mixflow.runtime import paths
from mixflow.runtime.progress import duration
from mixflow.stages.jobs import Job, Jobs, Made
from mixflow.stages.status import Piece, pieces
from mixflow.tables import METRICS, cells

# The stage of a rule's work folder, where it keeps one.
_WORK = {
    "cache_latents": "cache-latents", "train": "train", "sample": "sample", "train_clock": "train-clock",
    "slow_flow": "slow-flow",
}  # fmt: skip


class State(NamedTuple):
    """What is to be said of a file: made, stale, running, stopped, missing (it can be made now) or waiting."""

    word: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}" if self.reason else self.word


class Where:
    """The files of a table and their states, in the folder `root`."""

    def __init__(self, config: Config, table: str, root: Path = Path()) -> None:
        """Raises `UserError` for an unknown table."""
        self.config, self.table = config, table
        self.jobs = Jobs(config, [table])
        self.made = Made(self.jobs, root)
        self.work = pieces(root / "scratch")

    def state(self, job: Job) -> State:
        """Return the state of what a job makes."""
        if (piece := self._piece(job)) is not None and (self.made.missing(job) or self.made.fault(job)):
            done = f"{piece.unit} {piece.done:,}/{piece.total:,}" if piece.total else "at its start"
            where = f" on {piece.host}" if piece.host else ""
            word = "running" if piece.state == "running" else "stopped"
            return State(word, f"{done}{where}, last sign of life {duration(piece.age)} ago")
        if self.made.missing(job):
            wanting = [need for need in self.jobs.needs[job] if self.made.missing(need)]
            if wanting:
                return State("waiting", f"for {_named(wanting)}")
            return State("missing", "all that it needs is made" if self.jobs.needs[job] else "")
        if (fault := self.made.fault(job)) is not None:
            return State("stale", fault)
        changed = [need for need in self.jobs.needs[job] if self.made.changes(need)]
        if changed:
            return State("stale", f"made from stale {_named(changed)}")
        return State("made")

    def _piece(self, job: Job) -> Piece | None:
        """Return the unfinished work on a job: by its name, for the key beside it hashes what is not made yet."""
        name = "/".join(job.names)
        if job.rule.startswith("evaluate"):
            stage, name = "evaluate", f"features of {paths.samples(*job.names[:2])}"
        else:
            stage = _WORK.get(job.rule, "")
        found = [piece for piece in self.work if (piece.stage, piece.name) == (stage, name)]
        return min(found, key=lambda piece: piece.age, default=None)


def _named(jobs: list[Job]) -> str:
    """Return jobs by what they make: one by its name, several by their number."""
    kinds: dict[str, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(_kind(job), []).append(job)
    names = {kind: "/".join(of_kind[0].names) for kind, of_kind in kinds.items()}
    return ", ".join(
        f"{len(of_kind)} {kind}" if len(of_kind) > 1 else f"{kind} {names[kind]}".strip()
        for kind, of_kind in kinds.items()
    )


def _kind(job: Job) -> str:
    words = {
        "cache_latents": "latents",
        "train": "weights",
        "import_weights": "weights",
        "make_exact": "weights",
        "sample": "samples",
        "train_clock": "clock",
        "slow_flow": "Slow Flow",
        "slow_flow_figure": "figure",
        "slow_flow_comparison": "figure",
        "train_extractor": "feature network",
        "make_reference": "reference",
        "evaluate": "metrics",
        "evaluate_further": "metrics",
        "stand_ins": "stand-ins",
    }
    return words.get(job.rule, job.rule)


def render(where: Where, row: str | None, configs: list[str]) -> str:
    """Return where the cells of a table, or of one row of it, come from. `configs` are the files of the config."""
    config, table = where.config, where.table
    if row is not None:
        config.row(table, row)
    # Behind the target, which --configfile would take for one more of its files.
    overlays = f" --configfile {' '.join(map(shlex.quote, configs[1:]))}" if configs[1:] else ""
    options = f" --cores all{overlays}"
    measured = [cell for cell in cells(config, table) if row in (None, cell.row)]
    lines = []
    for name in dict.fromkeys(cell.row for cell in measured):
        of_row = [cell for cell in measured if cell.row == name]
        lines += [f"{table}/{name}  {config.row(table, name).label}"]
        lines += [_file(where, "row", Job("row", (table, name)), 2)]
        checkpoints = dict.fromkeys(cell.checkpoint for cell in of_row)  # of each replicate
        lines += [_file(where, "weights", _weights(config, checkpoint), 2) for checkpoint in checkpoints]
        for file in dict.fromkeys(cell.file for cell in of_row):
            checkpoint, sampler = next((cell.checkpoint, cell.sampler) for cell in of_row if cell.file == file)
            metrics = [METRICS[cell.metric].name for cell in of_row if cell.file == file]
            parts = tuple(Path(file).parts[2:-1])
            evaluate = Job("evaluate" if len(parts) == 2 else "evaluate_further", parts)
            lines += [f"  {sampler}: {', '.join(dict.fromkeys(metrics))}"]
            lines += [_file(where, "samples", Job("sample", (checkpoint, sampler)), 4)]
            lines += [_file(where, "metrics", evaluate, 4)]
            lines += [f"    entries  {', '.join(_entries(config, checkpoint, sampler, parts[2:]))}"]
            lines += [f"    {_command(where, evaluate, options)}"]
        lines += [f"  {_command(where, Job('row', (table, name)), options)}"]
    quoted = [entry.key for entry in config.tables[table].rows if entry.quoted and row in (None, entry.key)]
    if quoted:
        lines.append(f"quoted from the paper, nothing is run: {', '.join(quoted)}")
    return "\n".join(lines)


def _weights(config: Config, checkpoint: str) -> Job:
    origin = config.checkpoints[checkpoint]
    rule = "train" if origin.train else "import_weights" if origin.weights else "make_exact"
    return Job(rule, (checkpoint,))


def _file(where: Where, what: str, job: Job, indent: int) -> str:
    return f"{' ' * indent}{what:9}{where.jobs.outputs(job)[0]}  {where.state(job)}"


def _entries(config: Config, checkpoint: str, sampler: str, further: tuple[str, ...]) -> Iterator[str]:
    """Yield the entries of the config that decide a cell."""
    name: str | None = checkpoint
    while name is not None:
        yield f"checkpoints.{name}"
        name = config.parent(name)
    latents = config.latents_of(checkpoint)
    yield f"latents.{latents}"
    yield f"samplers.{sampler}"
    if guide := config.samplers[sampler].guidance.guide:
        yield f"checkpoints.{guide}"
    if clock := config.slice("sample", checkpoint, sampler).get("clock"):
        yield f"clocks.{clock}"
    reference = further[0] if further else config.reference_of(checkpoint)
    yield f"references.{reference}"
    yield f"extractors.{config.references[reference].extractor}"


def _command(where: Where, job: Job, options: str) -> str:
    """Return how to make a file or, where it is made, how to make it again."""
    file = shlex.quote(where.jobs.outputs(job)[0])
    if where.state(job).word == "made":
        return f"again    snakemake {file}{options} --forcerun {file}"
    return f"make     snakemake {file}{options}"
