"""The training loop: equal to the peer's optimiser steps, and repeatable however it is cut."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from mixflow.flow import Linear, flow_matching_loss
from mixflow.models import load_model
from mixflow.runtime.errors import UserError
from mixflow.runtime.seeds import Stream, normal
from mixflow.runtime.stopping import StopRequest, Unfinished
from mixflow.training import Decay, Recipe, loop, train

GOLDEN = Path(__file__).parents[1] / "golden"


def recipe(**changes):
    values = {
        "num_steps": 60,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
        "warmup_steps": 5,
        "gradient_clip": 1.0,
        "ema_decay": 0.9,
    }
    return Recipe(**{**values, **changes})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 2))


def loss_function(net, step, positions):
    draws = normal(7, Stream.NOISE, step, positions, (4,))
    return (net(draws) - draws[:, :2].sin()).square().mean(dim=1)


def run(tmp_path, changes={}, **options):  # noqa: B006 (never changed)
    net = network()
    resume = tmp_path / "resume.pt"
    return (*train(Accelerator(cpu=True), net, loss_function, recipe(**changes), resume, **options), net)


def test_four_steps_equal_the_peers(tmp_path):
    """golden/sit train_a: AdamW at 1e-4 without clipping, EMA 0.9999, given data, noise, times and dropped labels."""
    golden = load_file(GOLDEN / "sit" / "train_a.safetensors")
    net = load_model("sit", GOLDEN / "sit" / "model_a.safetensors", num_heads=4)
    losses = []

    def loss(wrapped, step, positions):
        data, noise, t, y = (golden[f"step{step}.{part}"][positions] for part in ("x1", "x0", "t", "y_effective"))
        keep = torch.zeros(len(y), dtype=torch.bool)  # labels are dropped already
        values = flow_matching_loss(lambda x, t: wrapped(x, t, y, drop=keep), noise, data, t, t, Linear())
        losses.append(values.detach())
        return values

    size = len(golden["step0.t"])
    four = recipe(
        num_steps=4, batch_size=size, learning_rate=1e-4, warmup_steps=0, gradient_clip=None, ema_decay=0.9999
    )
    ema, history = train(Accelerator(cpu=True), net, loss, four, tmp_path / "r.pt", log_every=1, save_every_seconds=1e9)
    for step in range(4):
        assert torch.allclose(losses[step], golden[f"step{step}.loss"], rtol=1e-5, atol=1e-6)
        assert history["loss"][step] == pytest.approx(golden[f"step{step}.loss"].mean().item(), rel=1e-5)
    weights = net.state_dict()
    compared = 0
    for key, value in golden.items():
        if key.startswith("final.model."):
            # Adam divides a gradient by its own size: one near zero carries its rounding, which each processor does in
            # its own way, into a step of 1e-4.
            difference = (weights[key.removeprefix("final.model.")] - value).abs()
            assert difference.max() < 2e-6, key
            assert (difference > 2e-7).double().mean() < 1e-3, key
            compared += 1
        if key.startswith("final.ema."):  # the peer's two roundings a step move even its constants by 2e-7
            assert torch.allclose(ema[key.removeprefix("final.ema.")], value, rtol=0, atol=3e-7), key
            compared += 1
    assert compared > 10


def test_it_learns_and_its_history_says_so(tmp_path):
    _, history, _ = run(tmp_path, log_every=10)
    assert history["step"] == [10, 20, 30, 40, 50, 60]
    assert history["loss"][-1] < 0.7 * history["loss"][0]


class StopAfter:
    """A stop request that becomes true at the given question."""

    reason = "the test says so"

    def __init__(self, questions):
        self.questions = questions

    def __bool__(self):
        self.questions -= 1
        return self.questions < 0


@pytest.mark.parametrize("stops", [[1], [7, 20], [33, 1, 1]])
def test_stopping_anywhere_changes_nothing(tmp_path, stops):
    whole_ema, whole_history, whole_net = run(tmp_path / "whole", log_every=10)
    for steps in stops:
        with pytest.raises(Unfinished, match="saved at step"):
            run(tmp_path / "cut", log_every=10, stop=StopAfter(steps))
    ema, history, net = run(tmp_path / "cut", log_every=10)
    assert json.dumps(history) == json.dumps(whole_history)
    assert all(torch.equal(ema[key], whole_ema[key]) for key in ema)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), whole_net.parameters(), strict=True))


@pytest.mark.parametrize(
    ("seconds", "asked"), [(0.001, [1, 51, 101]), (0.2, [1, 26, 51]), (2.0, [1, 3, 5]), (60.0, [1, 2, 3])]
)
def test_processes_agree_every_few_seconds(monkeypatch, seconds, asked):
    clock = 0.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock)

    class Two:
        """The other process is as slow, and wants to save."""

        num_processes, device = 2, "cpu"

        def gather(self, told):
            steps.append(done)
            return torch.cat([told, torch.tensor([[loop.SAVE, told[0, 1]]])])

    steps, actions, agree = [], {}, loop._Agreement(Two(), 0, 50)
    for done in range(1, 102):
        clock += seconds
        actions[done] = agree(done, loop.STOP if done == asked[2] else loop.CONTINUE)
    assert steps[:3] == asked
    assert {done for done, action in actions.items() if action != loop.CONTINUE} == set(steps)
    assert (actions[asked[1]], actions[asked[2]]) == (loop.SAVE, loop.STOP)


def test_micro_batches_change_rounding_only(tmp_path):
    whole, history, _ = run(tmp_path / "a", log_every=10)
    parts, part_history, _ = run(tmp_path / "b", log_every=10, micro_batch=5)  # 5 + 5 + 5 + 1 of 16
    assert part_history["loss"] == pytest.approx(history["loss"], rel=1e-5)
    assert all(torch.allclose(parts[key], whole[key], atol=1e-5) for key in whole)


def test_frequent_saving_changes_nothing(tmp_path):
    whole, _, _ = run(tmp_path / "a")
    saved, _, _ = run(tmp_path / "b", save_every_seconds=0.0)
    assert (tmp_path / "b" / "resume.pt").exists()
    assert all(torch.equal(saved[key], whole[key]) for key in whole)


def test_a_loss_that_is_not_finite_is_told(tmp_path):
    def broken(net, step, positions):
        return loss_function(net, step, positions) / (0.0 if step == 20 else 1.0)

    with pytest.raises(UserError, match=r"loss of 'x' is .* at step 30: lower learning_rate"):
        train(Accelerator(cpu=True), network(), broken, recipe(), tmp_path / "r.pt", name="x", log_every=10)


def test_time_budget_stops_before_its_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stop = StopRequest(time_budget_minutes=100)
    now[0] += 89 * 60
    assert not stop
    now[0] += 2 * 60  # ten minutes before the end at the latest
    assert stop
    assert stop.reason == "the time budget is used up"


# ---- the learning rate


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every step that an optimiser takes."""
    seen = []

    class Watched(torch.optim.AdamW):
        def step(self):
            seen.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    return seen


def test_decay_is_raes():
    """golden/rae lr_schedule: 2e-4 for 40 epochs of 1251 steps, then linear to 2e-5 at epoch 800."""
    published = json.loads((GOLDEN / "rae" / "lr_schedule.json").read_text())["main_branch_2025-12"]["lr"]
    constant = recipe(learning_rate=2e-4, warmup_steps=0, decay=Decay(40 * 1251, 800 * 1251, 2e-5))
    for step, rate in published.items():
        assert constant.rate_at(int(step)) == pytest.approx(rate, rel=1e-14), step
    assert constant.rate_at(40 * 1251) == 2e-4
    assert constant.rate_at(800 * 1251) == constant.rate_at(10**9) == 2e-5
    warmed = recipe(learning_rate=2e-4, warmup_steps=40 * 1251, decay=constant.decay)  # RAE's trainer of October 2025
    assert warmed.rate_at(0) == pytest.approx(2e-4 / 50_040)
    assert warmed.rate_at(25_019) == pytest.approx(1e-4)
    assert all(warmed.rate_at(int(step)) == constant.rate_at(int(step)) for step in published if int(step) >= 50_039)


def test_every_step_has_its_rate(tmp_path, rates):
    run(tmp_path / "constant")
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008] + 56 * [0.01])
    rates.clear()
    run(tmp_path / "decaying", {"decay": Decay(20, 30, 0.001)})
    assert rates[:20] == pytest.approx([0.002, 0.004, 0.006, 0.008] + 16 * [0.01])
    assert rates[20:31] == pytest.approx([0.01 - 0.0009 * passed for passed in range(11)])
    assert rates[30:] == 30 * [0.001]


@pytest.mark.parametrize("stops", [[24], [3, 22, 1], [29, 1], [40]])
def test_stopping_in_the_decay_changes_nothing(tmp_path, rates, stops):
    decaying = {"decay": Decay(20, 30, 0.001)}
    whole, _, whole_net = run(tmp_path / "whole", decaying)
    expected, rates[:] = list(rates), []
    for steps in stops:
        with pytest.raises(Unfinished, match="saved at step"):
            run(tmp_path / "cut", decaying, stop=StopAfter(steps))
    ema, _, net = run(tmp_path / "cut", decaying)
    assert rates == expected
    assert all(torch.equal(ema[key], whole[key]) for key in ema)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), whole_net.parameters(), strict=True))
