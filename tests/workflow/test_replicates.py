"""A replicated table in miniature, through Snakemake: what is trained, what is shared, what runs again."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import ROOT, run_snakemake
from tests.workflow.test_pipeline import jobs

pytestmark = pytest.mark.slow

TABLE = {
    "replicates": {"training": [1, 2], "sampling": [100, 101]},
    "columns": [{"sampler": "digits-euler5", "metric": "fd"}, {"sampler": "digits-euler5", "metric": "variance_ratio"}],
    "rows": [
        {"checkpoint": "digits-base", "label": "base"},
        {"checkpoint": "digits-continued", "label": "continued", "against": "digits-base"},
    ],
    "figures": ["steps", "samples"],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    # The report asks about rows that are not here.
    path.write_text(yaml.safe_dump({"tables": {"digits_exposure_bias": TABLE}, "report": None}))
    return ["digits_exposure_bias", "--configfile", str(ROOT / "rehearsal.yaml"), str(path)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    result = run_snakemake(folder, *small)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def metrics(folder: Path, checkpoint: str, sampler: str) -> dict:
    return json.loads((folder / "results/metrics" / checkpoint / sampler / "metrics.json").read_text())


def test_rows_are_made_of_their_replicates(finished):
    made = {path.name for path in (finished / "results/checkpoints").iterdir()}
    assert made == {"digits-base", "digits-continued", "digits-continued-seed2"}
    row = json.loads((finished / "results/tables/digits_exposure_bias/digits-continued.json").read_text())
    names = [("digits-continued", "digits-euler5"), ("digits-continued-seed2", "digits-euler5-seed101")]
    controls = [("digits-base", "digits-euler5"), ("digits-base", "digits-euler5-seed101")]
    for cell in row["cells"]:
        own = [metrics(finished, *pair)["metrics"][cell["metric"]] for pair in names]
        theirs = [metrics(finished, *pair)["metrics"][cell["metric"]] for pair in controls]
        assert len({*own, *theirs}) == 4
        (pair,) = cell["paired"]
        assert cell["value"] == pytest.approx(np.mean(own))
        assert pair["differences"] == pytest.approx(np.subtract(own, theirs))
        assert pair["sampling_error"] > 0
        assert pair["sentence"]
    page = (finished / "results/tables/digits_exposure_bias.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "[" in (finished / "results/tables/digits_exposure_bias.md").read_text()


def test_replicates_differ_in_their_seeds_and_start_from_one_base(finished):
    records = [
        json.loads((finished / "results/checkpoints" / name / "run.json").read_text())
        for name in ("digits-continued", "digits-continued-seed2")
    ]
    assert [record["settings"]["train"]["seed"] for record in records] == [1, 2]
    assert len({record["parents"]["init"]["sha256"] for record in records}) == 1


def test_nothing_runs_again_and_another_seed_adds_one_replicate(finished, small, snakemake, tmp_path):
    assert jobs(snakemake(finished, *small, "--dry-run")) == set()
    third = tmp_path / "third.yaml"
    third.write_text(
        yaml.safe_dump(
            {"tables": {"digits_exposure_bias": {"replicates": {"training": [1, 2, 3], "sampling": [100, 101, 102]}}}}
        )
    )
    result = snakemake(finished, *small, str(third), "--dry-run")
    counts = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines() if len(line.split()) == 2}
    assert (counts["train"], counts["sample"], counts["evaluate"]) == ("1", "2", "2")
