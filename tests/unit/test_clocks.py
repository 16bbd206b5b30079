"""Clocks of states on the linear path: closed forms on Gaussian data, what a perfect sampler shows, and the traps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mixflow.evaluation.clocks import (
    axis_moments,
    energy_time,
    exact_own_end_times,
    exact_paired_times,
    kl_time,
    least_energy,
    null_space_time,
    paired_time,
    quantiles,
    wasserstein_time,
)
from mixflow.flow.gaussian import euler_factors, marginal_std, projected_time, std_along, velocity_slope
from mixflow.sampling import sample, time_grid
from mixflow.stages.slow_flow import gaussian_field

SPIKED = torch.cat([torch.full((4,), 4.0), torch.full((60,), 1e-12)]).double()
POWER_LAW = torch.arange(1, 65, dtype=torch.float64) ** -1.5
POWER_LAW = POWER_LAW * 32 / POWER_LAW.sum()
LAM, MU = torch.tensor([0.2, 1.0, 3.0]).double(), torch.tensor([1.0, -2.0, 0.5]).double()


def pairs(lam, mu):
    """Return x0 and x1 [4^d,d] whose first and second moments are those of independent noise and data, exactly."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2 * len(lam)))).double()
    return signs[:, : len(lam)], mu + lam.sqrt() * signs[:, len(lam) :]


def pooled(x, noise, data):
    m, _, length = paired_time(x, noise, data)
    return float((m * length).sum() / length.sum())


def flow(x, lam, mu, times, scale=1.0, solver="euler"):
    """Sample the exact Gaussian field, as the stage does, in float64: float32 would hide the sixth digit."""

    def velocity(x, t):
        return scale * (mu + velocity_slope(lam, t) * (x - t * mu))

    states = []
    sample(velocity, x, solver=solver, times=times, callback=lambda k, x, t: states.append(x))
    return states


# --- the paired measure


def test_the_nearest_time_is_the_nearest_of_a_fine_grid():
    generator = torch.Generator().manual_seed(0)
    noise, data, x = torch.randn(3, 5, 2, 4, 4, generator=generator).double()
    x[0] = 1.5 * data[0] - 0.5 * noise[0]  # beyond the data, and not cut off
    m, distance, length = paired_time(x, noise, data)
    grid = torch.linspace(-1, 2, 30001).double()
    for i in range(5):
        path = grid[:, None] * data[i].flatten() + (1 - grid[:, None]) * noise[i].flatten()
        distances = (path - x[i].flatten()).square().mean(dim=1).sqrt()
        assert m[i].item() == pytest.approx(grid[distances.argmin()].item(), abs=1e-4)
        assert distance[i].item() == pytest.approx(distances.min().item(), abs=1e-6)
        assert length[i].item() == pytest.approx((data[i] - noise[i]).square().sum().item())
    assert m[0].item() == pytest.approx(1.5)
    assert distance[0].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("first", "time"), [(0, 0.45364), (2, 0.61837), (4, 0.81973)])
def test_seven_euler_steps_end_at_the_closed_form(first, time):
    """Data and noise of exact moments, a perfect field: the times at t=1 after the steps from 0, 2/7 and 4/7."""
    noise, data = pairs(LAM, MU)
    times = time_grid(7)[first:]
    start = times[0] * data + (1 - times[0]) * noise
    assert pooled(flow(start, LAM, MU, times)[-1], noise, data) == pytest.approx(time, abs=6e-6)


@pytest.mark.parametrize("start", [0.0, 0.05, 0.4])
def test_the_exact_flow_from_either_start(start):
    noise, data = pairs(LAM, MU)
    times = time_grid(400, start=start)
    states = flow(start * data + (1 - start) * noise, LAM, MU, times, solver="rk4")
    expected = exact_paired_times(times, MU.square(), LAM, start)
    assert [pooled(x, noise, data) for x in states] == pytest.approx(expected, abs=1e-7)
    assert expected[0] == pytest.approx(start, abs=1e-12)
    assert expected[-1] < 0.9  # a perfect sampler, and yet


def test_the_own_end_point_of_the_exact_flow():
    noise, _ = pairs(LAM, MU)
    states = flow(noise, LAM, MU, time_grid(400), solver="rk4")
    expected = exact_own_end_times(time_grid(400), MU.square(), LAM)
    assert [pooled(x, noise, states[-1]) for x in states] == pytest.approx(expected, abs=1e-7)
    assert (expected[0], expected[-1]) == pytest.approx((0, 1), abs=1e-12)


def test_straight_flows_reach_their_own_end_in_time_and_miss_their_pair():
    """The exact flow to a point mass is straight; towards N(0, I) it ends where it began, at the nearest time 0."""
    times = time_grid(10)
    nothing = torch.zeros(3).double()
    assert exact_own_end_times(times, MU.square(), nothing) == pytest.approx(times.tolist())
    assert exact_paired_times(times, MU.square(), nothing) == pytest.approx(times.tolist())
    assert exact_paired_times(times, nothing, torch.ones(3).double())[-1] == pytest.approx(0, abs=1e-12)


def test_reading_from_a_real_interpolant_lags_less_than_from_noise():
    times = time_grid(20, start=0.05)
    later = exact_paired_times(times, torch.zeros(64).double(), POWER_LAW, 0.05)
    earlier = exact_paired_times(times, torch.zeros(64).double(), POWER_LAW)
    assert all(a > b for a, b in zip(later, earlier, strict=True))


@pytest.mark.parametrize(
    ("lam", "at", "wasserstein", "kl", "energy", "paired"),  # clocks minus t
    [
        (SPIKED, 0.5, -0.005, -0.001, 0.012, 0.37),
        (SPIKED, 1.0, -0.016, 0.0, -0.089, 0.71),
        (POWER_LAW, 0.5, -0.011, 0.001, 0.046, 0.29),
        (POWER_LAW, 1.0, -0.079, -0.046, -0.093, 0.39),
    ],
)
def test_what_a_perfect_network_shows(lam, at, wasserstein, kl, energy, paired):
    """20 Euler steps with the exact field: no clock says t, and the paired measure is far below it.

    Values of a survey, rounded; its W2 of the spiked law at t=1 is -.0150 by hand: 4 (.143 - 2e)^2 + 60 e^2 is least
    at e = .0150.
    """
    times, step, zero = time_grid(20), round(20 * at), torch.zeros_like(lam)
    std = std_along(euler_factors(lambda t: velocity_slope(lam, t), times))[step]
    assert wasserstein_time(at, zero, std.square(), zero, lam) - at == pytest.approx(wasserstein, abs=1.1e-3)
    assert kl_time(at, zero, std.square(), zero, lam) - at == pytest.approx(kl, abs=6e-4)
    found = energy_time(at, float(std.square().sum()), float(lam.sum()), len(lam))
    assert found is not None
    assert found - at == pytest.approx(energy, abs=6e-4)
    assert float(projected_time(lam, zero, 0.0, at, std)) == pytest.approx(paired, abs=6e-3)


def test_the_null_field_runs_through_the_sampler_as_the_closed_form_says():
    """The stage's field, on turned axes, in float32: the pooled time after 20 Euler steps."""
    turned, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double())
    field = gaussian_field(POWER_LAW, turned, lambda labels: torch.zeros(64).double())
    noise, data = torch.randn(2, 4096, 64, generator=torch.Generator().manual_seed(1)).double()
    data = (data * POWER_LAW.sqrt()) @ turned.T
    labels = torch.zeros(4096, dtype=torch.int64)

    def velocity(x, t):
        return field(x.view(-1, 1, 8, 8), t.expand(4096), labels).flatten(1)

    end = sample(velocity, noise.float(), solver="euler", times=time_grid(20))
    times = time_grid(20)
    std = std_along(euler_factors(lambda t: velocity_slope(POWER_LAW, t), times))[-1]
    expected = float(projected_time(POWER_LAW, torch.zeros(64).double(), 0.0, 1.0, std))
    assert pooled(end.double(), noise, data) == pytest.approx(expected, abs=5e-3)


def test_quantiles_are_those_over_images():
    values = np.stack([np.arange(101.0), np.zeros(101)], axis=1)
    found = quantiles(values)
    assert [found[name][0] for name in ("min", "p1", "p5", "p25", "median", "p75", "p95", "p99", "max", "mean")] == [
        0, 1, 5, 25, 50, 75, 95, 99, 100, 50,
    ]  # fmt: skip
    assert found["max"][1] == 0


# --- clocks of the marginal law


@pytest.mark.parametrize("lam", [LAM, SPIKED, POWER_LAW], ids=["three", "spiked", "power law"])
@pytest.mark.parametrize(("t", "true"), [(0.3, 0.27), (0.6, 0.55), (0.9, 0.97), (0.0, 0.02), (1.0, 0.93), (1.0, 1.0)])
def test_clocks_read_the_true_time_of_states_with_a_wrong_label(lam, t, true):
    mu = torch.linspace(-1, 1, len(lam)).double()
    mean, variance = true * mu, marginal_std(lam, true).square()
    assert wasserstein_time(t, mean, variance, mu, lam) == pytest.approx(true, abs=1e-6)
    assert kl_time(t, mean, variance, mu, lam) == pytest.approx(true, abs=1e-5)
    energy = float((variance + mean.square()).sum())
    assert energy_time(t, energy, float((lam + mu.square()).sum()), len(lam)) == pytest.approx(true, abs=1e-6)


def test_the_search_stays_on_its_side_of_the_mirror():
    """Isotropic data of variance 1: the marginals at m and 1 - m are equal."""
    lam, mu = torch.ones(16).double(), torch.zeros(16).double()
    variance = marginal_std(lam, 0.7).square()
    for t, nearest in ((0.8, 0.7), (0.6, 0.7), (0.2, 0.3), (0.4, 0.3)):
        assert wasserstein_time(t, mu, variance, mu, lam) == pytest.approx(nearest, abs=1e-6)
        assert kl_time(t, mu, variance, mu, lam) == pytest.approx(nearest, abs=1e-6)
        assert energy_time(t, float(variance.sum()), 16.0, 16) == pytest.approx(nearest, abs=1e-6)


def test_energy_below_that_of_any_time_has_none():
    lam = torch.ones(16).double()
    least = least_energy(16.0, 16)
    assert least == pytest.approx(float(marginal_std(lam, 0.5).square().sum()))
    assert energy_time(0.5, 0.99 * least, 16.0, 16) is None
    assert energy_time(0.5, least, 16.0, 16) == pytest.approx(0.5, abs=1e-7)
    assert energy_time(1.0, 17.0, 16.0, 16) > 1  # more than the data have: not cut off


def test_axes_without_variance_tell_the_noise_that_is_left():
    assert null_space_time(torch.cat([torch.ones(4), torch.full((60,), 0.04)]).double(), SPIKED) == pytest.approx(0.8)
    assert null_space_time(LAM, LAM) is None


def test_a_shrunk_network_is_late_and_the_clocks_say_so():
    """Its exact flow has std s^k (.53589 at the end for lam = .25, k = .9)."""
    lam, mu = torch.full((8,), 0.25).double(), torch.zeros(8).double()
    (*_, end) = flow(torch.ones(1, 8).double(), lam, mu, time_grid(400), scale=0.9, solver="rk4")
    assert end[0, 0].item() == pytest.approx(0.53589, abs=6e-6)
    late = wasserstein_time(0.5, mu, marginal_std(lam, 0.5) ** 1.8, mu, lam)
    assert marginal_std(lam[0], late).item() == pytest.approx(marginal_std(lam[0], 0.5).item() ** 0.9, abs=1e-8)
    assert late < 0.5


def test_moments_on_axes_and_coordinates():
    states = torch.randn(7, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    axes, _ = torch.linalg.qr(torch.randn(18, 18, generator=torch.Generator().manual_seed(1)).double())
    sums, squares = axis_moments(states, axes, None)
    turned = states.flatten(1).double() @ axes
    torch.testing.assert_close(sums, turned.sum(0))
    torch.testing.assert_close(squares.sum(), states.double().square().sum())
    sums, _ = axis_moments(states, None, torch.tensor([3, 11]))
    torch.testing.assert_close(sums, states.flatten(1).double().sum(0)[[3, 11]])
