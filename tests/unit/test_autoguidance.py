"""Guidance, grids and trajectories of RAE, against what its own code computed (tests/golden/rae).

RAE's time is 1 at the noise: its t is 1 - t here, its velocity minus ours, its interval [a, b] ours of [1 - b, 1 - a].
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixflow.models import load_model
from mixflow.runtime.errors import UserError
from mixflow.sampling import CountedNetwork, autoguided_velocity, guided_velocity, sample, time_grid

GOLDEN = Path(__file__).parents[1] / "golden" / "rae"
SHIFTS = {"shift256": 48**0.5, "shift512": 192**0.5, "shift1": 1.0}

golden = functools.cache(lambda name: load_file(GOLDEN / f"{name}.safetensors"))


@functools.cache
def rae(name):
    return load_model("rae", GOLDEN / f"weights_{name}_hot.safetensors").requires_grad_(False)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ---- one call, against the peer


def turned(low, high):
    return 1 - high, 1 - low


def velocity_of(kind, labels, scale, interval):
    """The guided velocity in paper time, and the counted networks behind it."""
    main, guide = CountedNetwork(rae("main")), CountedNetwork(rae("guide"))
    if kind == "ag":
        return autoguided_velocity(main, guide, labels, scale, interval=turned(*interval)), main, guide
    return guided_velocity(main, labels, rae("main").null_label, scale, interval=turned(*interval)), main, guide


@pytest.mark.parametrize("name", [name for name in load_file(GOLDEN / "guidance.safetensors") if "_hot_" in name])
def test_guided_calls_are_the_peers(name):
    """Each row alone where their times differ, for here one t holds for a batch.

    Under CFG the peer's six rows are three and their copies with the null label, which it answers twice.
    """
    g = golden("guidance")
    kind, times, scale, low, high = re.fullmatch(r"(\w+)_hot_t(\w+)_s([\d.]+)_iv([\d.]+)-([\d.]+)", name).groups()
    times, scale, interval = (
        g[f"t_{times}" if times == "mixed" else f"t{times}"],
        float(scale),
        (float(low), float(high)),
    )
    rows = 6 if kind == "ag" else 3
    acted = 0
    for i in [slice(k, k + 1) for k in range(rows)] if len(times.unique()) > 1 else [slice(rows)]:
        velocity, main, guide = velocity_of(kind, g["y"][:rows][i], scale, interval)
        # The rounding of the two forward passes is magnified by scale and scale - 1.
        close(-velocity(g["x"][:rows][i], 1 - times[i][0]), g[name][:rows][i], 2e-5 * (2 * scale - 1))
        acts = interval[0] <= times[i][0] <= interval[1]  # closed in both conventions
        acted += bool(acts)
        size = len(g["x"][:rows][i])
        assert (main.rows, guide.rows) == ((size, size * acts) if kind == "ag" else (size * (1 + acts), 0))
    if kind == "cfg":
        assert torch.equal(g[name][:3], g[name][3:])
    assert acted > 0 or times[0] > interval[1]


# ---- grids and trajectories, against the peer


@pytest.mark.parametrize("points", [10, 50])
@pytest.mark.parametrize("shift", list(SHIFTS))
def test_grids_are_the_peers(shift, points):
    times = 1 - time_grid(points - 1, end=0.999, shift=SHIFTS[shift])
    close(times.float(), golden("ode")[f"grid_{shift}_n{points}"], 2e-7)  # the peer computes in float32


@pytest.mark.parametrize("guidance", ["plain", "cfg2", "ag1.42"])
@pytest.mark.parametrize("points", [10, 50])
@pytest.mark.parametrize("shift", list(SHIFTS))
def test_samples_are_the_peers_without_a_doubled_batch(shift, points, guidance):
    g = golden("ode")
    kind, scale = re.fullmatch(r"([a-z]+)([\d.]*)", guidance).groups()
    velocity, main, guide = velocity_of(kind, g["y"][:3], float(scale or 1), (0.0, 1.0))
    times = time_grid(points - 1, end=0.999, shift=SHIFTS[shift])
    x = sample(velocity, g["z"], solver="euler", times=times)
    close(x, g[f"{guidance}_hot_{shift}_n{points}_last"], 1e-4)
    calls = points - 1
    assert main.calls == calls
    assert (main.rows, guide.rows) == (3 * calls * (1 + (kind == "cfg")), 3 * calls * (kind == "ag"))


def plain():
    return velocity_of("plain", golden("ode")["y"][:3], 1.0, (0.0, 1.0))[0]


def test_every_state_is_the_peers():
    states = []
    times = time_grid(9, end=0.999, shift=SHIFTS["shift256"])
    sample(plain(), golden("ode")["z"], solver="euler", times=times, callback=lambda k, x, t: states.append(x))
    close(torch.stack(states), golden("ode")["plain_hot_shift256_n10_traj"], 1e-4)


@pytest.mark.parametrize(("solver", "peer"), [("heun", "heun2"), ("midpoint", "midpoint")])
def test_other_solvers_are_the_peers(solver, peer):
    times = time_grid(9, end=0.999, shift=SHIFTS["shift256"])
    x = sample(plain(), golden("ode")["z"], solver=solver, times=times)
    close(x, golden("ode")[f"plain_hot_shift256_n10_{peer}_last"], 1e-4)


def test_dopri5_samples_are_near_the_peers():
    """Near only: noise that differs in its last bit already takes other steps, and so moves values by up to 0.04."""
    times = time_grid(9, end=0.999, shift=SHIFTS["shift256"])
    x = sample(plain(), golden("ode")["z"], solver="dopri5", times=times)
    assert (x - golden("ode")["plain_hot_shift256_n10_dopri5_last"]).abs().mean() < 0.02


# ---- what is asked of whom

LABELS = torch.tensor([3, 1])


def strong(x, t, y):
    assert len(x) == len(t) == len(y)
    return x + (10 * y + t)[:, None, None, None]


def weak(x, t, y):
    assert len(x) == len(t) == len(y)
    return 0.5 * x - (y + 2 * t)[:, None, None, None]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.42, 4.0])
def test_autoguidance_extrapolates_from_the_guide(scale):
    x, t = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    main, guide = (network(x, t.expand(2), LABELS) for network in (strong, weak))
    close(autoguided_velocity(strong, weak, LABELS, scale)(x, t), guide + scale * (main - guide), 1e-12)


def test_at_scale_1_the_guide_is_never_called():
    velocity = autoguided_velocity(strong, None, LABELS, 1.0)
    x = torch.randn(2, 4, 2, 2)
    assert torch.equal(velocity(x, torch.tensor(0.4)), strong(x, torch.full((2,), 0.4), LABELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_guide_costs_only_where_it_acts(dtype):
    x, times = torch.zeros(2, 4, 2, 2, dtype=dtype), time_grid(10)
    for interval, guided in (((0.0, 1.0), 10), ((0.1, 0.3), 3), ((0.7, 0.9), 3), ((0.25, 0.25), 0)):
        main, guide = CountedNetwork(strong), CountedNetwork(weak)
        velocity = autoguided_velocity(main, guide, LABELS, 2.0, interval=interval)
        sample(velocity, x, solver="euler", times=times)
        assert (main.calls, main.rows) == (10, 20)
        assert (guide.calls, guide.rows) == (guided, 2 * guided)


def test_the_guide_can_be_decided_by_another_time():
    """As Heun of REPA asks: its corrector goes by the time at which the step started."""
    main, guide = CountedNetwork(strong), CountedNetwork(weak)
    velocity = autoguided_velocity(main, guide, LABELS, 2.0, interval=(0.0, 0.3))
    sample(velocity, torch.zeros(2, 4, 2, 2), solver="heun_repa", times=time_grid(4))
    assert main.calls == 7
    assert guide.calls == 4  # of the steps that start at 0 and 0.25


def test_the_difference_is_taken_in_the_precision_of_the_state():
    """In bfloat16, 1000 + 4 is 1004 and 1001 rounds to 1000: the scale would blow the rounding up."""

    def network(value):
        def answer(x, t, y):
            assert x.dtype == t.dtype == torch.float32
            return torch.full_like(x, value).bfloat16()

        return answer

    velocity = autoguided_velocity(network(1004.0), network(1000.0), LABELS, 1.1, network_dtype=torch.float32)
    result = velocity(torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    assert result.dtype == torch.float64
    close(result, torch.full_like(result, 1004.4), 1e-9)


def test_an_empty_interval_is_named():
    with pytest.raises(UserError, match=r"interval is \[0.7, 0.3\]"):
        autoguided_velocity(strong, weak, LABELS, 2.0, interval=(0.7, 0.3))
