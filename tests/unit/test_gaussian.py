"""Closed forms of samplers and of training on Gaussian data: stated values, and the solvers and losses themselves."""

from __future__ import annotations

import math

import pytest
import torch

from mixflow.flow import gaussian, input_time_density, time_pair
from mixflow.models.exact import GaussianField
from mixflow.sampling import sample, time_grid


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


LAM, MU = tensor(0.2, 1.0, 3.0), tensor(1.0, -2.0, 0.5)
SAMPLES = 100_000  # the standard deviation of a standard deviation is then 0.2%


def exact(lam):
    return lambda t: gaussian.velocity_slope(lam, t)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field(lam, mu):
    size = math.isqrt(len(lam))
    shape = (1, size, size) if size**2 == len(lam) else (len(lam), 1, 1)
    return GaussianField.from_spectrum(mu.reshape(shape), lam), shape


def solve(lam, mu, noise, **options):
    """States that a solver ends in, [n,d], from noise [n,d], through the network of the exact field."""
    net, shape = field(lam, mu)
    labels = torch.zeros(len(noise), dtype=torch.int64)
    x = sample(lambda x, t: net(x, t, labels), noise.reshape(-1, *shape), **options)
    return x.flatten(1)


# ---- samplers


@pytest.mark.parametrize(
    ("factors", "lam", "steps", "ratio"),
    [
        (gaussian.euler_factors, 1, 10, 0.87898),
        (gaussian.euler_factors, 1, 50, 0.97462),
        (gaussian.euler_factors, 4, 20, 0.92850),
        (gaussian.euler_factors, 0.1, 5, 0.67616),
        (gaussian.euler_factors, 25, 10, 0.77088),
        (gaussian.euler_factors, 7, 1, 0.0),
        (gaussian.heun_factors, 1, 5, 0.99479),
        (gaussian.heun_factors, 4, 10, 0.99414),
        (gaussian.heun_factors, 0.25, 10, 1.00344),
    ],
)
def test_std_of_uniform_grids(factors, lam, steps, ratio):
    std = gaussian.std_along(factors(exact(tensor(lam)), time_grid(steps)))
    assert std[-1].item() / math.sqrt(lam) == pytest.approx(ratio, abs=6e-6)


def test_equal_angles_are_the_best_grid_of_euler():
    angles = torch.linspace(0, math.pi / 2, 11, dtype=torch.float64)
    times = angles.sin() / (angles.sin() + math.sqrt(7) * angles.cos())
    best = gaussian.std_along(gaussian.euler_factors(exact(tensor(7.0)), times))[-1].item() / math.sqrt(7)
    assert best == pytest.approx(0.88349, abs=6e-6)
    even = gaussian.std_along(gaussian.euler_factors(exact(tensor(7.0)), time_grid(10)))[-1].item() / math.sqrt(7)
    assert even < best


@pytest.mark.parametrize("lam", [0.1, 1.0, 9.0])
def test_shrinkage_of_euler_is_exponential_up_to_the_third_order(lam):
    def error(steps):
        std = gaussian.std_along(gaussian.euler_factors(exact(tensor(lam)), time_grid(steps)))[-1]
        return abs((std / math.sqrt(lam) / gaussian.euler_shrinkage(tensor(lam), steps)).log().item())

    assert math.log2(error(200) / error(400)) == pytest.approx(3, abs=0.1)


def test_std_of_euler_maruyama():
    # 0.7503 is stated for dx = (v + w/2 score) dt + sqrt(w) dW with w = 1 - t, hence half of it here
    std = gaussian.euler_maruyama_std(exact(tensor(0.6)), time_grid(25), lambda t: (1 - t) / 2)
    assert std[-1].item() == pytest.approx(0.7503, abs=6e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama"])
def test_samplers_on_the_exact_field_have_the_std_of_the_closed_form(solver):
    """Monte Carlo within 1%, through the network and the solver themselves; every solver keeps the mean."""
    times = time_grid(7)
    options = {}
    if solver == "euler_maruyama":
        options = {"noise_at": lambda k: draws(SAMPLES, 3, 1, 1, seed=k + 1), "last_step": "none"}
        wanted = gaussian.euler_maruyama_std(exact(LAM), times, lambda t: 1 - t)
    else:
        factors = gaussian.euler_factors if solver == "euler" else gaussian.heun_factors
        wanted = gaussian.std_along(factors(exact(LAM), times))
    x = solve(LAM, MU, draws(SAMPLES, 3), solver=solver, times=times, **options)
    torch.testing.assert_close(x.std(0), wanted[-1], rtol=0.01, atol=0)
    torch.testing.assert_close(x.mean(0), MU, rtol=0, atol=0.02)


def test_seven_euler_steps():
    std = gaussian.std_along(gaussian.euler_factors(exact(LAM), time_grid(7)))
    torch.testing.assert_close(std[-1], tensor(0.35713, 0.83115, 1.41390), rtol=0, atol=6e-6)


def test_a_shrunk_network_has_a_power_of_the_flow():
    """v = k v* has the flow s^k; small Heun steps find it."""
    factors = gaussian.heun_factors(lambda t: 0.9 * gaussian.velocity_slope(tensor(0.25), t), time_grid(2000))
    assert gaussian.std_along(factors)[-1].item() == pytest.approx(0.53589, abs=1e-5)


def test_slope_at_the_ends():
    """At t=0 the velocity is mean - y; at t=1 it is y, also along null directions."""
    lam = tensor(0.0, 0.5, 4.0)
    torch.testing.assert_close(gaussian.velocity_slope(lam, 0.0), -torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(gaussian.velocity_slope(lam, 1.0), torch.ones(3, dtype=torch.float64))


# ---- other velocities, against least squares on draws


def pairs(seed=0, lam=LAM, mu=MU):
    noise, data = draws(2, SAMPLES, len(lam), seed=seed)
    return noise, mu + lam.sqrt() * data


def regression(target, x):
    """Slopes [d] of the best affine predictor of each column."""
    x, target = x - x.mean(0), target - target.mean(0)
    return (x * target).sum(0) / x.square().sum(0)


def test_slope_of_input_perturbation():
    noise, data = pairs()
    x = 0.4 * data + 0.6 * (noise + 0.3 * draws(SAMPLES, 3, seed=9))
    found = gaussian.input_perturbation_slope(LAM, 0.4, 0.3)
    torch.testing.assert_close(found, regression(data - noise, x), rtol=0, atol=0.02)
    torch.testing.assert_close(
        gaussian.input_perturbation_slope(LAM, 0.4, 0.0), gaussian.velocity_slope(LAM, 0.4), rtol=0, atol=1e-14
    )


def test_slopes_after_an_own_step():
    noise, data = pairs()
    x = 0.3 * data + 0.7 * noise
    moved = x + 0.1 * (MU + gaussian.velocity_slope(LAM, 0.3) * (x - 0.3 * MU))
    close = {"rtol": 0, "atol": 0.02}
    torch.testing.assert_close(gaussian.rollout_slope(LAM, 0.3, 0.4), regression(data - noise, moved), **close)
    torch.testing.assert_close(gaussian.rollout_data_slope(LAM, 0.3, 0.4), regression(data, moved), **close)


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (1.02, False)])
def test_epsilon_scaling_leaves_more_noise(factor, same):
    a, t = gaussian.velocity_slope(LAM, 0.4), 0.4
    y = draws(3)
    v = a * y
    scaled = v + (1 - 1 / factor) * (y - t * v) / t
    torch.testing.assert_close(gaussian.epsilon_scaled_slope(a, t, factor) * y, scaled, rtol=1e-12, atol=1e-12)
    assert torch.equal(scaled, v) == same


def test_dcw_on_all_bands_is_a_shorter_step():
    """x' += c (x' - D) after Euler's x', with D the data estimate of the same call."""
    times, c = time_grid(5), 0.03
    y = draws(4, 3)
    x = y
    for t, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        v = gaussian.velocity_slope(LAM, t) * x
        moved, estimate = x + (end - t) * v, x + (1 - t) * v
        x = moved + c * (moved - estimate)
    found = gaussian.shorter_step_factors(exact(LAM), times, c).prod(0) * y
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gaussian.shorter_step_factors(exact(LAM), times, 0.0), gaussian.euler_factors(exact(LAM), times)
    )


# ---- what even a perfect network shows


@pytest.mark.parametrize(("start", "wanted"), [(0.3, 0.32564), (0.7, 0.73108)])
def test_one_step_falls_behind(start, wanted):
    assert gaussian.one_step_time(LAM, MU, start, 0.05).item() == pytest.approx(wanted, abs=6e-6)


@pytest.mark.parametrize(("start", "wanted"), [(0, 0.45364), (2, 0.61837), (4, 0.81973)])
def test_seven_steps_fall_behind(start, wanted):
    growth = gaussian.euler_factors(exact(LAM), time_grid(7))[start:].prod(0)
    found = gaussian.projected_time(LAM, MU, start / 7, 1.0, growth)
    assert found.item() == pytest.approx(wanted, abs=6e-6)


def test_projection_of_draws():
    """Least squares over m on the states of the solver itself, from a true x_(2/7)."""
    noise, data = pairs(seed=3)
    times = time_grid(7)[2:]
    x = solve(LAM, MU, times[0] * data + (1 - times[0]) * noise, solver="euler", times=times)
    u = data - noise
    growth = gaussian.euler_factors(exact(LAM), times).prod(0)
    wanted = gaussian.projected_time(LAM, MU, float(times[0]), 1.0, growth)
    assert (((x - noise) * u).sum() / u.square().sum()).item() == pytest.approx(wanted.item(), rel=0.01)


def test_perfect_samples_from_standard_normal_data_project_on_the_noise():
    one, zero = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    assert gaussian.projected_time(one, zero, 0.0, 1.0, one).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(("lam", "t", "loss"), [(1.0, 0.5, 2.0), (3.0, 0.3, 3.94737)])
def test_irreducible_loss(lam, t, loss):
    assert gaussian.irreducible_loss(tensor(lam), t).item() == pytest.approx(loss, abs=6e-6)


def test_what_the_velocity_explains_and_the_loss_make_up_the_target():
    energy = (MU.square() + LAM + 1).sum()
    unexplained = gaussian.irreducible_loss(LAM, 0.3).sum() / energy
    assert (gaussian.explained_share(LAM, MU, 0.3) + unexplained).item() == pytest.approx(1, abs=1e-14)


def test_information_on_time_is_the_variance_of_the_score():
    t, h = 0.6, 1e-5

    def log_density(y, t):
        s = gaussian.marginal_std(LAM, t)
        return (-((y - t * MU) ** 2) / (2 * s**2) - s.log()).sum(1)

    noise, data = pairs(seed=5)
    y = t * data + (1 - t) * noise
    score = (log_density(y, t + h) - log_density(y, t - h)) / (2 * h)
    assert gaussian.time_information(LAM, MU, t).item() == pytest.approx(score.var().item(), rel=0.03)
    null = torch.zeros(1, dtype=torch.float64)
    assert gaussian.time_information(null, null, 0.75).item() == pytest.approx(2 / 0.25**2)


# ---- MixFlow


@pytest.mark.parametrize(
    ("t", "gamma", "slope", "loss"),
    [
        (0.3, 0.4, -1.0562, 0.8115),
        (0.7, 0.8, -0.7885, 1.1949),
        (1.0, 0.8, -0.2398, 1.4646),
        (1.0, 1.0, -0.4744, 1.3690),
    ],
)
def test_best_affine_network_of_mixflow(t, gamma, slope, loss):
    found = gaussian.linear_mixflow(tensor(0.49), tensor(0.7), t, gamma)
    assert found[0].item() == pytest.approx(slope, abs=6e-5)
    assert found[1].item() == pytest.approx(loss, abs=6e-5)


def test_without_slowing_the_best_affine_network_is_the_exact_one():
    slope, loss = gaussian.linear_mixflow(LAM, MU, 0.3, 0.0)
    torch.testing.assert_close(slope, gaussian.velocity_slope(LAM, 0.3))
    torch.testing.assert_close(loss, gaussian.irreducible_loss(LAM, 0.3))


@pytest.mark.parametrize(("gamma", "mean"), [(0.4, 0.53333), (0.8, 0.4), (1.0, 0.33333)])
def test_density_of_the_input_times(gamma, mean):
    uniforms = torch.rand(3, SAMPLES, generator=torch.Generator().manual_seed(0))
    m = time_pair(uniforms, "mixflow", gamma)[1]
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    centres = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    density = input_time_density(centres, gamma)
    assert (density * centres).mean().item() == pytest.approx(mean, abs=6e-6)
    mass = density.reshape(10, -1).mean(1) / 10
    found = torch.histogram(m.double(), edges).hist / SAMPLES
    torch.testing.assert_close(found, mass, rtol=0, atol=0.005)
