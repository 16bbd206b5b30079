"""Where the cells of a table come from."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from mixflow.config import load_config
from mixflow.runtime.errors import UserError
from mixflow.runtime.progress import PROGRESS_FILE
from mixflow.stages.jobs import Job, Jobs
from mixflow.stages.plan import Plan
from mixflow.stages.where import Where, render
from tests.unit.test_plan import make

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "config.yaml")
BASE, ARM = Job("train", ("digits-base",)), Job("train", ("digits-mixflow-g0.8",))
SAMPLES, METRICS = (Job(rule, ("digits-mixflow-g0.8", "euler5")) for rule in ("sample", "evaluate"))


def states(root: Path, *jobs: Job) -> list[str]:
    where = Where(CONFIG, "digits", root)
    return [str(where.state(job)) for job in jobs]


def make_all(root: Path, *jobs: Job) -> None:
    for job in jobs:
        make(Plan(CONFIG, ["digits"]), root, job)


def test_what_is_not_made_waits_or_is_missing(tmp_path: Path) -> None:
    cache = Job("cache_latents", ("digits",))
    assert states(tmp_path, cache, BASE, ARM) == [
        "missing", "waiting: for latents digits", "waiting: for weights digits-base, latents digits",
    ]  # fmt: skip
    make_all(tmp_path, cache, BASE)
    assert states(tmp_path, cache, BASE, ARM, SAMPLES) == [
        "made", "made", "missing: all that it needs is made", "waiting: for weights digits-mixflow-g0.8",
    ]  # fmt: skip
    row = Job("row", ("digits", "digits-base"))
    assert states(tmp_path, row) == ["waiting: for 6 metrics"]


def test_what_other_settings_made_is_stale_and_all_that_came_of_it(tmp_path: Path) -> None:
    make_all(tmp_path, *Plan(CONFIG, ["results/metrics/digits-mixflow-g0.8/euler5/metrics.json"]).left)
    assert states(tmp_path, BASE, ARM, SAMPLES, METRICS) == ["made"] * 4
    record = tmp_path / "results/checkpoints/digits-mixflow-g0.8/run.json"
    told = json.loads(record.read_text())
    told["settings"]["train"] |= {"gamma": 0.7, "num_steps": 500}
    record.write_text(json.dumps(told))
    assert states(tmp_path, BASE, ARM, SAMPLES, METRICS) == [
        "made",
        "stale: made with train.gamma 0.7 instead of 0.8, train.num_steps 500 instead of 600",
        "stale: made from stale weights digits-mixflow-g0.8",
        "stale: made from stale samples digits-mixflow-g0.8/euler5",
    ]


def test_other_weights_in_the_place_of_those_that_were_sampled(tmp_path: Path) -> None:
    make_all(tmp_path, *Plan(CONFIG, ["results/metrics/digits-mixflow-g0.8/euler5/metrics.json"]).left)
    record = tmp_path / "results/checkpoints/digits-mixflow-g0.8/run.json"
    told = json.loads(record.read_text())
    record.write_text(json.dumps({**told, "outputs": {"model.safetensors": "trained anew"}}))
    file = "results/checkpoints/digits-mixflow-g0.8/model.safetensors"
    assert states(tmp_path, ARM, SAMPLES) == ["made", f"stale: its train '{file}' are others now"]


@pytest.mark.parametrize(("age", "word"), [(3, "running"), (9000, "stopped")])
def test_work_on_a_cell(tmp_path: Path, age: float, word: str) -> None:
    folder = tmp_path / "scratch/train/digits-mixflow-g0.8/0123456789abcdef"
    folder.mkdir(parents=True)
    written = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)
    sign = {
        "name": "digits-mixflow-g0.8", "state": "running", "unit": "step", "done": 300, "total": 600, "first": 0,
        "seconds": 10.0, "images_per_second": 800.0, "host": "node7", "slurm_job": None, "written": written.isoformat(),
    }  # fmt: skip
    (folder / PROGRESS_FILE).write_text(json.dumps(sign))
    (found,) = states(tmp_path, ARM)
    assert found.startswith(f"{word}: step 300/600 on node7, last sign of life ")


def test_the_text(tmp_path: Path) -> None:
    make_all(tmp_path, *Plan(CONFIG, ["results/metrics/digits-mixflow-g0.8/euler5/metrics.json"]).left)
    text = render(Where(CONFIG, "digits", tmp_path), "digits-mixflow-g0.8", ["config.yaml", "more.yaml"])
    assert "digits/digits-mixflow-g0.8  MixFlow 0.8" in text
    assert "euler50: FD, FD held-out, accuracy, variance ratio" in text
    assert (
        "entries  checkpoints.digits-mixflow-g0.8, checkpoints.digits-base, latents.digits, samplers.euler5, "
        "references.digits, extractors.digits-classifier"
    ) in text
    metrics = "results/metrics/digits-mixflow-g0.8/{}/metrics.json"
    made, other = metrics.format("euler5"), metrics.format("euler10")
    assert f"again    snakemake {made} --cores all --configfile more.yaml --forcerun {made}\n" in text
    assert f"make     snakemake {other} --cores all --configfile more.yaml\n" in text


def test_guides_further_references_and_quoted_rows() -> None:
    text = render(Where(CONFIG, "other_metrics"), "sit-xl2-256", ["config.yaml"])
    assert "results/metrics/sit-xl2-256/heun250-cfg1.5/dinov2-256/metrics.json" in text
    assert "references.dinov2-256, extractors.dinov2-l" in text
    text = render(Where(CONFIG, "imagenet512"), "rae-dhxl-512", ["config.yaml"])
    assert "samplers.rae-euler50-512-ag1.5, checkpoints.rae-dhs-512" in text
    text = render(Where(CONFIG, "table8"), None, ["config.yaml"])
    assert "quoted from the paper, nothing is run: var, mar" in text


def test_unknown_names(mixflow) -> None:
    with pytest.raises(UserError, match="'digit' is not one of the tables"):
        Where(CONFIG, "digit")
    result = mixflow("where", "digits", "digits-bas", "--config", ROOT / "config.yaml")
    assert result.returncode == 2
    assert "'digits-bas' is not a row of table 'digits'; did you mean 'digits-base'?" in result.stderr


def test_every_file_of_every_table_is_a_target() -> None:
    jobs = Jobs(CONFIG, ["paper", "digits", "other_metrics", "authors"])
    for job in jobs:
        for output in jobs.outputs(job):
            if job.rule not in ("stand_ins", "import_weights", "train") or not output.endswith("losses.json"):
                assert Jobs(CONFIG, [output]).targets == [job]
