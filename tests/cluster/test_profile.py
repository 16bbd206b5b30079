"""What jobs ask a cluster for, from dry runs; faults.py tries it on a real one."""

import re
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
IMAGENET, DIGITS = (
    "results/metrics/sit-xl2-256-mixflow/heun250/metrics.json",
    "results/metrics/digits-base/euler5/metrics.json",
)


def dry_run(*arguments):
    """Return {rule: {resource: value}} of a dry run, from a folder without results; values are text."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {}
    for block in re.split(r"\n(?=(?:local)?rule )", result.stdout + result.stderr):
        rule, resources = re.match(r"(?:local)?rule (\w+):", block), re.search(r"resources: (.*)", block)
        if rule and resources:
            found[rule[1]] = dict(pair.split("=", 1) for pair in resources[1].split(", "))
    return found


@pytest.fixture(scope="module")
def on_slurm(tmp_path_factory):
    return dry_run(IMAGENET, "--profile", "slurm", "--directory", tmp_path_factory.mktemp("slurm"))


def test_imagenet_asks_a_cluster_for_the_gpus_of_one_node(on_slurm):
    for rule, gpus in {
        "cache_latents": "8",
        "train": "8",
        "sample": "8",
        "evaluate": "1",
        "make_reference": "1",
    }.items():
        asked = on_slurm[rule]
        assert (asked["gpu"], asked["nodes"], asked["cpus_per_gpu"]) == (gpus, "1", "8"), rule
        assert "tasks" not in asked  # one process of ours per GPU, not one of Slurm's
        assert int(asked["runtime"]) >= 240
        assert int(asked["mem_mb"]) >= 64000


def test_digits_ask_no_machine_for_gpus(tmp_path):
    for where in (["--profile", "slurm"], ["--cores", "2", "--resources", "gpu=8"]):
        for rule, asked in dry_run(DIGITS, *where, "--directory", tmp_path).items():
            assert asked.get("gpu", "0") == "0", rule


def test_without_a_cluster_a_job_takes_the_gpus_that_are_counted(tmp_path):
    assert dry_run(IMAGENET, "--cores", "2", "--directory", tmp_path)["train"]["gpu"] == "0"
    asked = dry_run(IMAGENET, "--cores", "2", "--resources", "gpu=2", "--directory", tmp_path)
    assert {asked[rule]["gpu"] for rule in ("train", "sample", "evaluate")} == {"2"}


def test_profiles_of_ones_own_as_the_page_shows_them(on_slurm, tmp_path):
    page = (ROOT / "docs/slurm.md").read_text()
    by_gpu, by_node = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, text in {"by-gpu": by_gpu, "by-node": by_node}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "profile.v9+.yaml").write_text(text)
    where = ["--directory", tmp_path, "--profile", "slurm", "--profile"]
    asked = dry_run(IMAGENET, *where, tmp_path / "by-gpu")
    assert (asked["train"]["gpu"], asked["train"]["cpus_per_gpu"]) == ("4", "24")
    assert (asked["train"]["slurm_partition"], asked["train"]["slurm_account"]) == ("gpu", "my-project")
    assert asked["train"]["runtime"] == on_slurm["train"]["runtime"]
    assert asked["evaluate"]["gpu"] == "1"
    asked = dry_run(IMAGENET, *where, tmp_path / "by-node")["train"]
    assert (asked["gpu"], asked["gres"], asked["cpus_per_task"]) == ("0", "gpu:a100:4", "96")


@pytest.mark.parametrize("profile", ["slurm", "apptainer"])
def test_every_value_of_the_profiles_has_its_reason(profile):
    text = (ROOT / f"profiles/{profile}/profile.v9+.yaml").read_text()
    for key in yaml.safe_load(text):
        before = text[: text.index(f"\n{key}:") + 1].rstrip("\n").splitlines()[-1]
        assert before.startswith("#") or key in ("executor", "software-deployment-method"), key
    assert not {"default-resources", "set-resources"} & set(yaml.safe_load(text))
