"""What runs again after a change: the table of docs/planning.md, each line of it tried as a dry run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from mixflow.config import load_config
from mixflow.stages.plan import Plan
from tests.conftest import ROOT
from tests.workflow.house import SAMPLES, SMALL, WEIGHTS, House, copy_of, job_counts

pytestmark = pytest.mark.slow


class Change(NamedTuple):
    """One line of the table: what is changed, by which edit of small.yaml or of the clone, and what runs again."""

    what: str
    edit: dict[str, Any] | Callable[[Path], Any] | tuple[str, ...]  # entries, a function of the clone, or arguments
    jobs: dict[str, int]

    @property
    def line(self) -> str:
        """As docs/planning.md has it."""
        jobs = ", ".join(f"{number} {rule}" for rule, number in self.jobs.items()) or "nothing"
        return f"| {self.what} | {jobs} |"


def append(file: str, text: str) -> Callable[[Path], Any]:
    """Return an edit that adds text to the end of a file."""

    def edit(clone: Path) -> None:
        with open(clone / file, "a") as opened:
            opened.write(text)

    return edit


def substitute(file: str, pattern: str, text: str) -> Callable[[Path], Any]:
    """Return an edit that replaces the one place that fits a pattern."""

    def edit(clone: Path) -> None:
        old = (clone / file).read_text()
        new, number = re.subn(pattern, text, old, count=1, flags=re.MULTILINE)
        assert number == 1
        (clone / file).write_text(new)

    return edit


def touch(pattern: str) -> Callable[[Path], Any]:
    """Return an edit that gives files the time of now."""
    return lambda clone: [os.utime(path) for path in clone.glob(pattern) if path.is_file()]


def delete(*files: str) -> Callable[[Path], Any]:
    return lambda clone: [(clone / file).unlink() for file in files]


def table(**changed: Any) -> dict[str, Any]:
    return {"tables": {"digits": {**SMALL["tables"]["digits"], **changed}}}


def rows(**changed: Any) -> list[dict[str, Any]]:
    first, second = SMALL["tables"]["digits"]["rows"]
    return [first, {**second, **changed}]


CHANGES = [
    Change(
        "steps, solver or guidance of one sampler",
        {"samplers": {"euler5": {"num_steps": 4}}},
        {"sample": 2, "evaluate": 2, "row": 2, "figure": 1, "render": 1},
    ),
    Change(
        "the seed of one sampler",
        {"samplers": {"euler10": {"seed": 7}}},
        {"sample": 2, "evaluate": 2, "row": 2, "figure": 2, "render": 1},
    ),
    Change(
        "the seed, gamma or another training value of one arm",
        {"checkpoints": {"digits-mixflow-g0.8": {"train": {"seed": 2}}}},
        {"train": 1, "sample": 2, "evaluate": 2, "row": 1, "figure": 3, "render": 1},
    ),
    Change(
        "the same of the checkpoint that others start from",
        {"checkpoints": {"digits-base": {"train": {"learning_rate": 1.0e-3}}}},
        {"train": 2, "sample": 4, "evaluate": 4, "row": 2, "figure": 3, "render": 1},
    ),
    Change(
        "the classifier that compares images",
        {"extractors": {"digits-classifier": {"seed": 5}}},
        {"train_extractor": 1, "make_reference": 1, "evaluate": 4, "row": 2, "figure": 1, "render": 1},
    ),
    Change(
        "an entry that the table does not use",
        {"samplers": {"euler50": {"num_steps": 40}}, "checkpoints": {"digits-matched": {"train": {"gamma": 0.5}}}},
        {},
    ),
    Change("the label of one row", table(rows=rows(label="MixFlow")), {"row": 1, "figure": 3, "render": 1}),
    Change(
        "one row more, whose samples are there",
        table(rows=[*rows(), {"checkpoint": "digits-base", "name": "again", "label": "base again"}]),
        {"row": 1, "figure": 3, "render": 1},
    ),
    Change("a note or the title of the table", table(notes=["Another note."]), {"render": 1}),
    Change("a comment in config.yaml", append("config.yaml", "# a comment\n"), {}),
    Change("a comment, or code, in mixflow", append("mixflow/training/loop.py", "# a comment\n"), {}),
    Change("a comment in the rules", append("workflow/rules/train.smk", "# a comment\n"), {}),
    Change(
        "the image, by name or digest",
        substitute("config.yaml", "^image: .*$", f"image: docker://x/y@sha256:{'0' * 64}"),
        {},
    ),
    Change("file times of weights", touch("results/checkpoints/**/model.safetensors"), {}),
    Change("file times of samples", touch("results/samples/**/samples.npz"), {}),
    Change("file times of all results", touch("results/**/*"), {}),
    Change("more images a pass, or GPUs, by --set-resources", ("--set-resources", "sample:batch=7", "train:gpu=2"), {}),
    Change("fewer cores, more memory", ("--cores", "1", "--set-resources", "train:mem_mb=9999"), {}),
    Change("deleted weights or samples, whose metrics are there", delete(WEIGHTS, SAMPLES), {}),
]


@pytest.mark.parametrize("change", [change for change in CHANGES if change.jobs], ids=lambda change: change.what)
def test_what_runs_again(house: House, tmp_path: Path, change: Change) -> None:
    clone = copy_of(house, tmp_path)
    assert isinstance(change.edit, dict)
    (clone.folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, **change.edit}))
    found = clone.left()
    assert found.pop("digits") == 1  # the target itself
    assert found == change.jobs
    # The plan says the same, but for figures, whose files do not tell how they were made.
    config = load_config(*(clone.folder / name for name in ("config.yaml", "rehearsal.yaml", "small.yaml")))
    planned = Plan(config, ["digits"], root=clone.folder).counts()
    for counts in (planned, found):
        counts.pop("figure", None)
    assert planned == {**found, "digits": 1}


def test_what_makes_nothing_run_again(house: House, tmp_path: Path) -> None:
    """All such changes at once."""
    clone = copy_of(house, tmp_path)
    entries, arguments = dict(SMALL), []
    for change in CHANGES:
        if change.jobs:
            continue
        if isinstance(change.edit, dict):
            entries |= change.edit
        elif callable(change.edit):
            change.edit(clone.folder)
        else:
            arguments += change.edit
    assert len(arguments) == 7
    (clone.folder / "small.yaml").write_text(yaml.safe_dump(entries))
    # Options that are given twice count once: those of --set-resources are one list.
    resources = [argument for argument in arguments if ":" in argument]
    assert clone.left("--cores", "1", "--set-resources", *resources) == {}


def test_a_copy_with_new_file_times_is_finished_too(house: House, tmp_path: Path) -> None:
    """As `cp -r` makes one: Snakemake knows small files by their contents, and large ones by the record beside them."""
    shutil.copytree(house.folder, tmp_path / "clone", symlinks=True, copy_function=shutil.copyfile)
    assert House(tmp_path / "clone").left() == {}


def test_a_copy_without_snakemakes_memory_is_finished_where_it_keeps_its_file_times(
    house: House, tmp_path: Path
) -> None:
    """As `cp -a` or `rsync -a` of results/ makes one in a fresh clone."""
    clone = copy_of(house, tmp_path)
    shutil.rmtree(clone.folder / ".snakemake")
    assert clone.left() == {}


def test_the_table_in_the_documentation() -> None:
    text = (ROOT / "docs/planning.md").read_text()
    assert [change.line for change in CHANGES if change.line not in text] == []


def test_the_commands_that_where_prints(house: House, tmp_path: Path) -> None:
    """To make a metric again, and to make one that is missing."""
    clone = copy_of(house, tmp_path)
    file = "results/metrics/digits-base/euler10/metrics.json"
    (clone.folder / file).unlink()
    lines = [line.strip() for line in clone.mixflow("where", "digits", "digits-base").stdout.splitlines()]
    (again,) = [line for line in lines if line.startswith("again    snakemake results/metrics")]
    (make,) = [line for line in lines if line.startswith(f"make     snakemake {file}")]
    for line in (again, make):
        result = clone.run(*shlex.split(line)[1:], "--dry-run")
        assert job_counts(result.stdout + result.stderr) == {"evaluate": 1}


def test_the_report_is_one_page(house: House, tmp_path: Path) -> None:
    result = house.snakemake("digits", "--report", str(tmp_path / "report.html"))
    assert result.returncode == 0, result.stderr[-3000:]
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?https?:", page)
    for name in ("digits.html", "samples.png", "steps.png", "losses.png", '"rule": "train_extractor", "runtime": '):
        assert name in page
