"""Bad input, as a user meets it: one sentence, a non-zero exit, and no job started."""

import json
import re

import pytest
import yaml

from mixflow.models import build_model, save_model
from tests.conftest import ROOT

TINY = dict(hidden_size=48, depth=1, num_heads=3, patch_size=8, learn_sigma=False, label_dropout=0.1)


def overlay(tmp_path, values):
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(values) if isinstance(values, dict) else values)
    return path


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"samplers": {"euler50": {"cgf": 2.0}}}, "samplers.euler50.*cgf"),
        ({"checkpoints": {"x": {"extends": "digits-baze"}}}, "digits-baze.*did you mean 'digits-base'"),
        ({"checkpoints": {"digits-matched": {"train": {"init": "digits-baze"}}}}, "did you mean 'digits-base'"),
        ({"checkpoints": {"digits-mixflow-g0.8": {"train": {"gamma": 1.3}}}}, r"digits-mixflow-g0.8.*gamma.*1\.3"),
        ("checkpoints: {digits-base: {train: {learning_rate: 1e-4x}}}", "digits-base.*learning_rate.*1e-4x"),
        ("checkpoints: {digits-base: {train: {learning_rate: 1e-4}}}", r"learning_rate.*1\.0e-4"),
        ({"samplers": {"euler5": {"num_steps": 0}}}, "samplers.euler5.*num_steps.*0"),
        ({"tables": {"digits": {"rows": [{"checkpoint": "digits-mist", "label": "x"}]}}}, "tables.digits.*digits-mist"),
        ({"checkpoints": {"digits-base": {"train": {"init": "digits-matched"}}}}, "digits-base.*digits-matched"),
    ],
    ids=["unknown key", "misspelt extends", "misspelt init", "gamma", "text rate", "1e-4", "steps", "row", "cycle"],
)
def test_config_mistakes_stop_snakemake_and_the_commands(tmp_path, snakemake, mixflow, values, sentence):
    path = overlay(tmp_path, values)
    result = snakemake(tmp_path, "--configfile", path, "--dry-run")
    assert result.returncode != 0
    said = result.stdout + result.stderr  # a dry run talks on stdout
    (line,) = [line for line in said.splitlines() if line.startswith("mixflow: ")]
    assert re.search(sentence, line), line
    assert "Traceback (most recent call last)" not in said
    result = mixflow("train", "digits-matched", "--config", ROOT / "config.yaml", path)
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert re.search(sentence, result.stderr), result.stderr


def test_weights_of_another_architecture(tmp_path, snakemake):
    """An entry says SiT-S/2; its file holds a smaller network."""
    net = build_model("sit", **TINY, input_size=32, in_channels=1, num_classes=10)
    save_model(tmp_path / "mine.safetensors", net.state_dict(), net.options)
    model = {"family": "sit", "size": "S/8", "learn_sigma": False, "label_dropout": 0.1}
    weights = {"file": str(tmp_path / "mine.safetensors"), "latents": "digits", "model": model}
    path = overlay(tmp_path, {"checkpoints": {"mine": {"weights": weights}}})
    target = "results/checkpoints/mine/model.safetensors"
    result = snakemake(tmp_path, target, "--configfile", path, "--dry-run")
    assert result.returncode != 0
    said = result.stdout + result.stderr
    assert "hidden_size 48" in said
    assert "hidden_size 384" in said
    assert "Traceback (most recent call last)" not in said

    weights["model"] = {"family": "sit", **TINY}
    path = overlay(tmp_path, {"checkpoints": {"mine": {"weights": weights}}})
    result = snakemake(tmp_path, target, "--configfile", path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "results/checkpoints/mine/run.json").read_text())["stage"] == "import-weights"


def test_a_missing_weights_file(tmp_path, snakemake):
    model = {"family": "sit", "size": "S/8", "learn_sigma": False, "label_dropout": 0.1}
    weights = {"file": "nowhere.safetensors", "latents": "digits", "model": model}
    path = overlay(tmp_path, {"checkpoints": {"mine": {"weights": weights}}})
    result = snakemake(tmp_path, "results/checkpoints/mine/model.safetensors", "--configfile", path, "--dry-run")
    assert result.returncode != 0
    assert "'nowhere.safetensors' does not exist: put the weights there" in result.stdout + result.stderr


def test_a_truncated_shard_stops_before_any_job(tmp_path, snakemake, mixflow):
    config = ["--config", ROOT / "config.yaml", ROOT / "rehearsal.yaml"]
    assert mixflow("cache-latents", "digits", *config).returncode == 0
    shard = sorted((tmp_path / "results/latents/digits").glob("train-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    result = snakemake(tmp_path, "--configfile", ROOT / "rehearsal.yaml", "--dry-run")
    assert result.returncode != 0
    assert shard.name in result.stdout + result.stderr
    assert "delete" in result.stdout + result.stderr
    result = mixflow("train", "digits-base", *config)
    assert result.returncode == 2
    assert shard.name in result.stderr
    assert result.stderr.strip().count("\n") == 0
