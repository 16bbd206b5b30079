"""The losses of the arms: input perturbation, the self-rollout, the endpoint target; against closed forms.

Data N(mu, lam) and noise N(0, 1), so that the best affine network is the best network, and least squares over exact
quadrature nodes finds it. s(t)^2 = t^2 lam + (1-t)^2, exact slope a(t) = (t lam - (1-t)) / s(t)^2.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixflow.flow import (
    GVP,
    Linear,
    endpoint_target,
    flow_matching_loss,
    self_rollout_loss,
    shift_time,
    time_pair,
)
from mixflow.sampling import time_grid

LAM, MU = 0.49, 0.7
ROLLOUT = {"step_size": 0.1, "shift": 1.0, "min_remaining": 0.05}


def s2(t):
    return t**2 * LAM + (1 - t) ** 2


def exact_slope(t):
    return (t * LAM - (1 - t)) / s2(t)


def exact_velocity(x, t):
    t = t.reshape(-1, 1)
    return MU + exact_slope(t) * (x - t * MU)


def nodes(*axes):
    """Quadrature over independent N(0,1) axes: one column [n,1] each, and weights [n] that sum to 1."""
    z, weight = np.polynomial.hermite_e.hermegauss(5)
    grid = [torch.from_numpy(axis.ravel())[:, None] for axis in np.meshgrid(*[z] * len(axes), indexing="ij")]
    weights = np.prod([axis.ravel() for axis in np.meshgrid(*[weight] * len(axes), indexing="ij")], axis=0)
    return *grid, torch.from_numpy(weights / weights.sum())


def best_affine(loss, weights):
    """(slope, offset) of the affine network a x + b that minimises the weighted mean of a quadratic loss [n]."""
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def mean(parameters):
        return (weights * loss(lambda x, t: parameters[0] * x + parameters[1])).sum()

    gradient = torch.autograd.functional.jacobian(mean, parameters)
    hessian = torch.autograd.functional.hessian(mean, parameters)
    return torch.linalg.solve(hessian, -gradient).tolist()


def batch(n=6, dtype=torch.float32, seed=0):
    noise, data, xi = torch.randn(3, n, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return noise, data, xi, torch.linspace(0, 1, n, dtype=dtype)


# ---- input perturbation


@pytest.mark.parametrize("path", [Linear(), GVP()])
def test_the_perturbed_input_keeps_the_plain_target(path):
    noise, data, xi, t = batch()
    seen = []
    losses = flow_matching_loss(
        lambda x, _: (seen.append(x), torch.zeros_like(x))[1], noise, data, t, t, path, perturbation=0.1 * xi
    )
    assert torch.equal(seen[0], path.interpolate(noise + 0.1 * xi, data, t))
    assert torch.equal(losses, path.velocity(noise, data, t).square().flatten(1).mean(dim=1))


def test_no_perturbation_is_the_plain_loss_bit_for_bit():
    noise, data, xi, t = batch()
    plain = flow_matching_loss(lambda x, t: x.sin(), noise, data, t, 0.7 * t, Linear())
    neutral = flow_matching_loss(lambda x, t: x.sin(), noise, data, t, 0.7 * t, Linear(), perturbation=0.0 * xi)
    assert torch.equal(plain, neutral)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5])
def test_the_best_network_of_input_perturbation(t, strength):
    """a = (t lam - (1-t)) / (t^2 lam + (1-t)^2 (1 + g^2))."""
    noise, z, xi, weights = nodes("noise", "data", "xi")
    data, times = MU + LAM**0.5 * z, torch.full((len(z),), t, dtype=torch.float64)

    def loss(network):
        return flow_matching_loss(network, noise, data, times, times, Linear(), perturbation=strength * xi)

    slope = (t * LAM - (1 - t)) / (t**2 * LAM + (1 - t) ** 2 * (1 + strength**2))
    assert best_affine(loss, weights) == pytest.approx([slope, MU - slope * t * MU], abs=1e-5)


# ---- the self-rollout


def rollout_start(t, h):
    s = max(t - h, 0)
    return s, t - s


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.9])
def test_the_best_network_after_one_own_step(t):
    """With s = t - h: D = xh + (1-t) v has slope s lam / ((1 + h a(s)) s(s)^2) against xh, and u has a/(1 + h a)."""
    noise, z, weights = nodes("noise", "data")
    data, times = MU + LAM**0.5 * z, torch.full((len(z),), t, dtype=torch.float64)
    s, h = rollout_start(t, 0.1)
    seen = []

    def loss(network):
        def first_exact(x, t):
            if not torch.is_grad_enabled():  # the step
                assert t.tolist() == pytest.approx([s] * len(t))
                return exact_velocity(x, t)
            seen.append(x)
            return network(x, t)

        return self_rollout_loss(first_exact, noise, data, times, Linear(), **ROLLOUT)

    slope, offset = best_affine(loss, weights)
    grown = 1 + h * exact_slope(s)
    denoiser = s * LAM / (grown * s2(s))
    assert 1 + (1 - t) * slope == pytest.approx(denoiser, abs=1e-5)
    assert (1 - t) * offset == pytest.approx(MU - denoiser * t * MU, abs=1e-5)  # the mean is kept: D(t mu) = mu
    xh, u = seen[0][:, 0], (data - noise)[:, 0]
    centred = xh - (weights * xh).sum()
    assert (weights * centred * u).sum() / (weights * centred**2).sum() == pytest.approx(
        exact_slope(s) / grown, abs=1e-6
    )


def test_a_network_without_error_on_a_straight_path_lands_where_the_path_is():
    """One data point: the exact velocity is (x1 - x) / (1 - s), the step lands on x_t, and its loss is zero."""
    noise, data, _, t = batch(dtype=torch.float64)
    t = t * 0.94  # within reach of the clip
    times = []

    def exact(x, t):
        times.append(t)
        return (data - x) / (1 - t).reshape(-1, 1, 1, 1)

    losses = self_rollout_loss(exact, noise, data, t, Linear(), **ROLLOUT)
    torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-20)
    torch.testing.assert_close(times[0], (t - 0.1).clamp_min(0))
    assert torch.equal(times[1], t)


def test_at_the_noise_it_is_the_plain_loss():
    noise, data, _, _ = batch()
    t = torch.zeros(len(data))
    plain = flow_matching_loss(lambda x, t: x.sin(), noise, data, t, t, Linear())
    assert torch.equal(self_rollout_loss(lambda x, t: x.sin(), noise, data, t, Linear(), **ROLLOUT), plain)


def test_near_the_data_the_target_is_bounded():
    x, data, _, _ = batch()
    t = torch.tensor([0.5, 0.9, 0.95, 0.99, 1.0, 1.0])
    remaining = torch.tensor([0.5, 0.1, 0.05, 0.05, 0.05, 0.05]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(endpoint_target(x, data, t, 0.05), (data - x) / remaining, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 6.93])
def test_the_step_is_one_of_the_samplers_grid(shift):
    """h is a step before the shift: from a time of a shifted grid of 1/h steps it leads back to the one before."""
    times = time_grid(10, shift=shift)
    noise, data, _, _ = batch(10, torch.float64)
    seen = []
    self_rollout_loss(
        lambda x, t: (seen.append(t), x)[1], noise, data, times[1:], Linear(), **{**ROLLOUT, "shift": shift}
    )
    torch.testing.assert_close(seen[0], times[:-1], rtol=0, atol=1e-12)
    assert torch.equal(shift_time(times, 1.0), times)


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_no_gradient_flows_through_the_step(precision):
    """Also under autocast, which must not go on with the weights that it cast while there was no gradient."""
    net, t = two_layers(), torch.full((16,), 0.6)
    noise, data = torch.randn(2, 16, 4)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        self_rollout_loss(lambda x, t: net(x), noise, data, t, Linear(), **ROLLOUT).mean().backward()
    found = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    s = t - 0.1
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        start = Linear().interpolate(noise, data, s)
        landed = (start + 0.1 * net(start).float()).detach()
        ((net(landed).float() - (data - landed) / 0.4) ** 2).mean().backward()
    for gradient, parameter in zip(found, net.parameters(), strict=True):
        assert parameter.grad.abs().max() > 1e-3
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-2 if precision else 1e-4, atol=1e-6)


# ---- the endpoint target: MixFlow for a network that predicts the data


def test_the_endpoint_target_is_the_plain_one_where_the_input_is_where_the_label_says():
    noise, data, _, t = batch(dtype=torch.float64)
    t = t * 0.94
    plain = flow_matching_loss(lambda x, t: x.sin(), noise, data, t, t, Linear())
    told = flow_matching_loss(lambda x, t: x.sin(), noise, data, t, t, Linear(), min_remaining=0.05)
    torch.testing.assert_close(told, plain, rtol=1e-6, atol=0)


def test_it_is_mixflow_for_a_network_that_predicts_the_data():
    """|v - (x1 - x_m)/(1-t)|^2 (1-t)^2 = |D - x1|^2 with D = x_m + (1-t) v."""
    noise, data, _, t = batch(dtype=torch.float64)
    t, m = t * 0.94, t * 0.5
    x_m = Linear().interpolate(noise, data, m)
    predicted = x_m.cos()

    def velocity(x, t):
        assert torch.equal(x, x_m)
        return (x.cos() - x) / (1 - t).reshape(-1, 1, 1, 1)

    losses = flow_matching_loss(velocity, noise, data, t, m, Linear(), min_remaining=0.05)
    of_data = (predicted - data).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(losses.double() * (1 - t) ** 2, of_data, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("t", "gamma"), [(0.3, 0.4), (0.7, 0.8)])
def test_the_best_network_of_either_target(t, gamma):
    """The endpoint target's velocity is that of the best denoiser of x_m, and MixFlow's own is another one."""
    noise, z, weights = nodes("noise", "data")
    u, u_weight = np.polynomial.legendre.leggauss(5)
    num, data = len(u), MU + LAM**0.5 * z
    uniforms = torch.from_numpy((u + 1) / 2).repeat_interleave(len(noise))
    weights = torch.from_numpy(u_weight / 2).repeat_interleave(len(noise)) * weights.repeat(num)
    noise, data = noise.repeat(num, 1), data.repeat(num, 1)
    times, slowed = time_pair(torch.stack([torch.full_like(uniforms, t**2), uniforms, uniforms]), "mixflow", gamma)
    times, slowed = times.double(), slowed.double()
    x_m = Linear().interpolate(noise, data, slowed)[:, 0]
    centred = x_m - (weights * x_m).sum()
    denoiser = ((weights * centred * data[:, 0]).sum() / (weights * centred**2).sum()).item()

    def slope(**target):
        return best_affine(
            lambda net: flow_matching_loss(net, noise, data, times, slowed, Linear(), **target), weights
        )[0]

    assert slope(min_remaining=0.05) == pytest.approx((denoiser - 1) / (1 - t), abs=1e-5)
    assert abs(slope(min_remaining=0.05) - slope()) > 0.01


# ---- laws and weights


def test_beta_is_a_weight_of_twice_the_time():
    """The mean gradient over t ~ Beta(2,1) is that of 2t times it over t ~ U[0,1]: no optimum at a given t moves."""
    nodes_t, weights_t = np.polynomial.legendre.leggauss(200)
    uniforms = torch.from_numpy((nodes_t + 1) / 2).expand(3, -1)
    over = torch.from_numpy(weights_t / 2)
    generator = torch.Generator().manual_seed(0)
    noise, data = torch.randn(2, 200, 1, generator=generator, dtype=torch.float64)[:, :1].expand(2, 200, 1)

    def gradient(law, weight):
        parameters = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
        t, m = (values.double() for values in time_pair(uniforms, law))
        losses = flow_matching_loss(
            lambda x, t: parameters[0] * x + parameters[1] + parameters[2] * t[:, None], noise, data, t, m, Linear()
        )
        return torch.autograd.grad((over * weight(t) * losses).sum(), parameters)[0]

    plain, weighted, beta = (
        gradient("uniform", torch.ones_like),
        gradient("uniform", lambda t: 2 * t),
        gradient("beta", torch.ones_like),
    )
    torch.testing.assert_close(weighted, beta, rtol=1e-5, atol=1e-6)
    assert (plain - beta).abs().max() > 0.01
