"""Arms differ from each other only in the law of the times: same images, noise and dropped labels at every step."""

import pytest
import torch
from accelerate import Accelerator

from mixflow.autoencoders import load_autoencoder
from mixflow.config import load_config
from mixflow.data.latents import LatentCache
from mixflow.models import build_model
from mixflow.stages import train as stage
from mixflow.stages.cache_latents import cache_latents
from mixflow.training import Recipe, train
from tests.conftest import ROOT

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "index.json"
    cache_latents(load_config(ROOT / "config.yaml").slice("cache_latents", "digits"), path)
    return LatentCache(path).split("train")


def arm(images, law, gamma, **changes):
    """Return (network, loss function) of a small arm under a law; `changes` go to its model."""
    settings = load_config(ROOT / "config.yaml", ROOT / "rehearsal.yaml").slice("train", "digits-continued")["train"]
    recipe = {**settings, "law": law, "gamma": gamma}
    recipe["model"] = {**recipe["model"], **changes}
    options = {key: value for key, value in recipe["model"].items() if key != "family"}
    torch.manual_seed(0)
    net = build_model("sit", **options)
    return net, stage.make_loss(recipe, images, load_autoencoder({"kind": "pixels"}), DEVICE)


def draws(images, monkeypatch, law, gamma, step):
    """Everything that a step is made of: what reaches the loss, and the labels with those that are dropped."""
    seen = {}

    def capture(network, noise, data, t, m, interpolant):
        seen.update(noise=noise, data=data, t=t, m=m)
        network(data, t)
        return torch.zeros(len(t))

    def wrapped(x, t, y, drop):
        seen.update(labels=y, drop=drop)
        return x

    monkeypatch.setattr(stage, "flow_matching_loss", capture)
    _, loss = arm(images, law, gamma)
    loss(wrapped, step, torch.arange(64))
    return seen


@pytest.mark.parametrize(("law", "gamma"), [("mixflow", 0.4), ("mixflow", 0.8), ("matched", 0.8), ("blind", 0.8)])
def test_swapping_the_law_changes_the_times_and_nothing_else(images, monkeypatch, law, gamma):
    plain = draws(images, monkeypatch, "uniform", 0.0, step=3)
    slowed = draws(images, monkeypatch, law, gamma, step=3)
    for name in ("noise", "data", "labels", "drop"):
        assert torch.equal(plain[name], slowed[name]), name
    assert torch.equal(plain["t"], plain["m"])
    assert not torch.equal(plain["m"], slowed["m"])
    if law == "mixflow":  # the same uniforms stand behind t: Beta(2,1) is the root of the plain draw
        assert torch.allclose(slowed["t"], plain["t"].sqrt())
        assert bool((slowed["m"] <= slowed["t"]).all())
        assert bool((slowed["m"] >= (1 - gamma) * slowed["t"] - 1e-6).all())
    if law == "matched":
        mixflow = draws(images, monkeypatch, "mixflow", gamma, step=3)
        assert torch.equal(slowed["m"], mixflow["m"])
        assert torch.equal(slowed["t"], slowed["m"])
    other = draws(images, monkeypatch, law, gamma, step=4)
    assert not torch.equal(other["noise"], slowed["noise"])


def test_mixflow_without_slowing_trains_bit_for_bit_as_its_plain_law(images, tmp_path):
    """gamma = 0 is Beta(2,1) flow matching: the same weights after real steps; gamma > 0 gives others."""
    steps = Recipe(8, 16, 1e-3, (0.9, 0.999), 0.0, 0, 1.0, 0.9)
    results = {}
    for name, law, gamma in (("beta", "beta", 0.0), ("zero", "mixflow", 0.0), ("slowed", "mixflow", 0.8)):
        net, loss = arm(images, law, gamma)
        results[name], _ = train(Accelerator(cpu=True), net, loss, steps, tmp_path / name)
    assert all(torch.equal(results["zero"][key], results["beta"][key]) for key in results["beta"])
    assert not all(torch.equal(results["slowed"][key], results["beta"][key]) for key in results["beta"])


def test_a_model_without_label_dropout_trains(images, tmp_path):
    net, loss = arm(images, "mixflow", 0.8, label_dropout=0.0)
    steps = Recipe(2, 4, 1e-3, (0.9, 0.999), 0.0, 0, None, 0.9)
    _, history = train(Accelerator(cpu=True), net, loss, steps, tmp_path / "resume.pt", log_every=1)
    assert len(history["loss"]) == 2
