"""Samplers against exposure bias: neutral settings are the plain sampler, and exact fields give closed forms.

Gaussian data N(0, lam): v = a(t) x with a = (t lam - (1-t)) / s^2, so that one Euler step is x -> (1 + h a') x.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from mixflow.sampling import (
    autoguided_velocity,
    differential_correction,
    epsilon_scaled,
    guided_velocity,
    sample,
    time_grid,
    time_shifted,
)

LAM = 0.6
FIXED = ("euler", "heun", "heun_repa", "midpoint", "rk4")


def slope(t, lam=LAM):
    return (t * lam - (1 - t)) / (t**2 * lam + (1 - t) ** 2)


def linear_field(x, t, decided_at=None):
    return slope(t if t.ndim == 0 else t.reshape(-1, 1, 1, 1)) * x


def noise(n=6, size=4, dtype=torch.float32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def curved_field(x, t, decided_at=None):
    """Neither linear nor with a clock that is right."""
    return (3 * x).sin() + t.reshape(-1, *[1] * (3 if t.ndim else 0)) * x.flip(-1)


def factor(step, t, t_next, **options):
    """The factor of one step of size h from t to t' on the linear field."""
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    velocity = step(linear_field) if step else linear_field
    times = torch.tensor([t, t_next], dtype=torch.float64)
    return sample(velocity, x, solver="euler", times=times, **options).unique().item()


# ---- neutral settings


NEUTRAL = {
    "epsilon scaling": lambda v: epsilon_scaled(v, 1.0, 0.05),
    "time shift": lambda v: time_shifted(v, lambda x: x.flatten(1).std(dim=1), 0.0, (0.0, 1.0)),
    "time shift outside its interval": lambda v: time_shifted(v, lambda x: 1 / 0, 0.5, (0.985, 0.99)),
    "epsilon scaling before its start": lambda v: epsilon_scaled(v, 2.0, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_the_plain_sampler_bit_for_bit(name, solver, dtype):
    x, times = noise(dtype=dtype), time_grid(7, end=0.95, shift=2.0)
    plain = sample(curved_field, x, solver=solver, times=times)
    assert torch.equal(sample(NEUTRAL[name](curved_field), x, solver=solver, times=times), plain)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("band", ["low", "pixel"])
def test_no_correction_is_the_plain_sampler_bit_for_bit(band, solver):
    x = noise()
    plain = sample(curved_field, x, solver=solver, times=time_grid(7))
    neutral = sample(curved_field, x, solver=solver, times=time_grid(7), correction=differential_correction(band, 0.0))
    assert torch.equal(neutral, plain)
    acting = sample(curved_field, x, solver=solver, times=time_grid(7), correction=differential_correction(band, 0.1))
    assert (acting - plain).abs().max() > 1e-3


# ---- Euler is DDIM


@pytest.mark.parametrize("scale", [1.0, 1.02])
def test_euler_is_ddim_with_the_scaled_noise(scale):
    """x' = t' D + (1 - t') e/l, where D is what is left of x once e/l is taken for its noise."""
    x, times = noise(dtype=torch.float64), time_grid(12, start=0.1)
    found = sample(epsilon_scaled(curved_field, scale, 0.1), x, solver="euler", times=times)
    for t, t_next in pairwise(times):
        e = (x - t * curved_field(x, t)) / scale
        x = t_next * (x - (1 - t) * e) / t + (1 - t_next) * e
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


# ---- closed forms on the exact field


@pytest.mark.parametrize("scale", [1.0, 1.005, 1.1, 0.9])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.95])
def test_epsilon_scaling_has_the_slope_of_its_closed_form(scale, t):
    """a' = a + (1 - 1/l)(1 - t a)/t; nothing before the start."""
    scaled = slope(t) + (1 - 1 / scale) * (1 - t * slope(t)) / t
    assert factor(lambda v: epsilon_scaled(v, scale, 0.1), t, t + 0.05) == pytest.approx(1 + 0.05 * scaled, abs=1e-12)
    assert factor(lambda v: epsilon_scaled(v, scale, 0.96), t, t + 0.05) == pytest.approx(
        1 + 0.05 * slope(t), abs=1e-12
    )


def test_epsilon_scaling_keeps_more_noise():
    """Above 1 it takes back the shrinking of Euler, and a larger factor takes back more."""
    x = noise(1, dtype=torch.float64)
    stds = [
        (sample(epsilon_scaled(linear_field, scale, 0.05), x, solver="euler", times=time_grid(20)) / x)
        .unique()[0]
        .item()
        for scale in (1.0, 1.01, 1.02)
    ]
    assert stds[0] < stds[1] < stds[2]
    assert abs(stds[2] - math.sqrt(LAM)) < abs(stds[0] - math.sqrt(LAM))


@pytest.mark.parametrize("strength", [0.0, 0.02, -0.1])
@pytest.mark.parametrize("t", [0.0, 0.4, 0.95])
def test_the_pixel_form_is_a_shorter_step(strength, t):
    """1 + (h - c (1 - t')) a."""
    h = 0.05
    found = factor(None, t, t + h, correction=differential_correction("pixel", strength))
    assert found == pytest.approx(1 + (h - strength * (1 - t - h)) * slope(t), abs=1e-12)


def haar(x):
    """The four bands of an orthonormal Haar transform of one level, [4,...,H/2,W/2], low band first."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]) / 2


def test_the_low_form_moves_the_low_band_alone():
    """LL' = LL + c sigma (LL - LL of D), sigma the noise level at the step's start; the other three bands stay."""
    x, denoised, t = noise(), noise().flip(0).cos(), torch.tensor(0.3)
    bands, estimate = haar(x), haar(denoised)
    found = haar(differential_correction("low", 0.05)(x, denoised, t))
    torch.testing.assert_close(found[1:], bands[1:])
    torch.testing.assert_close(found[0], bands[0] + 0.05 * 0.7 * (bands[0] - estimate[0]))


def test_the_low_form_is_a_shorter_step_for_what_is_constant_over_blocks():
    x = F.interpolate(noise(size=2, dtype=torch.float64), scale_factor=2)
    times = torch.tensor([0.3, 0.4], dtype=torch.float64)
    found = sample(linear_field, x, solver="euler", times=times, correction=differential_correction("low", 0.05))
    torch.testing.assert_close(found, x * (1 + (0.1 - 0.05 * 0.7 * 0.6) * slope(0.3)), rtol=1e-12, atol=0)


def test_heun_is_corrected_by_the_estimate_of_its_last_call():
    t, t_next, h = 0.3, 0.5, 0.2
    predicted = 1 + h * slope(t)
    end = 1 + h / 2 * (slope(t) + predicted * slope(t_next))
    estimate = predicted * (1 + (1 - t_next) * slope(t_next))
    times = torch.tensor([t, t_next], dtype=torch.float64)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    found = sample(linear_field, x, solver="heun", times=times, correction=differential_correction("pixel", 0.1))
    assert found.unique().item() == pytest.approx(end + 0.1 * (end - estimate), abs=1e-12)


# ---- the label that a clock reads


def test_labels_are_the_clocks_within_the_window():
    told = []

    def velocity(x, t, decided_at=None):
        told.append((t, decided_at))
        return torch.zeros_like(x)

    x = noise(4)
    readings = torch.tensor([0.1, 0.48, 0.53, 0.9])
    shifted = time_shifted(velocity, lambda state: readings, 0.1, (0.2, 0.7))
    t = torch.tensor(0.5)
    shifted(x, t)
    torch.testing.assert_close(told[0][0], torch.tensor([0.45, 0.48, 0.53, 0.55]))
    assert told[0][1] is t  # guidance goes by the solver's time
    for outside in (0.1, 0.75):
        shifted(x, torch.tensor(outside))
        assert told[-1][0].ndim == 0
    wide = time_shifted(velocity, lambda state: readings - 1, 1.0, (0.0, 1.0))
    wide(x, torch.tensor(0.1))
    assert told[-1][0].tolist() == [0.0] * 4


def test_a_clock_that_knows_the_time_changes_nothing():
    x = noise(dtype=torch.float64)
    times = time_grid(9)
    now = iter(times)
    known = time_shifted(linear_field, lambda state: next(now).expand(len(state)), 1.0, (0.0, 1.0))
    plain = sample(linear_field, x, solver="euler", times=times)
    torch.testing.assert_close(sample(known, x, solver="euler", times=times), plain, rtol=0, atol=1e-12)


def test_a_lagging_state_is_told_its_own_time():
    """On data of one point, states x = t x1 + (1-t) x0 that lag: with the right label the network meets the data at 1.

    v(x, m) = (x1 - x) / (1 - m): told the label t > m it would step too far for where it is, told m it moves along.
    """
    lag, data = 0.1, torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64)
    x0 = noise(1, 2, torch.float64)[:, :1]
    t = torch.tensor(0.5, dtype=torch.float64)
    x = (t - lag) * data + (1 - t + lag) * x0

    def field(x, t, decided_at=None):
        return (data - x) / (1 - t.reshape(-1, 1, 1, 1))

    def clock(state):
        return ((state - x0) * (data - x0)).sum(dim=(1, 2, 3)) / (data - x0).square().sum()

    told = time_shifted(field, clock, 0.4, (0.0, 1.0))
    torch.testing.assert_close(told(x, t), data - x0, rtol=1e-12, atol=0)
    assert (field(x, t) - (data - x0)).abs().max() > 0.05


# ---- under guidance


def network(x, t, y):
    assert t.shape == y.shape == x.shape[:1]
    return (x + 0.1 * y.reshape(-1, 1, 1, 1)).sin() * (1 + t.reshape(-1, 1, 1, 1))


def test_corrections_see_the_guided_velocity():
    labels, x, t = torch.arange(6), noise(), torch.tensor(0.4)
    guided = guided_velocity(network, labels, 10, 1.7)
    v = guided(x, t)
    scaled = epsilon_scaled(guided, 1.05, 0.1)(x, t)
    torch.testing.assert_close(scaled, v + (1 - 1 / 1.05) / 0.4 * (x - 0.4 * v))


@pytest.mark.parametrize("auto", [False, True])
def test_both_guided_calls_are_told_what_the_clock_reads(auto):
    """And where guidance acts is decided by the solver's time, not by the label."""
    labels, x = torch.arange(6), noise()
    read = torch.linspace(0.3, 0.5, 6)

    def expected(t):
        cond = network(x, t, labels)
        null = (lambda *given: 0.5 * network(*given))(x, t, labels) if auto else network(x, t, torch.full((6,), 10))
        return null + 1.7 * (cond - null)

    interval = {"interval": (0.35, 0.45)}
    if auto:
        velocity = autoguided_velocity(network, lambda *given: 0.5 * network(*given), labels, 1.7, **interval)
    else:
        velocity = guided_velocity(network, labels, 10, 1.7, **interval)
    shifted = time_shifted(velocity, lambda state: read, 1.0, (0.0, 1.0))
    torch.testing.assert_close(shifted(x, torch.tensor(0.4)), expected(read))
    torch.testing.assert_close(shifted(x, torch.tensor(0.3)), network(x, read, labels))
