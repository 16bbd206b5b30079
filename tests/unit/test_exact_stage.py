"""Exact fields as entries: drawn datasets, make-exact, weights files, checks, jobs; and the target theory."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mixflow.autoencoders import load_autoencoder
from mixflow.config import load_config, resolve, slice_key, spectrum_variances, to_json
from mixflow.data.latents import LatentCache
from mixflow.flow import gaussian
from mixflow.models import GaussianField, MixtureField, describe_weights, export_weights, load_model, save_model
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.sampling import time_grid
from mixflow.stages.cache_latents import cache_latents, load_images
from mixflow.stages.inspect import describe
from mixflow.stages.jobs import Job, Jobs
from mixflow.stages.make_exact import make_exact
from mixflow.stages.theory import Point, make_theory, measure

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config.yaml"
SPIKED = {"kind": "spiked", "num_spikes": 2, "spike": 4.0, "rest": 0.0}


@pytest.fixture(scope="module")
def config():
    return load_config(CONFIG)


@pytest.fixture
def raw():
    return copy.deepcopy(yaml.safe_load(CONFIG.read_text()))


# ---- spectra and draws


@pytest.mark.parametrize(
    ("spectrum", "wanted"),
    [
        ({"kind": "flat", "variance": 0.5}, [0.5, 0.5, 0.5, 0.5]),
        (SPIKED, [4.0, 4.0, 0.0, 0.0]),
        ({"kind": "power_law", "exponent": 1.0, "mean": 25 / 48}, [1.0, 1 / 2, 1 / 3, 1 / 4]),
    ],
)
def test_spectra(spectrum, wanted):
    assert spectrum_variances(spectrum, 4) == pytest.approx(wanted)


def test_draws_have_the_variances_and_depend_on_seed_and_index_alone():
    dataset = {"kind": "gaussian", "channels": 1, "resolution": 2, "num_images": 4000, "spectrum": SPIKED, "seed": 3}
    images = load_images(dataset)["train"]
    read = np.empty((4000, 2, 2, 1), np.float32)
    for position in range(4000):
        images.read(position, read[position])
    np.testing.assert_allclose(read.reshape(4000, 4).std(0), [2, 2, 0, 0], rtol=0.05)
    again, once = load_images({**dataset, "num_images": 10})["train"], np.empty((2, 2, 1), np.float32)
    again.read(7, once)
    np.testing.assert_array_equal(once, read[7])
    load_images({**dataset, "seed": 4})["train"].read(7, once)
    assert not np.array_equal(once, read[7])


def test_cached_draws_are_the_draws(tmp_path, config):
    settings = config.slice("cache_latents", "spiked-64")
    settings["dataset"] = {**settings["dataset"], "num_images": 50}
    settings["shard_size"] = 20
    cache_latents(settings, tmp_path / "a" / "index.json", scratch=tmp_path / "scratch", batch=7, workers=1)
    cache = LatentCache(tmp_path / "a" / "index.json")
    assert cache.latent_shape == (1, 8, 8)
    stored, labels = cache.split("train").gather(np.arange(50))
    assert stored.dtype == torch.float32
    assert labels.tolist() == [0] * 50
    one = np.empty((8, 8, 1), np.float32)
    load_images(settings["dataset"])["train"].read(33, one)
    np.testing.assert_array_equal(stored[33].permute(1, 2, 0).numpy(), one)
    assert describe(tmp_path / "a" / "index.json")["latent_shape"] == [1, 8, 8]


def test_draws_cannot_be_decoded():
    with pytest.raises(UserError, match="no images"):
        load_autoencoder({"kind": "identity"}).decode(torch.zeros(1, 1, 2, 2))


# ---- weights files


@pytest.mark.parametrize("law", ["uniform", "mixflow"])
def test_fields_survive_their_files(tmp_path, law):
    gamma = 0.8 if law == "mixflow" else 0.0
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(30, 2, 2, 2, generator=generator)
    fields = {
        "gaussian": GaussianField.fit(samples, num_classes=3, law=law, gamma=gamma),
        "mixture": MixtureField.fit(samples, torch.arange(30) % 3, 0.1, law=law, gamma=gamma),
    }
    for family, field in fields.items():
        path = tmp_path / f"{family}.safetensors"
        save_model(path, field.state_dict(), {"family": family, **field.options})
        read = load_model(family, path)
        assert read.options == field.options
        x, t, y = samples[:4], torch.tensor(0.6), torch.tensor([0, 1, 2, 3])
        assert torch.equal(read(x, t, y), field(x, t, y))
        facts = describe_weights(path)
        assert (facts["family"], facts["law"], facts["in_channels"]) == (family, law, 2)
        assert describe(path)["kind"] == "weights"
        with pytest.raises(UserError, match="no peer"):
            export_weights(path, tmp_path / "out.pt")
        with pytest.raises(UserError, match=f"family '{family}', not 'sit'"):
            load_model("sit", path)
        with pytest.raises(UserError, match="use the family"):
            load_model("sit", dict(field.state_dict()))


# ---- make-exact


def test_field_of_a_spectrum_needs_no_cache(tmp_path, config):
    settings = config.slice("make_exact", "spiked-64-mixflow-g0.8")
    make_exact(settings, latents=None, out=tmp_path / "model.safetensors")
    field = load_model("gaussian", tmp_path / "model.safetensors")
    assert (field.law, field.gamma) == ("mixflow", 0.8)
    assert field.variances.tolist() == [4.0] * 4 + [0.0] * 60
    assert {key: field.options[key] for key in settings["model"] if key != "family"} == {
        key: value for key, value in settings["model"].items() if key != "family"
    }
    assert json.loads((tmp_path / "run.json").read_text())["stage"] == "make-exact"


def test_fields_of_cached_digits(tmp_path, config):
    index = tmp_path / "latents" / "index.json"
    cache_latents(config.slice("cache_latents", "digits"), index, scratch=tmp_path / "scratch", workers=1)
    for name in ("digits-kde", "digits-gaussian"):
        settings = config.slice("make_exact", name)
        out = tmp_path / name / "model.safetensors"
        make_exact(settings, latents=index, out=out)
        field = load_model(settings["model"]["family"], out)
        options = {"family": settings["model"]["family"], **field.options}
        assert options == settings["model"]
        assert config.num_parameters(name) == sum(tensor.numel() for tensor in field.state_dict().values())
        stored, labels = LatentCache(index).split("train").gather(np.arange(1437))
        data = stored.float() / 127.5 - 1
        if name == "digits-kde":
            assert torch.equal(field.components, data)
            assert torch.equal(field.component_labels, labels)
            assert field.bandwidth.item() == pytest.approx(0.05)
        else:
            torch.testing.assert_close(field.mean, data.mean(0), rtol=0, atol=1e-5)
            assert field.variances.sum().item() == pytest.approx(data.var(0, correction=0).sum().item(), rel=1e-4)
    wrong = {**settings, "model": {**settings["model"], "input_size": 8}}
    with pytest.raises(UserError, match="name other ones"):
        make_exact(wrong, latents=index, out=tmp_path / "wrong" / "model.safetensors")


# ---- config


def test_all_entries_of_the_ladder_resolve(config):
    for size in (16, 64, 256, 1024, 4096):
        assert config.latent_shape(f"spiked-{size}")[0] * config.latent_shape(f"spiked-{size}")[1] ** 2 == size
        assert config.num_parameters(f"spiked-{size}") == 2 * size
    assert config.network_options("digits-kde-mixflow-g0.8") == {
        "family": "mixture", "num_components": 1437, "law": "mixflow", "gamma": 0.8,
        "input_size": 32, "in_channels": 1, "num_classes": 10,
    }  # fmt: skip
    assert set(config.slice("sample", "digits-kde", "euler50-cfg2")) >= {"sampler", "model"}  # it has a null class


def with_entry(raw, section, name, **entry):
    raw[section][name] = {**raw[section].get(name, {}), **entry}
    return raw


@pytest.mark.parametrize(
    ("section", "name", "entry", "words"),
    [
        ("checkpoints", "bad", {"exact": {"bandwidth": 0.1}, "extends": "spiked-64"}, "has none"),
        ("checkpoints", "bad", {"exact": {"bandwidth": None}, "extends": "digits-kde"}, "needed there"),
        ("checkpoints", "bad", {"exact": {"law": "mixflow"}, "extends": "digits-kde"}, "needs a gamma above 0"),
        ("checkpoints", "bad", {"exact": {"gamma": 0.3}, "extends": "digits-kde"}, "has no effect"),
        ("checkpoints", "bad", {"exact": {"latents": "nope"}, "extends": "digits-kde"}, "not one of the latents"),
        ("checkpoints", "bad", {"train": {"init": "digits-kde"}, "extends": "digits-continued"}, "no weights to train"),
        ("checkpoints", "bad", {"exact": None, "extends": "digits-kde"}, "either"),
        ("latents", "bad", {"autoencoder": "pixels", "extends": "spiked-64"}, "identity goes with kind gaussian"),
        ("latents", "bad", {"autoencoder": "identity", "extends": "digits"}, "identity goes with kind gaussian"),
        ("datasets", "bad", {"num_classes": 2, "extends": "spiked-64"}, "write 1"),
        ("datasets", "bad", {"spectrum": {"num_spikes": 99}, "extends": "spiked-64"}, "more than the 64 dimensions"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(raw, section, name, entry, words):
    with pytest.raises(UserError, match=words) as raised:
        resolve(with_entry(raw, section, name, **entry))
    assert str(raised.value).count("\n") == 0


@pytest.mark.parametrize("stage", ["sample", "evaluate"])
def test_draws_are_not_sampled_as_images(config, stage):
    with pytest.raises(UserError, match="no images"):
        config.slice(stage, "spiked-64", "euler50")


def test_a_table_of_draws_is_refused(raw):
    raw["tables"]["digits"]["rows"].append({"checkpoint": "spiked-64", "label": "spiked"})
    with pytest.raises(UserError, match="no images"):
        resolve(raw)


@pytest.mark.parametrize(("stage", "name"), [("train", "spiked-64"), ("import_weights", "digits-kde")])
def test_exact_fields_are_neither_trained_nor_imported(config, stage, name):
    with pytest.raises(UserError, match="make-exact"):
        config.slice(stage, name)


def test_a_network_can_be_trained_on_draws(raw):
    entry = {"extends": "digits-base", "train": {"latents": "spiked-64", "model": {"patch_size": 4}}}
    settings = resolve(with_entry(raw, "checkpoints", "spiked-64-sit", **entry)).slice("train", "spiked-64-sit")
    assert settings["autoencoder"] == {"kind": "identity"}
    assert (settings["train"]["model"]["in_channels"], settings["train"]["model"]["num_classes"]) == (1, 1)


def test_jobs_of_exact_fields(config):
    jobs = Jobs(config, [paths.weights("spiked-64"), paths.weights("digits-kde"), "theory"])
    assert jobs.needs[Job("make_exact", ("spiked-64",))] == ()
    assert jobs.needs[Job("make_exact", ("digits-kde",))] == (Job("cache_latents", ("digits",)),)
    assert jobs.outputs(Job("make_exact", ("digits-kde",))) == [
        "results/checkpoints/digits-kde/model.safetensors",
        "results/checkpoints/digits-kde/run.json",
    ]
    assert jobs.outputs(Job("theory")) == [
        f"results/theory/{name}" for name in ("theory.json", "theory.png", "run.json")
    ]


# ---- theory


def test_points_of_the_exact_field_are_closed_forms():
    found = measure(Point("spiked", 4, 0.0, 20), SPIKED, 1000, 0)
    std = gaussian.std_along(
        gaussian.euler_factors(
            lambda t: gaussian.velocity_slope(torch.tensor([4.0, 4.0, 0.0, 0.0]).double(), t), time_grid(20)
        )
    )[-1]
    assert found["variance_ratio"] == pytest.approx((std.square().sum() / 8).item())
    assert found["paired_time"] == pytest.approx(((4 - std.sum()) / 12).item())
    assert found["exact_flow_time"] == pytest.approx(0.0)  # (4 - 2 - 2) / 12
    assert found["null_std"] < 1e-12


def test_the_smallest_slowing_is_near_the_closed_form():
    """Monte Carlo through the network against the closed form, within its own standard errors and a little bias."""
    flat = {"kind": "flat", "variance": 0.8}
    slowed, exact = (measure(Point("flat", 16, gamma, 10), flat, 32_000, 0) for gamma in (0.01, 0.0))
    for key in ("variance_ratio", "paired_time"):
        assert slowed[key] == pytest.approx(exact[key], abs=5 * slowed[f"{key}_error"] + 0.01)
        assert slowed[key] != exact[key]


@pytest.mark.parametrize(
    ("null", "gamma", "wanted"),
    [(16, 1.0, 0.124), (60, 1.0, 0.068), (240, 1.0, 0.035), (60, 0.4, 0.057), (240, 0.4, 0.032)],
)
def test_noise_left_by_the_optimum_of_mixflow(null, gamma, wanted):
    """Four directions of variance 4 among null ones, 50 Euler steps; the values stated were found by another code."""
    spectrum = {"kind": "spiked", "num_spikes": 4, "spike": 4.0, "rest": 0.0}
    found = measure(Point("spiked", null + 4, gamma, 50), spectrum, 40_000, 0)
    assert found["null_std"] == pytest.approx(wanted, rel=0.06, abs=4 * found["null_std_error"])


@pytest.mark.parametrize(("gamma", "wanted"), [(0.0, 0.93), (0.4, 0.82), (0.8, 0.75)])
def test_variance_left_on_a_power_law(gamma, wanted):
    spectrum = {"kind": "power_law", "exponent": 1.5, "mean": 0.5}
    found = measure(Point("power-law", 64, gamma, 50), spectrum, 32_000, 0)
    assert found["variance_ratio"] == pytest.approx(wanted, abs=0.01)


def test_theory_is_made_and_drawn(tmp_path, config):
    settings = config.slice("theory")
    settings["theory"] |= {"dimensions": [16, 36], "gammas": [0.0, 0.5], "steps": [2, 4], "numbers": 64}
    settings["theory"]["held"] = {"dimension": 16, "gammas": [0.0, 0.5], "steps": 4}
    for name, given in (("a", settings), ("b", json.loads(to_json(settings)))):
        make_theory(given, out=tmp_path / name / "theory.json", figure=tmp_path / name / "theory.png")
    result = json.loads((tmp_path / "a" / "theory.json").read_text())
    assert {point["spectrum"] for point in result["points"]} == {"spiked", "power-law"}
    assert all(point["draws"] == (0 if point["gamma"] == 0 else 32) for point in result["points"])
    assert describe(tmp_path / "a" / "theory.json")["kind"] == "theory"
    assert json.loads((tmp_path / "b" / "theory.json").read_text()) == result
    assert (tmp_path / "a" / "theory.png").read_bytes() == (tmp_path / "b" / "theory.png").read_bytes()
    assert slice_key(settings) == slice_key(json.loads((tmp_path / "a" / "run.json").read_text())["settings"])
