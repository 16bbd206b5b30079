"""Slow Flow through Snakemake: digits in miniature from nothing, and what runs again after an edit."""

from __future__ import annotations

import json
import sys

import pytest
import yaml
from PIL import Image

from mixflow.stages.slow_flow import BLOCK
from tests import forked
from tests.unit.test_slow_flow import same
from tests.workflow import house as houses

pytestmark = pytest.mark.slow

SMALL = {
    "figures": {
        "digits_slow_flow": {
            "arms": [
                {"checkpoint": "digits-base", "label": "base"},
                {"checkpoint": "digits-mixflow-g0.8", "label": "MixFlow 0.8"},
            ]
        }
    },
    "samplers": {"slow-flow-euler50": {"num_steps": 4, "num_images": 20}},
    "clocks": {"digits": {"num_steps": 10}},
    "checkpoints": {"digits-base": {"train": {"num_steps": 10}}, "digits-continued": {"train": {"num_steps": 5}}},
}
ALONE = "results/slow_flow/digits-mixflow-g0.8/slow-flow-euler50/slow_flow"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    house = houses.build(tmp_path_factory.mktemp("slow-flow") / "clone")
    (house.folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    result = house.snakemake("digits_slow_flow", f"{ALONE}.png")
    assert result.returncode == 0, result.stdout + result.stderr
    return house


def test_digits_from_nothing_to_the_figure(finished):
    for name in ("results/slow_flow/digits_slow_flow.png", f"{ALONE}.png"):
        with Image.open(finished.folder / name) as image:
            assert image.format == "PNG"
            assert min(image.size) > 500
    found = json.loads((finished.folder / f"{ALONE}.json").read_text())
    assert found["num_images"] == 20
    assert set(found["readings"]["from_noise"]["nulls"]) == {"gaussian", "class_gaussian"}
    assert finished.left("digits_slow_flow") == {}
    assert not list((finished.folder / "scratch").rglob("*.safetensors"))


def test_only_what_depends_on_an_edit_runs_again(finished, tmp_path):
    house = houses.copy_of(finished, tmp_path)

    def left_after(edit):
        (house.folder / "small.yaml").write_text(yaml.safe_dump(_overlaid(SMALL, edit)))
        return house.left("digits_slow_flow")

    # Labels and decoding play no part in Slow Flow.
    sampler = {"to_uint8": "truncate", "labels": "random"}
    assert left_after({"samplers": {"slow-flow-euler50": sampler}}) == {}
    measured = {"slow_flow": 2, "slow_flow_comparison": 1, "digits_slow_flow": 1}
    assert left_after({"slow_flow": {"start": 0.1}}) == measured
    assert left_after({"clocks": {"digits": {"seed": 1}}}) == {"train_clock": 1, **measured}
    drawn = {"slow_flow_comparison": 1, "digits_slow_flow": 1}
    assert left_after({"figures": {"digits_slow_flow": {"title": "another"}}}) == drawn


def test_two_processes_measure_what_one_does(finished, tmp_path):
    """Two blocks of images, the second one ragged; sums may round in another order."""
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"samplers": {"slow-flow-euler50": {"num_images": BLOCK + 7}}}))
    configs = ["--config", "config.yaml", "rehearsal.yaml", "small.yaml", more]
    made = []
    for processes in (1, 2):
        made.append(tmp_path / str(processes) / "slow_flow.json")
        options = [*("--out", made[-1]), *("--scratch", tmp_path / f"scratch{processes}"), *configs]
        command = ["slow-flow", "digits-mixflow-g0.8", "slow-flow-euler50", *options]
        for process in forked.together(processes, *command, cwd=finished.folder):
            assert process.returncode == 0, process.stderr[-3000:]
    record = json.loads((made[1].parent / "run.json").read_text())
    assert record["machine"]["processes"] == 2
    assert record["measured"]["images_this_attempt"] == BLOCK + 7
    same(*made, 2e-5)


def test_plan_and_where_of_files(finished):
    plan = finished.mixflow("plan", "digits_slow_flow")
    assert plan.returncode == 0, plan.stderr
    assert "nothing to do" in plan.stdout
    for file in (f"{ALONE}.json", "results/clocks/digits/model.safetensors"):
        told = finished.run(sys.executable, "-m", "mixflow", "inspect", file)
        assert told.returncode == 0, told.stderr
        assert "Slow Flow" in told.stdout or "learned clock" in told.stdout


def _overlaid(base, over):
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlaid(merged[key], value) if both else value
    return merged
