"""Solvers, grids and guidance, against the samples that SiT's own code drew (tests/golden/sit)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixflow.flow import INTERPOLANTS
from mixflow.models import load_model
from mixflow.runtime.errors import UserError
from mixflow.sampling import DIFFUSIONS, SOLVERS, CountedNetwork, guided_velocity, sample, time_grid

GOLDEN = Path(__file__).parents[1] / "golden" / "sit"
RUNS = json.loads((GOLDEN / "samplers.json").read_text())
SOLVER_NAMES = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun", "rk4": "rk4"}
CALLS_PER_STEP = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}  # the peer's time grids are float32 in float64 runs too
FIXED_STEP = ("euler", "heun", "heun_repa", "midpoint", "rk4")

golden = functools.cache(lambda name: load_file(GOLDEN / f"{name}.safetensors"))


@functools.cache
def sit(model, dtype):
    return load_model("sit", GOLDEN / f"model_{model}.safetensors", num_heads={"a": 4, "b": 3}[model]).to(dtype)


def runs(kind, *, adaptive=False):
    """Names of stored runs, as tests' parameters."""
    return [name for name in RUNS if f"{kind}." in name and ("dopri5" in name) == adaptive]


def words(name):
    """What the name of a run says: (model, interpolant, guidance scale, dtype, the parts between)."""
    model = "b" if name.startswith("b.") else "a"
    left, right = name.removeprefix("b.").split(".cfg")
    _, path, _, *rest = left.split(".")
    scale, precision = right.rsplit(".", 1)
    dtype = torch.float32 if precision == "f32" else torch.float64
    return model, INTERPOLANTS[path.lower()], 1.0 if scale == "None" else float(scale), dtype, rest


def guided(name, file):
    """The counted network and guided velocity of a run, and its noise, in the run's dtype."""
    model, _, scale, dtype, _ = words(name)
    network, g = CountedNetwork(sit(model, dtype)), golden(file)
    null_label = sit(model, dtype).null_label
    return network, guided_velocity(network, g["y"], null_label, scale, channels=3), g["z"].to(dtype)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def decay(x, t, decided_at=None):
    """A velocity that is no straight line, elementwise."""
    return torch.sin(3 * x) * (1 - t) - x * t


# ---- against the peer


@pytest.mark.parametrize("name", runs("ode"))
def test_fixed_step_samples_are_the_peers(name):
    model, _, scale, dtype, (method, points, *_) = words(name)
    network, velocity, noise = guided(name, f"ode_{model}")
    steps = int(points[1:]) - 1  # torchdiffeq counts points
    x = sample(velocity, noise, solver=SOLVER_NAMES[method], times=time_grid(steps))
    assert x.dtype == dtype
    close(x, golden(f"ode_{model}")[f"{name}.final"], TOLERANCE[dtype])
    assert network.calls == RUNS[name]["nfe"] == CALLS_PER_STEP[method] * steps
    assert network.rows == network.calls * len(noise) * (1 if scale == 1 else 2)


@pytest.mark.parametrize("name", runs("ode", adaptive=True))
def test_dopri5_samples_are_near_the_peers(name):
    """Near only: one unit in the last place of the float32 time features already makes the peer choose other steps."""
    model, _, _, _, rest = words(name)
    _, velocity, noise = guided(name, f"ode_{model}")
    tolerances = [float(word[4:]) for word in rest if word.startswith(("atol", "rtol"))]
    options = dict(zip(("atol", "rtol"), tolerances, strict=True)) if tolerances else {}
    x = sample(velocity, noise, solver="dopri5", times=time_grid(7), **options)
    close(x, golden(f"ode_{model}")[f"{name}.final"], 2e-4 if "atol1e-8" in name else 2e-2)


@pytest.mark.parametrize("name", runs("sde"))
def test_sde_samples_are_the_peers_with_half_its_calls(name):
    model, interpolant, scale, dtype, (_, form, last, *rest) = words(name)
    network, velocity, noise = guided(name, f"sde_{model}")
    points = 250 if "N250" in rest else 10
    draws = golden("sde_a")[f"noise.cfg{'None' if scale == 1 else ''}.N{points}"].to(dtype)
    if last == "None":
        times = time_grid(points - 1)
    else:
        times = time_grid(points, last_step_size=0.1 if "last0" in rest else 0.04)
    x = sample(
        velocity,
        noise,
        solver="euler_maruyama",
        times=times,
        interpolant=interpolant,
        diffusion=form,
        norm=2.0 if "norm2" in rest else 1.0,
        last_step=last.lower(),
        noise_at=lambda step: draws[step],
    )
    assert x.dtype == dtype
    close(x, golden("sde_a")[f"{name}.final"], TOLERANCE[dtype])
    assert network.calls == len(times) - 1 == (RUNS[name]["nfe"] + 1) // 2  # a last step without score costs it one


@pytest.mark.parametrize("path", ["Linear", "GVP"])
@pytest.mark.parametrize("form", list(DIFFUSIONS))
def test_diffusions_are_the_peers(path, form):
    g, interpolant = golden("paths"), INTERPOLANTS[path.lower()]
    close(DIFFUSIONS[form](interpolant, g["t"], 1.0), g[f"{path}.diffusion.{form}"].expand(6), 1e-6)
    if form == "decreasing":
        close(DIFFUSIONS[form](interpolant, g["t"], 0.5), g[f"{path}.diffusion.{form}.norm0.5"], 1e-6)


# ---- solvers


@pytest.mark.parametrize("solver", [*FIXED_STEP, "euler_maruyama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_batch(solver, dtype):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 4, 3, 3, generator=generator, dtype=dtype)
    draws = torch.randn(6, 5, 4, 3, 3, generator=generator, dtype=dtype)

    def solve(rows):
        options = {"noise_at": lambda step: draws[step, rows]} if solver == "euler_maruyama" else {}
        return sample(decay, noise[rows], solver=solver, times=time_grid(6), **options)

    whole = solve(slice(None))
    assert whole.dtype == dtype
    assert torch.equal(whole, torch.cat([solve(slice(0, 2)), solve(slice(2, 5))]))


@pytest.mark.parametrize("solver", [*FIXED_STEP, "euler_maruyama"])
def test_callback_sees_every_state(solver):
    options = {"noise_at": lambda step: torch.zeros(2, 3)} if solver == "euler_maruyama" else {}
    noise, times, seen = torch.ones(2, 3), time_grid(4, end=0.9), []
    x = sample(decay, noise, solver=solver, times=times, callback=lambda *state: seen.append(state), **options)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(torch.stack([t for _, _, t in seen]), times)
    assert torch.equal(seen[0][1], noise)
    assert torch.equal(seen[-1][1], x)
    if solver != "heun_repa":  # whose last step differs from the others
        halfway = sample(decay, noise, solver=solver, times=times[:3], **(options and {**options, "last_step": "none"}))
        assert torch.equal(seen[2][1], halfway)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_velocity_gets_one_time_in_the_dtype_of_the_state(solver):
    def velocity(x, t, decided_at=None):
        for time in (t, t if decided_at is None else decided_at):
            assert time.ndim == 0
            assert time.dtype == x.dtype == torch.float32
        assert not torch.is_grad_enabled()
        return weight * x

    weight = torch.tensor(0.5, requires_grad=True)
    options = {"noise_at": lambda step: torch.zeros(2, 3)} if solver == "euler_maruyama" else {}
    assert not sample(velocity, torch.ones(2, 3), solver=solver, times=time_grid(2), **options).requires_grad


def test_heun_of_repa_ends_with_eulers_step_and_hands_on_where_a_step_started():
    noise, times, asked = torch.randn(2, 3, dtype=torch.float64), time_grid(4), []

    def velocity(x, t, decided_at=None):
        asked.append((t.item(), None if decided_at is None else decided_at.item()))
        return decay(x, t)

    x = sample(velocity, noise, solver="heun_repa", times=times)
    assert asked == [(0, None), (0.25, 0), (0.25, None), (0.5, 0.25), (0.5, None), (0.75, 0.5), (0.75, None)]
    start = sample(decay, noise, solver="heun", times=times[:4])
    assert torch.equal(x, sample(decay, start, solver="euler", times=times[3:]))


def test_last_steps_add_no_noise_and_end_where_they_say():
    """On the path of one pair (noise, data) Tweedie's jump from any t lands on the data."""
    data = torch.full((2, 3), 0.7, dtype=torch.float64)
    noise = torch.full((2, 3), -1.3, dtype=torch.float64)

    def velocity(x, t):
        return (data - x) / (1 - t)  # the field of a single data point

    def solve(last_step, last_size):
        return sample(
            velocity,
            noise,
            solver="euler_maruyama",
            times=time_grid(5, last_step_size=last_size),
            last_step=last_step,
            noise_at=lambda step: torch.full_like(noise, 0.1 * (step + 1)),
        )

    close(solve("tweedie", 0.3), data, 1e-12)
    close(solve("euler", 0.3), data, 1e-12)
    states = {last: solve(last, 0.3) for last in ("mean", "euler", "none")}
    assert len({round(state[0, 0].item(), 6) for state in states.values()}) == 3
    # the noise of the last of five steps, sqrt(2 (1 - t) h) at t = 0.7, is all that "none" has more than "mean"
    close(states["none"] - states["mean"], torch.full_like(noise, 0.5 * (2 * 0.3 * 0.3) ** 0.5), 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(solver="hein"), r"'hein' is not a solver; did you mean 'heun'\?"),
        (dict(times=torch.tensor([0.0, 0.5, 0.5])), "ascending"),
        (dict(times=torch.tensor([1.0, 0.0])), "ascending"),
        (dict(times=torch.tensor([0.0])), "at least two"),
        (dict(solver="euler_maruyama", noise_at=torch.zeros, diffusion="sigmoid"), "'sigmoid' is not a diffusion"),
        (dict(solver="euler_maruyama", noise_at=torch.zeros, last_step="Mean"), "'Mean' is not a last step"),
    ],
)
def test_bad_solver_input_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        sample(decay, torch.zeros(1, 1), **({"times": time_grid(2)} | arguments))


# ---- time grid


def test_time_grid_is_even_and_ends_exactly():
    times = time_grid(250)
    assert times.dtype == torch.float64
    assert torch.equal(times, torch.linspace(0, 1, 251, dtype=torch.float64))
    close(time_grid(4, start=0.2, end=0.6), torch.tensor([0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64), 1e-15)
    sde = time_grid(250, last_step_size=0.04)
    assert len(sde) == 251
    assert sde[-1] == 1
    close(sde[[0, 1, -2]], torch.tensor([0, 0.96 / 249, 0.96], dtype=torch.float64), 1e-15)


def test_shifted_grid_is_raes():
    """RAE's 50 points at 256 and 512 px, in its reversed time, to the digits that its grid was noted with."""
    times_256 = 1 - time_grid(49, end=0.999, shift=48**0.5)
    close(times_256[[0, 1, 2, -3, -2, -1]].float(), torch.tensor([1.0, 0.9970, 0.9939, 0.2320, 0.1315, 0.0069]), 6e-5)
    times_512 = 1 - time_grid(49, end=0.999, shift=192**0.5)
    close(times_512[-3:].float(), torch.tensor([0.3766, 0.2324, 0.0137]), 6e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_steps=0), "num_steps is 0"),
        (dict(num_steps=2, start=0.5, end=0.5), "start and end are 0.5 and 0.5"),
        (dict(num_steps=2, end=1.1), "start and end are 0.0 and 1.1"),
        (dict(num_steps=2, last_step_size=1.0), "last_step_size is 1.0"),
        (dict(num_steps=1, last_step_size=0.04), "num_steps is 1"),
        (dict(num_steps=2, shift=-1.0), "shift is -1.0"),
    ],
)
def test_bad_grid_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        time_grid(**arguments)


# ---- guidance

LABELS, NULL = torch.tensor([3, 1]), 9


def by_label(x, t, y):
    """A network whose answer shows what it was asked."""
    assert len(x) == len(t) == len(y)
    return x + (10 * y + t)[:, None, None, None]


@pytest.mark.parametrize("t", [0.3, 0.5, 0.7])
def test_guidance_extrapolates_from_the_null_label(t):
    x, time = torch.randn(2, 4, 2, 2, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
    velocity = guided_velocity(by_label, LABELS, NULL, 1.5, channels=3, interval=(0.3, 0.7))
    cond = x + (10 * LABELS.double() + t)[:, None, None, None]
    null = x + 10 * NULL + t
    close(velocity(x, time)[:, :3], (null + 1.5 * (cond - null))[:, :3], 1e-12)
    close(velocity(x, time)[:, 3:], cond[:, 3:], 1e-12)
    everywhere = guided_velocity(by_label, LABELS, NULL, 1.5)
    close(everywhere(x, time), null + 1.5 * (cond - null), 1e-12)


def test_guidance_can_be_decided_by_another_time():
    x, early, late = torch.zeros(2, 4, 2, 2), torch.tensor(0.1), torch.tensor(0.4)
    for scale, rows in ((1.0, [2, 2, 2]), (2.0, [4, 2, 4])):
        asked = []

        def network(x, t, y, asked=asked):
            asked.append((len(x), t[0].item()))
            return by_label(x, t, y)

        velocity = guided_velocity(network, LABELS, NULL, scale, interval=(0.3, 0.7))
        velocity(x, late)
        velocity(x, early)
        velocity(x, early, late)
        assert [n for n, _ in asked] == rows
        assert [t for _, t in asked] == pytest.approx([0.4, 0.1, 0.1])  # the network is told the time of x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance_costs_only_where_it_acts(dtype):
    x, times = torch.zeros(2, 4, 2, 2, dtype=dtype), time_grid(10)
    rows = []
    # both edges belong to the interval, though linspace may put 0.3 a digit above 0.3
    for options in (
        {"scale": 1.0},
        {"scale": 2.0},
        {"scale": 2.0, "interval": (0.1, 0.3)},
        {"scale": 2.0, "interval": (0.7, 0.9)},
    ):
        network = CountedNetwork(by_label)
        sample(guided_velocity(network, LABELS, NULL, **options), x, solver="euler", times=times)
        assert network.calls == 10
        rows.append(network.rows)
    assert rows == [20, 40, 7 * 2 + 3 * 4, 7 * 2 + 3 * 4]


def test_network_of_lower_precision_leaves_the_state_alone():
    velocity = guided_velocity(lambda x, t, y: by_label(x, t, y).bfloat16(), LABELS, NULL, 2.0)
    assert sample(velocity, torch.zeros(2, 4, 2, 2), solver="heun", times=time_grid(2)).dtype == torch.float32
    assert velocity(torch.zeros(2, 4, 2, 2), torch.tensor(0.5)).dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_float64_state_is_handed_over_in_the_networks_dtype(scale):
    def network(x, t, y):
        assert x.dtype == t.dtype == torch.float32
        return by_label(x, t, y)

    velocity = guided_velocity(network, LABELS, NULL, scale, network_dtype=torch.float32)
    noise = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    x = sample(velocity, noise, solver="heun_repa", times=time_grid(3))
    assert x.dtype == torch.float64
    assert not torch.equal(x, x.float().double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(scale=2.0, interval=(0.7, 0.3)), r"interval is \[0.7, 0.3\]"),
        (dict(scale=2.0, channels=0), "channels is 0"),
        (dict(scale=2.0, channels=5), "channels is 5 but the latents have 4"),
        (dict(scale=2.0, null_label=None), "no null label"),
    ],
)
def test_bad_guidance_is_named(arguments, message):
    def velocity(x, t):
        return guided_velocity(by_label, LABELS, **({"null_label": NULL} | arguments))(x, t)

    with pytest.raises(UserError, match=message):
        velocity(torch.zeros(2, 4, 2, 2), torch.tensor(0.5))
