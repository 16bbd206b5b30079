"""Solvers, loss and time laws on Gaussian data, where everything is known in closed form.

For data N(mu, lam) and noise N(0, 1), with s(t)^2 = t^2 lam + (1-t)^2, the exact velocity of the linear path is
v(x, t) = mu + a(t) (x - t mu), a = s'/s = (t lam - (1-t)) / s^2, and its flow is x_t = t mu + s(t) z. Every solver is
then affine in the noise: its mean and standard deviation follow from a few states, without Monte Carlo.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixflow.flow import Linear, flow_matching_loss, time_pair
from mixflow.sampling import sample, time_grid


def gaussian_velocity(lam, mu=0.0):
    def velocity(x, t):
        slope = (t * lam - (1 - t)) / (t**2 * lam + (1 - t) ** 2)
        return mu + slope * (x - t * mu)

    return velocity


def affine(solve):
    """(mean, std) of the end of an affine solver, from the images of z = 0 and z = 1."""
    mean, moved = solve(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    return mean, moved - mean


@pytest.mark.parametrize(
    ("solver", "lam", "steps", "ratio"),  # ratio = std of the samples over that of the data
    [
        ("euler", 1, 10, 0.87898),
        ("euler", 1, 50, 0.97462),
        ("euler", 4, 20, 0.92850),
        ("euler", 0.1, 5, 0.67616),
        ("euler", 25, 10, 0.77088),
        ("euler", 1, 1, 0.0),
        ("euler", 9, 1, 0.0),
        ("heun", 1, 5, 0.99479),
        ("heun", 4, 10, 0.99414),
        ("heun", 0.25, 10, 1.00344),
    ],
)
def test_std_of_uniform_grids(solver, lam, steps, ratio):
    _, std = affine(lambda z: sample(gaussian_velocity(lam), z, solver=solver, times=time_grid(steps)))
    assert std.item() / math.sqrt(lam) == pytest.approx(ratio, abs=6e-6)


def test_std_of_euler_is_a_product_of_cosines():
    """The factor of a step is the cosine of the angle between successive (t sqrt(lam), 1-t); equal angles are best."""
    angles = torch.linspace(0, math.pi / 2, 11, dtype=torch.float64)
    for lam in (0.25, 1.0, 9.0):
        times = angles.sin() / (angles.sin() + math.sqrt(lam) * angles.cos())
        _, std = affine(lambda z, lam=lam, times=times: sample(gaussian_velocity(lam), z, solver="euler", times=times))
        assert std.item() / math.sqrt(lam) == pytest.approx(math.cos(math.pi / 20) ** 10, abs=1e-12)
        assert std.item() / math.sqrt(lam) == pytest.approx(0.88349, abs=6e-6)


def test_euler_keeps_the_mean_and_shrinks_the_std():
    lam = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    mu = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mean, std = affine(lambda z: sample(gaussian_velocity(lam, mu), z.expand(2, 3), solver="euler", times=time_grid(7)))
    torch.testing.assert_close(mean, mu, rtol=0, atol=1e-12)
    torch.testing.assert_close(std, torch.tensor([0.35713, 0.83115, 1.41390], dtype=torch.float64), rtol=0, atol=6e-6)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk4", "dopri5"])
def test_every_solver_keeps_the_mean(solver):
    """The field moves t mu along a straight line, which every one-step method follows exactly."""
    for steps in (1, 3):
        mean = sample(
            gaussian_velocity(0.3, 1.7), torch.zeros(1, dtype=torch.float64), solver=solver, times=time_grid(steps)
        )
        assert mean.item() == pytest.approx(1.7, abs=1e-12)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order):
    """On v = k v*, whose flow is s^k; at k = 1 midpoint happens to be of order 3."""
    lam, k, start, end = 6.0, 0.6, 0.2, 0.9
    v = gaussian_velocity(lam)
    first, last = (math.hypot(t * math.sqrt(lam), 1 - t) ** k for t in (start, end))

    def error(steps):
        times = time_grid(steps, start=start, end=end)
        x = sample(lambda x, t: k * v(x, t), torch.tensor([first], dtype=torch.float64), solver=solver, times=times)
        return abs(x.item() - last)

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.1)


def test_dopri5_follows_the_exact_flow():
    """A velocity k v* has the flow s^k: a network that under-shoots by a tenth leaves too little (lam < 1) spread."""
    v = gaussian_velocity(0.25)
    options = dict(solver="dopri5", times=time_grid(1), atol=1e-9, rtol=1e-9)
    assert sample(v, torch.ones(1, dtype=torch.float64), **options).item() == pytest.approx(0.5, abs=1e-7)
    shrunk = sample(lambda x, t: 0.9 * v(x, t), torch.ones(1, dtype=torch.float64), **options)
    assert shrunk.item() == pytest.approx(0.53589, abs=6e-6)


def sde_std(lam, steps, **options):
    """Exact std of Euler-Maruyama: axis 0 carries x0, axis k+1 the noise of step k, and the result is their weights."""
    axes = torch.eye(steps + 1, dtype=torch.float64)
    x = sample(
        gaussian_velocity(lam),
        axes[0],
        solver="euler_maruyama",
        times=time_grid(steps),
        noise_at=lambda step: axes[step + 1],
        last_step="none",
        **options,
    )
    return x.norm().item()


def test_std_of_euler_maruyama():
    # 0.7503 is stated for dx = (v + w/2 score) dt + sqrt(w) dW, w = 1 - t, hence norm 1/2 here
    assert sde_std(0.6, 25, diffusion="linear", norm=0.5) == pytest.approx(0.7503, abs=6e-5)


@pytest.mark.parametrize("diffusion", ["sigma", "linear", "constant", "decreasing", "sin2"])
def test_every_diffusion_has_the_marginals_of_the_data(diffusion):
    # A w that does not vanish at t = 1 needs the score there, which Euler steps resolve slowly.
    tolerance = 0.01 if diffusion != "constant" else 0.05
    assert sde_std(0.6, 1000, diffusion=diffusion) == pytest.approx(math.sqrt(0.6), rel=tolerance)


def test_no_diffusion_is_the_euler_method():
    _, std = affine(lambda z: sample(gaussian_velocity(4), z, solver="euler", times=time_grid(20)))
    assert sde_std(4, 20, diffusion="constant", norm=0.0) == pytest.approx(std.item(), abs=1e-14)


# ---- what training converges to


def quadrature(lam, mu, t, gamma):
    """(noise, data, t, m, weights): exact for all polynomials of low degree in x0 ~ N(0,1), x1 ~ N(mu, lam) and m."""
    z, z_weight = np.polynomial.hermite_e.hermegauss(4)
    u, u_weight = np.polynomial.legendre.leggauss(4)
    noise, data, u_m = (torch.from_numpy(axis.ravel()) for axis in np.meshgrid(z, mu + math.sqrt(lam) * z, (u + 1) / 2))
    weights = [torch.from_numpy(axis.ravel()) for axis in np.meshgrid(z_weight, z_weight, u_weight)]
    product = weights[0] * weights[1] * weights[2]
    uniforms = torch.stack([torch.full_like(u_m, t**2), u_m, u_m])
    times, slowed = time_pair(uniforms, "mixflow", gamma)
    return noise[:, None], data[:, None], times, slowed, product / product.sum()


@pytest.mark.parametrize(
    ("t", "gamma", "slope", "loss"),
    [
        (0.3, 0.4, -1.0562, 0.8115),
        (0.7, 0.8, -0.7885, 1.1949),
        (1.0, 0.8, -0.2398, 1.4646),
        (1.0, 1.0, -0.4744, 1.3690),
    ],
)
def test_best_linear_network_of_mixflow(t, gamma, slope, loss):
    """Least squares of u on (x_m, 1) at a fixed t: the minimiser of the loss among affine networks."""
    noise, data, times, slowed, weights = quadrature(0.49, 0.7, t, gamma)
    x_m, u = Linear().interpolate(noise, data, slowed), Linear().velocity(noise, data, times)
    root = weights.sqrt()[:, None]
    solution = torch.linalg.lstsq(root * torch.cat([x_m, torch.ones_like(x_m)], dim=1), root * u).solution
    assert solution[0].item() == pytest.approx(slope, abs=6e-5)

    def network(x, told):
        torch.testing.assert_close(told, torch.full_like(told, t))
        return solution[0] * x + solution[1]

    losses = flow_matching_loss(network, noise, data, times, slowed, Linear())
    assert (weights * losses).sum().item() == pytest.approx(loss, abs=6e-5)


@pytest.mark.parametrize(("lam", "t", "loss"), [(1.0, 0.5, 2.0), (3.0, 0.3, 3.94737)])
def test_loss_of_the_exact_velocity_is_irreducible(lam, t, loss):
    """lam / s(t)^2 per dimension."""
    noise, data, times, slowed, weights = quadrature(lam, 0.8, t, gamma=0.0)
    velocity = gaussian_velocity(lam, 0.8)
    losses = flow_matching_loss(lambda x, t: velocity(x, t[:, None]), noise, data, times, slowed, Linear())
    assert (weights * losses).sum().item() == pytest.approx(loss, rel=1e-5)
