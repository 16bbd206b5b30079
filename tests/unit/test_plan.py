"""What tables need, before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixflow.config import load_config
from mixflow.models import build_model
from mixflow.runtime.errors import UserError
from mixflow.stages.plan import Plan, render

ROOT = Path(__file__).parents[2]
CONFIG = load_config(ROOT / "config.yaml")
REHEARSAL = load_config(ROOT / "config.yaml", ROOT / "rehearsal.yaml")


@pytest.mark.parametrize("config", [CONFIG, REHEARSAL], ids=["config", "rehearsal"])
def test_parameter_counts_are_those_of_the_networks(config) -> None:
    seen = set()
    for name in config.checkpoints:
        options = config.network_options(name)
        key = repr(options)
        if key in seen:
            continue
        seen.add(key)
        with torch.device("meta"):
            network = build_model(options.pop("family"), **options)
        assert config.num_parameters(name) == sum(parameter.numel() for parameter in network.parameters()), name


def test_parameter_counts_as_published() -> None:
    published = {"sit-b2-256": 131e6, "sit-xl2-256": 675e6, "rae-dhxl-256": 839e6, "rae-dhs-256": 196e6}
    for name, count in published.items():
        assert CONFIG.num_parameters(name) == pytest.approx(count, rel=0.005)


def test_the_plan_of_one_table() -> None:
    plan = Plan(CONFIG, ["imagenet512"])
    assert plan.names("train") == [("rae-dhxl-512-continued",), ("rae-dhxl-512-mixflow",)]
    assert plan.names("import_weights") == [("rae-dhs-512",), ("rae-dhxl-512",)]  # the guide too
    assert plan.latents() == {"imagenet-512-pixels": 1281167 * 3 * 512 * 512}
    assert plan.encoded_while_training() == ["imagenet-512-rae"]
    assert plan.samples() == 3 * 2 * 50_000 * (3 * 512 * 512 + 8)
    assert plan.resume_point() == 8 * 4 * CONFIG.num_parameters("rae-dhxl-512")
    text = render(plan, ["imagenet512"])
    assert "latents imagenet-512-pixels" in text
    assert "1.0 TB" in text
    assert "imagenet-512-rae are encoded while training, from imagenet-512-pixels" in text


def test_tables_share_their_jobs() -> None:
    one, other, both = (Plan(CONFIG, tables) for tables in (["main"], ["table4"], ["main", "table4"]))
    assert both.jobs == one.jobs | other.jobs
    assert len(both.jobs) < len(one.jobs) + len(other.jobs)


def test_an_unknown_table() -> None:
    with pytest.raises(UserError, match="'table9' is not one of the tables in the config; did you mean"):
        Plan(CONFIG, ["table9"])


def test_the_command_is_light() -> None:
    code = "import sys, mixflow.stages.plan; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("rehearsal", [False, True], ids=["config", "rehearsal"])
def test_it_counts_the_jobs_of_snakemake(tmp_path: Path, rehearsal: bool) -> None:
    tables = [*CONFIG.paper_tables(), "other_metrics", "digits"]
    command = ["snakemake", "--dry-run", *tables, "--directory", str(tmp_path), "--cores", "1"]
    command += ["--configfile", "rehearsal.yaml"] if rehearsal else []
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    after = answer.split("Job stats:")[1].splitlines()[3:]
    counts = {line.split()[0]: int(line.split()[1]) for line in after[: after.index("")]}
    total = counts.pop("total")
    plan = Plan(REHEARSAL if rehearsal else CONFIG, tables)
    assert plan.counts() == counts
    assert len(plan.jobs) == total
