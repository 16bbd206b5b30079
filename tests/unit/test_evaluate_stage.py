"""The stages from sample files to metrics.json, and weights taken into the pipeline."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mixflow.evaluation import (
    Inception,
    frechet_distance,
    inception_score,
    moments,
    precision_recall,
    tiny_inception_state_dict,
)
from mixflow.evaluation.references import METRICS
from mixflow.models import build_model, load_model
from mixflow.runtime.downloads import download
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import file_sha256
from mixflow.stages.evaluate import evaluate, make_reference
from mixflow.stages.import_weights import import_weights

SETTINGS = {
    "checkpoint": "sit",
    "sampler_name": "heun",
    "sampler": {"solver": "heun", "labels": "balanced"},
    "reference_name": "adm",
    "extractor_name": "inception",
    "extractor": {"kind": "inception", "tf32": False},
}
REFERENCE = {
    "reference_name": "adm",
    "reference": {"download": "adm-reference", "extractor": "inception"},
    "extractor": {"kind": "inception", "tf32": False},
}


def images(n, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def record(name, file):
    """The record of a download from the folder that holds `file`."""
    return download(name, {"folder": str(file.parent), "files": [file.name]}, out=file.parent / f"{name}.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Paths by role: extractor and source are records of downloads, reference is what make_reference wrote."""
    folder = tmp_path_factory.mktemp("made")
    state_dict = tiny_inception_state_dict(seed=1, width_divisor=32)
    torch.save(state_dict, folder / "inception.pth")
    pool, spatial, _ = Inception(state_dict)(images(16, seed=1))
    (mu, sigma), (mu_s, sigma_s) = moments(pool), moments(spatial)
    statistics = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    np.savez(folder / "VIRTUAL.npz", arr_0=images(16, seed=1), **{name: x.numpy() for name, x in statistics.items()})
    np.savez(folder / "samples.npz", arr_0=images(12), arr_1=np.arange(12))
    paths = {
        "samples": folder / "samples.npz",
        "extractor": record("inception", folder / "inception.pth"),
        "source": record("adm-reference", folder / "VIRTUAL.npz"),
        "reference": folder / "reference" / "reference.safetensors",
    }
    make_reference(
        REFERENCE,
        source=paths["source"],
        extractor=paths["extractor"],
        out=paths["reference"],
        scratch=folder / "scratch",
    )
    return paths


def run(made, out, **other):
    parts = {role: made[role] for role in ("samples", "reference", "extractor")} | other
    evaluate(SETTINGS, **parts, out=out, scratch=out.parent / "scratch")
    return json.loads(out.read_text())


def test_samples_get_every_metric(made, tmp_path):
    result = run(made, tmp_path / "metrics.json")
    assert list(result) == [
        "metrics", "standard_errors", "group_influences", "num_images", "labels", "warnings", "protocol", "parents",
    ]  # fmt: skip
    assert set(result["metrics"]) == {name for name, metric in METRICS.items() if metric.kind == "inception"}
    assert set(result["standard_errors"]) == set(result["metrics"])
    network = Inception(torch.load(made["extractor"].parent / "inception.pth", weights_only=True))
    real, (pool, spatial, logits) = network(images(16, seed=1)), network(images(12))
    assert result["metrics"]["fid"] == pytest.approx(frechet_distance(*moments(real[0]), *moments(pool)), rel=1e-4)
    assert result["metrics"]["sfid"] == pytest.approx(frechet_distance(*moments(real[1]), *moments(spatial)), rel=1e-4)
    assert result["metrics"]["is"] == pytest.approx(inception_score(logits), rel=1e-6)
    for mode, suffix in (("adm", ""), ("exact", "_exact")):
        found = result["metrics"][f"precision{suffix}"], result["metrics"][f"recall{suffix}"]
        assert found == precision_recall(real[0], pool, k=3, mode=mode)
    assert result["num_images"] == 12
    assert result["protocol"].items() >= SETTINGS.items()
    assert result["protocol"]["measurement"]["features"] == "float32, no TF32"
    assert "100 subsets of 12" in result["protocol"]["measurement"]["kid"]
    assert result["parents"] == {
        "samples": file_sha256(made["samples"]),
        "reference": file_sha256(made["reference"]),
        "extractor": file_sha256(made["extractor"].parent / "inception.pth"),  # the weights, not their record
    }
    assert json.loads((tmp_path / "run.json").read_text())["stage"] == "evaluate"
    assert any("rank-deficient" in warning for warning in result["warnings"])


def test_the_same_inputs_give_the_same_bytes(made, tmp_path):
    run(made, tmp_path / "a/metrics.json")
    run(made, tmp_path / "b/metrics.json")
    assert (tmp_path / "a/metrics.json").read_bytes() == (tmp_path / "b/metrics.json").read_bytes()
    again = tmp_path / "again/reference.safetensors"
    make_reference(
        REFERENCE, source=made["source"], extractor=made["extractor"], out=again, scratch=tmp_path / "scratch"
    )
    assert again.read_bytes() == made["reference"].read_bytes()


def test_the_reference_tells_what_it_is(made):
    with safe_open(made["reference"], "pt") as file:
        facts = json.loads(file.metadata()["mixflow"])
    assert facts == {
        "file": "mixflow reference",
        "kind": "inception",
        "num_rows": 16,
        "size": [32, 32],
        "num_images": None,  # behind published statistics: nobody says
        "published": True,
        "extractor": file_sha256(made["extractor"].parent / "inception.pth"),
        "source": file_sha256(made["source"].parent / "VIRTUAL.npz"),
        "tf32": False,
    }
    told = json.loads((made["reference"].parent / "run.json").read_text())
    assert told["parents"]["source"]["sha256"] == file_sha256(made["source"].parent / "VIRTUAL.npz")


def test_what_does_not_fit_is_told(made, tmp_path):
    out = tmp_path / "metrics.json"
    np.savez(tmp_path / "large.npz", arr_0=images(5, size=40))
    with pytest.raises(UserError, match=r"holds images of 40x40 but .* was made at 32x32: name a reference of that"):
        run(made, out, samples=tmp_path / "large.npz")
    np.savez(tmp_path / "few.npz", arr_0=images(3))
    with pytest.raises(UserError, match=r"samples holds 3 images where k = . needs at least"):
        run(made, out, samples=tmp_path / "few.npz")
    np.savez(tmp_path / "none.npz", images=images(5))
    with pytest.raises(UserError, match="has no array arr_0"):
        run(made, out, samples=tmp_path / "none.npz")
    torch.save(tiny_inception_state_dict(seed=2, width_divisor=32), tmp_path / "other.pth")
    with pytest.raises(UserError, match="was made with other weights than"):
        run(made, out, extractor=record("other", tmp_path / "other.pth"))
    broken = tiny_inception_state_dict(seed=1, width_divisor=32)
    broken["fc.weight"][0, 0] = torch.nan
    torch.save(broken, tmp_path / "broken.pth")
    parts = {"extractor": record("broken", tmp_path / "broken.pth")}
    make_reference(REFERENCE, source=made["source"], out=tmp_path / "reference.safetensors", scratch=tmp_path, **parts)
    with pytest.raises(UserError, match="row 0 of logits holds NaN"):
        run(made, out, reference=tmp_path / "reference.safetensors", **parts)
    made_parts = {role: made[role] for role in ("samples", "reference", "extractor")}
    with pytest.raises(UserError, match="extractor kind 'inceptoin' is not known; did you mean 'inception'"):
        evaluate(SETTINGS | {"extractor": {"kind": "inceptoin"}}, **made_parts, out=out)
    assert not out.exists()


# --- import_weights

MODEL = {
    "family": "sit", "input_size": 8, "in_channels": 4, "num_classes": 10, "hidden_size": 32, "depth": 2,
    "num_heads": 2, "patch_size": 2, "learn_sigma": True, "label_dropout": 0.1,
}  # fmt: skip


@pytest.fixture
def published(tmp_path):
    """A peer's training checkpoint of a SiT, and its record."""
    network = build_model(**MODEL)
    torch.save({"model": {}, "ema": network.state_dict()}, tmp_path / "SiT.pt")
    return network, record("sit", tmp_path / "SiT.pt")


def settings_of(model, **source):
    return {"checkpoint": "mine", "weights": {**source, "model": model}}


def test_a_download_becomes_a_checkpoint(published, tmp_path):
    network, told = published
    out = tmp_path / "out/model.safetensors"
    import_weights(settings_of(MODEL, download="sit", source={}), file=told, out=out)
    loaded = load_model("sit", out)
    assert loaded.options == network.options
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    parents = json.loads((out.parent / "run.json").read_text())["parents"]
    assert parents["file"] == {"file": str(tmp_path / "SiT.pt"), "sha256": file_sha256(tmp_path / "SiT.pt")}


def test_a_file_of_ones_own_is_compared_with_its_hash(published, tmp_path):
    out = tmp_path / "out/model.safetensors"
    file = tmp_path / "SiT.pt"
    import_weights(settings_of(MODEL, file=str(file), sha256=file_sha256(file)), file=file, out=out)
    with pytest.raises(UserError, match="but the entry says 0000"):
        import_weights(settings_of(MODEL, file=str(file), sha256="0" * 64), file=file, out=out)
    with pytest.raises(UserError, match="do not exist"):
        import_weights(settings_of(MODEL, file="nose.pt"), file=Path("nose.pt"), out=out)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input_size": 16}, "made for latents of 8x8 (their pos_embed says so) but the entry's latents are 16x16"),
        ({"num_classes": 1000}, "have num_classes 10 but the entry says 1000"),
        ({"depth": 3}, "have depth 2 but the entry says 3"),
    ],
)
def test_weights_of_another_size_are_refused(published, tmp_path, change, text):
    out = tmp_path / "out/model.safetensors"
    with pytest.raises(UserError, match=re.escape(text)):
        import_weights(settings_of(MODEL | change, download="sit"), file=published[1], out=out)
    assert not out.exists()
