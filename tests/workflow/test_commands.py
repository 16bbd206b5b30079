"""`doctor`, `inspect` and `--help`, as a user calls them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from mixflow.evaluation import Classifier, save_classifier
from mixflow.models import build_model, save_model
from mixflow.runtime.files import write_json
from mixflow.stages.inspect import describe
from tests.conftest import ROOT

OPTIONS = dict(
    hidden_size=48, depth=2, num_heads=3, patch_size=8, learn_sigma=False, label_dropout=0.1,
    input_size=32, in_channels=1, num_classes=10,
)  # fmt: skip


def test_doctor_finds_this_machine_fit(tmp_path, mixflow):
    result = mixflow("doctor")
    assert result.returncode == 0, result.stdout
    assert "no problems found" in result.stdout
    findings = json.loads(mixflow("doctor", "--json").stdout)
    assert findings["problems"] == []
    assert findings["parts"]["torch"]
    assert findings["cpus"] >= 1


def test_inspect_says_what_each_file_is(tmp_path, mixflow):
    net = build_model("sit", **OPTIONS)
    save_model(tmp_path / "model.safetensors", net.state_dict(), net.options)
    save_classifier(tmp_path / "classifier.safetensors", Classifier(1, 10, width=8, num_features=16))
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.arange(3))
    assert mixflow("cache-latents", "digits", "--config", ROOT / "config.yaml").returncode == 0
    write_json(tmp_path / "losses.json", {"step": [10, 20], "loss": [0.5, 0.25]})
    weights = describe(tmp_path / "model.safetensors")
    assert {key: weights[key] for key in OPTIONS} == OPTIONS
    assert weights["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert describe(tmp_path / "classifier.safetensors")["kind"] == "feature network"
    assert describe(tmp_path / "classifier.safetensors")["num_features"] == 16
    samples = describe(tmp_path / "samples.npz")
    assert (samples["images"], samples["shape"], samples["labels"]) == (3, [8, 8, 3], True)
    cache = describe(tmp_path / "results/latents/digits")
    assert cache["images"] == {"train": 1437, "held_out": 360}
    assert describe(tmp_path / "results/latents/digits/run.json")["stage"] == "cache-latents"
    assert describe(tmp_path / "losses.json")["last_loss"] == 0.25
    shard = next((tmp_path / "results/latents/digits").glob("held_out*.safetensors"))
    assert describe(shard)["images"] == 360
    result = mixflow("inspect", "model.safetensors", "samples.npz")
    assert result.returncode == 0
    assert "hidden_size: 48" in result.stdout
    assert "kind: samples" in result.stdout


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.safetensors", b"not a safetensors file at all", "truncated or is not a safetensors file"),
        ("a.npz", b"PK\x03\x04 cut", "not a whole .npz archive"),
        ("a.json", b"{", "not valid JSON"),
        ("b.json", b'{"hello": 1}', "none of this project's results"),
        ("a.txt", b"x", "an ending this command does not know"),
    ],
)
def test_inspect_refuses_what_it_cannot_read_in_one_sentence(tmp_path, mixflow, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    result = mixflow("inspect", name)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_help_of_every_verb(mixflow):
    text = mixflow("--help").stdout
    verbs = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line.split()]
    wanted = {"cache-latents", "train", "import-weights", "sample", "train-extractor", "make-reference", "evaluate"}
    wanted |= {"download", "export-weights", "convert-weights", "make-stand-ins"}
    assert wanted | {"tables", "inspect", "doctor"} <= set(verbs)
    for verb in wanted:
        assert mixflow(verb, "--help").returncode == 0


@pytest.mark.parametrize("arguments", [("tables", "preview", "digits"), ("plan", "digits")])
def test_a_reader_that_has_seen_enough_ends_the_command(tmp_path, arguments):
    """As `| head -1`: no traceback, no word of a bug."""
    readable, writable = os.pipe()
    os.close(readable)
    command = [sys.executable, "-m", "mixflow", *arguments, "--config", str(ROOT / "config.yaml")]
    result = subprocess.run(command, cwd=tmp_path, stdout=writable, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writable)
    assert result.returncode == 0
    assert result.stderr == ""


def test_settings_that_are_not_json_are_told(mixflow):
    result = mixflow("train", "digits-base", "--settings", "{")
    assert result.returncode == 2
    assert "--settings is not valid JSON" in result.stderr


def test_a_parent_that_was_not_made_is_named(mixflow):
    result = mixflow("train", "digits-matched", "--config", ROOT / "config.yaml")
    assert result.returncode == 2
    assert "the parent of 'digits-matched' 'results/checkpoints/digits-base/model.safetensors' does not exist" in (
        result.stderr
    )


def test_a_table_can_be_looked_at_before_it_is_whole(tmp_path, mixflow):
    metrics = tmp_path / "results/metrics/sit-xl2-256/heun50/metrics.json"
    write_json(metrics, {"metrics": {"fid": 9.5}, "num_images": 50_000, "protocol": {}, "parents": {}})
    result = mixflow("tables", "preview", "table4", "--config", ROOT / "config.yaml")
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("| SiT-XL/2, 256 |"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[1] == "9.50<br>(paper 9.73, −0.23, within tolerance)"
    assert all(cell.startswith("–<br>(paper ") for index, cell in enumerate(cells) if index != 1)
    assert "not run yet" in result.stdout
    assert not (tmp_path / "results/tables").exists()


def test_a_file_with_code_is_converted_only_when_trusted(tmp_path, mixflow):
    import torch

    # A training checkpoint that keeps a path among its settings: to read one, code must run.
    torch.save({"ema": {"weight": torch.ones(2)}, "args": ROOT}, tmp_path / "old.pt")
    refused = mixflow("inspect", "old.pt")
    assert refused.returncode == 2
    command = refused.stderr.split("`")[1].removeprefix("python -m ").split()
    assert command[:2] == ["mixflow", "convert-weights"]
    assert mixflow("convert-weights", "old.pt", "--out", "new.safetensors").returncode == 2
    assert not (tmp_path / "new.safetensors").exists()
    trusted = mixflow(*command[1:])
    assert trusted.returncode == 0, trusted.stderr
    assert "any code in it runs now" in trusted.stderr
    assert load_file(tmp_path / "old.safetensors")["weight"].tolist() == [1, 1]
