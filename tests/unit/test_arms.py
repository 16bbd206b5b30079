"""Arms differ from each other only where they should: same images, noise and dropped labels at every step."""

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


ROLLOUT = {"step_size": 0.025, "weight": 1.0, "min_remaining": 0.05}
ARMS = {
    "mixflow-g0.4": ("mixflow", 0.4, {}),
    "mixflow-g0.8": ("mixflow", 0.8, {}),
    "beta": ("beta", 0.0, {}),
    "matched": ("matched", 0.8, {}),
    "blind": ("blind", 0.8, {}),
    "perturbed": ("uniform", 0.0, {"input_perturbation": 0.1}),
    "rollout": ("uniform", 0.0, {"self_rollout": ROLLOUT}),
    "mixec-g0.8": ("mixflow", 0.8, {"endpoint_target": {"min_remaining": 0.05}}),
}


def arm(images, law, gamma, keys={}, **changes):  # noqa: B006 (never changed)
    """Return (network, loss function) of a small arm: a law, keys of its recipe, and `changes` of its model."""
    settings = load_config(ROOT / "config.yaml", ROOT / "rehearsal.yaml").slice("train", "digits-continued")["train"]
    recipe = {**settings, "law": law, "gamma": gamma, **keys}
    recipe["model"] = {**recipe["model"], **changes}
    options = {key: value for key, value in recipe["model"].items() if key != "family"}
    torch.manual_seed(0)
    net = build_model("sit", **options)
    return net, stage.make_loss(recipe, images, load_autoencoder({"kind": "pixels"}), DEVICE)


def draws(images, monkeypatch, law, gamma, step, keys={}):  # noqa: B006 (never changed)
    """Everything that a step is made of: what reaches the loss, and the labels with those that are dropped."""
    seen = {"calls": []}
    plain_loss = stage.flow_matching_loss

    def capture(network, noise, data, t, m, interpolant, **options):
        seen.update(noise=noise, data=data, t=t, m=m, **options)
        return plain_loss(network, noise, data, t, m, interpolant, **options)

    def wrapped(x, t, y, drop):
        seen["calls"].append((x, t, torch.is_grad_enabled()))
        for name, given in (("labels", y), ("drop", drop)):
            assert torch.equal(seen.setdefault(name, given), given), name  # the same in every call of a step
        return x

    with monkeypatch.context() as patch:
        patch.setattr(stage, "flow_matching_loss", capture)
        _, loss = arm(images, law, gamma, keys)
        loss(wrapped, step, torch.arange(64))
    return seen


@pytest.mark.parametrize("name", ARMS)
def test_swapping_the_arm_changes_what_it_is_about_and_nothing_else(images, monkeypatch, name):
    law, gamma, keys = ARMS[name]
    plain = draws(images, monkeypatch, "uniform", 0.0, 3)
    other = draws(images, monkeypatch, law, gamma, 3, keys)
    for part in ("noise", "data", "labels", "drop"):
        assert torch.equal(plain[part], other[part]), part
    assert torch.equal(plain["t"], plain["m"])
    if law == "uniform":
        assert torch.equal(plain["t"], other["t"])
        assert torch.equal(plain["m"], other["m"])
    else:
        assert not torch.equal(plain["m"], other["m"])
    if law == "mixflow":  # the same uniforms stand behind t: Beta(2,1) is the root of the plain draw
        assert torch.allclose(other["t"], plain["t"].sqrt())
        assert bool((other["m"] <= other["t"]).all())
        assert bool((other["m"] >= (1 - gamma) * other["t"] - 1e-6).all())
    if law == "matched":
        mixflow = draws(images, monkeypatch, "mixflow", gamma, 3)
        assert torch.equal(other["m"], mixflow["m"])
        assert torch.equal(other["t"], other["m"])
    assert not torch.equal(draws(images, monkeypatch, law, gamma, 4, keys)["noise"], other["noise"])


def test_the_perturbation_is_a_draw_of_its_own(images, monkeypatch):
    keys = ARMS["perturbed"][2]
    step = draws(images, monkeypatch, "uniform", 0.0, 3, keys)
    extra = step["perturbation"] / 0.1
    assert extra.std().item() == pytest.approx(1.0, abs=0.02)
    correlation = torch.corrcoef(torch.stack([extra.flatten(), step["noise"].flatten()]))[0, 1].item()
    assert abs(correlation) < 0.02
    assert torch.equal(draws(images, monkeypatch, "uniform", 0.0, 3, keys)["perturbation"], step["perturbation"])
    later = draws(images, monkeypatch, "uniform", 0.0, 4, keys)["perturbation"]
    assert not torch.equal(later, step["perturbation"])


def test_the_rollout_adds_two_calls_after_the_plain_one(images, monkeypatch):
    """The plain call is the very same; then the step, without gradient, from s = t - h; then the call where it ends."""
    plain = draws(images, monkeypatch, "uniform", 0.0, 3)["calls"]
    calls = draws(images, monkeypatch, "uniform", 0.0, 3, ARMS["rollout"][2])["calls"]
    assert len(plain) == 1
    assert [with_gradient for *_, with_gradient in calls] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(plain[0][:2], calls[0][:2], strict=True))
    assert torch.equal(calls[1][1], (plain[0][1] - 0.025).clamp_min(0))
    assert torch.equal(calls[2][1], plain[0][1])


def test_the_alignment_keeps_its_share_beside_a_rollout(images):
    """(plain + rollout) / 2 + coefficient * alignment, with projections asked for in the plain call alone."""

    def losses(coefficient, keys):
        recipe = load_config(ROOT / "config.yaml", ROOT / "rehearsal.yaml").slice("train", "digits-continued")["train"]
        alignment = None if coefficient is None else stage.Alignment(images, encode, coefficient)
        codec = load_autoencoder({"kind": "pixels"})
        loss = stage.make_loss({**recipe, **keys}, images, codec, DEVICE, alignment=alignment)
        return loss(wrapped, 3, torch.arange(16))

    def encode(pixels):
        return pixels.float().flatten(1)[:, 320:352].reshape(-1, 4, 8) + 1  # [b,4,8]

    asked = []

    def wrapped(x, t, y, drop, with_projections=False):
        asked.append(with_projections)
        velocity = x.sin()
        projections = [x.flatten(1)[:, 320:352].reshape(-1, 4, 8)]
        return (velocity, projections) if with_projections else velocity

    plain, mean = losses(None, {}), losses(None, {"self_rollout": ROLLOUT})
    aligned = losses(0.5, {})
    asked.clear()
    both = losses(0.5, {"self_rollout": ROLLOUT})
    assert asked == [True, False, False]
    assert (aligned - plain).abs().min() > 1e-3
    torch.testing.assert_close(both - mean, aligned - plain, rtol=1e-4, atol=1e-5)


NEUTRAL = {
    "input_perturbation 0": {"input_perturbation": 0.0},
    "self_rollout weight 0": {"self_rollout": {**ROLLOUT, "weight": 0.0}},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_arm_trains_bit_for_bit_as_the_control(images, tmp_path, name):
    """And the arm itself does not."""
    steps = Recipe(6, 16, 1e-3, (0.9, 0.999), 0.0, 0, 1.0, 0.9)
    acting = ARMS["perturbed" if "perturbation" in name else "rollout"][2]
    results = {}
    for key, keys in (("control", {}), ("neutral", NEUTRAL[name]), ("acting", acting)):
        net, loss = arm(images, "uniform", 0.0, keys)
        results[key], history = train(Accelerator(cpu=True), net, loss, steps, tmp_path / key, log_every=1)
        results[key]["loss"] = torch.tensor(history["loss"])
    assert all(torch.equal(results["neutral"][key], value) for key, value in results["control"].items())
    assert not all(torch.equal(results["acting"][key], value) for key, value in results["control"].items())


@pytest.mark.parametrize("name", ["perturbed", "rollout", "mixec-g0.8"])
def test_micro_batches_change_rounding_only(images, tmp_path, name):
    law, gamma, keys = ARMS[name]
    steps = Recipe(4, 12, 1e-3, (0.9, 0.999), 0.0, 0, 1.0, 0.9)
    losses = []
    for micro_batch in (None, 5):
        net, loss = arm(images, law, gamma, keys)
        _, history = train(
            Accelerator(cpu=True), net, loss, steps, tmp_path / str(micro_batch), micro_batch=micro_batch, log_every=1
        )
        losses.append(history["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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
