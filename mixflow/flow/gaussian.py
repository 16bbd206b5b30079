"""Gaussian data on the linear path, in closed form: the exact velocity, what samplers make of it, what training finds.

Data are N(mean, diag(variances)) in their eigenbasis, noise is N(0, I), x_t = t x1 + (1 - t) x0. Every law here is then
Gaussian and every one-step sampler affine, so a direction is told by a mean and a standard deviation. `variances` and
`mean` are [d] (a variance may be 0: a null direction), times are numbers or tensors that broadcast against them, and
results have the dtype of `variances`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Time: TypeAlias = float | Tensor
Slope = Callable[[float], Tensor]  # t -> a(t) [d], of a velocity t mean + a(t) (y - t mean) along each direction

# --- the exact field -------------------------------------------------------------------------------------------------


def marginal_std(variances: Tensor, t: Time) -> Tensor:
    """Return s(t), the standard deviation of x_t: s^2 = t^2 lam + (1 - t)^2."""
    return _marginal_variance(variances, t).sqrt()


def velocity_slope(variances: Tensor, t: Time) -> Tensor:
    """Return a(t) = s'/s = (t lam - (1 - t)) / s^2 of the exact velocity v(y, t) = mean + a(t) (y - t mean).

    At t=1 the velocity is y itself, for the noise is then unknown with mean 0: a = 1 there, for null directions too.
    """
    variance = _marginal_variance(variances, t)
    reached = variance == 0
    return torch.where(reached, 1.0, (t * variances - (1 - t)) / torch.where(reached, 1.0, variance))


def irreducible_loss(variances: Tensor, t: Time) -> Tensor:
    """Return the flow matching loss of the exact velocity along each direction, lam / s(t)^2."""
    return variances / _marginal_variance(variances, t)


def time_information(variances: Tensor, mean: Tensor, t: Time) -> Tensor:
    """Return the Fisher information on t in one x_t: the sum over directions of 2 a^2 + mean^2 / s^2.

    Its inverse square root is how closely an input tells its own time. A null direction alone gives 2 / (1 - t)^2.
    """
    variance = _marginal_variance(variances, t)
    return (2 * velocity_slope(variances, t).square() + mean.square() / variance).sum(-1)


def _marginal_variance(variances: Tensor, t: Time) -> Tensor:
    return t * t * variances + (1 - t) * (1 - t)


# --- samplers, which all keep the mean t mean ------------------------------------------------------------------------


def euler_factors(slope: Slope, times: Tensor) -> Tensor:
    """Return by what each Euler step multiplies x - t mean, [N,d]: 1 + h a(t). For the exact slope never above s'/s."""
    return torch.stack([1 + (end - start) * slope(start) for start, end in _steps(times)])


def heun_factors(slope: Slope, times: Tensor) -> Tensor:
    """Return by what each Heun step multiplies x - t mean, [N,d]: 1 + h/2 (a + a' (1 + h a))."""
    factors = []
    for start, end in _steps(times):
        h, first = end - start, slope(start)
        factors.append(1 + h / 2 * (first + slope(end) * (1 + h * first)))
    return torch.stack(factors)


def std_along(factors: Tensor) -> Tensor:
    """Return the standard deviations at all times of the grid, [N+1,d], from those factors; the first are 1."""
    return torch.cat([torch.ones_like(factors[:1]), factors]).cumprod(0).abs()


def euler_maruyama_std(slope: Slope, times: Tensor, diffusion: Callable[[float], float]) -> Tensor:
    """Return the standard deviations at all times, [N+1,d], of dx = (v + w score) dt + sqrt(2 w) dW, every step noisy.

    The score is that of the velocity, (t v - x) / (1 - t), so that each step multiplies by
    1 + h (a + w (t a - 1) / (1 - t)) and adds the variance 2 h w. No step may start at t=1.
    """
    variance = torch.ones_like(slope(float(times[0])))
    found = [variance]
    for t, end in _steps(times):
        h, a, w = end - t, slope(t), diffusion(t)
        variance = (1 + h * (a + w * (t * a - 1) / (1 - t))).square() * variance + 2 * h * w
        found.append(variance)
    return torch.stack(found).sqrt()


def euler_shrinkage(variances: Tensor, num_steps: int) -> Tensor:
    """Return S_N / sqrt(lam) after N equal Euler steps up to O(N^-3): exp(-K / 2N), K = 1 + pi/4 (r + 1/r), r^2 = lam.

    By w(t) = (t r, 1 - t) a step's factor is the cosine of the angle between w(t) and w(t'), times s'/s, and the angles
    sum to a quarter turn.
    """
    root = variances.sqrt()
    return torch.exp(-(1 + torch.pi / 4 * (root + 1 / root)) / (2 * num_steps))


def _steps(times: Tensor) -> list[tuple[float, float]]:
    return list(zip(times[:-1].tolist(), times[1:].tolist(), strict=True))


# --- slopes and factors of other velocities and samplers -------------------------------------------------------------


def input_perturbation_slope(variances: Tensor, t: Time, strength: float) -> Tensor:
    """Return the slope that training with perturbed inputs finds (arXiv 2301.11706): noise x0 + strength xi in x_t."""
    noise = (1 - t) * (1 - t) * (1 + strength**2)
    return (t * variances - (1 - t)) / (t * t * variances + noise)


def epsilon_scaled_slope(slope: Tensor, t: Time, factor: float) -> Tensor:
    """Return the slope of v + (1 - 1/l) e / t, epsilon scaling (arXiv 2308.15321): a + (1 - 1/l) (1 - t a) / t."""
    return slope + (1 - 1 / factor) * (1 - t * slope) / t


def shorter_step_factors(slope: Slope, times: Tensor, strength: float) -> Tensor:
    """Return the factors of Euler with DCW on all bands (arXiv 2604.16044), [N,d]: 1 + (h - c (1 - t')) a."""
    return torch.stack([1 + (end - t - strength * (1 - end)) * slope(t) for t, end in _steps(times)])


def rollout_slope(variances: Tensor, start: float, end: float) -> Tensor:
    """Return the slope of E[x1 - x0 | xh], xh one exact Euler step from x_start: a(s) / (1 + h a(s))."""
    slope = velocity_slope(variances, start)
    return slope / (1 + (end - start) * slope)


def rollout_data_slope(variances: Tensor, start: float, end: float) -> Tensor:
    """Return the slope of E[x1 | xh], xh one exact Euler step from x_start: s lam / ((1 + h a(s)) s(s)^2).

    It is what the corrected target (x1 - xh) / (1 - t) trains.
    """
    step = 1 + (end - start) * velocity_slope(variances, start)
    return start * irreducible_loss(variances, start) / step


# --- nearest interpolation of the same pair ("slow flow") of a perfect network ---------------------------------------


def explained_share(variances: Tensor, mean: Tensor, t: Time) -> Tensor:
    """Return R2(t) = E|v|^2 / E|x1 - x0|^2 of the exact velocity: what it explains of the target, in [0, 1)."""
    explained = mean.square() + (velocity_slope(variances, t) * marginal_std(variances, t)).square()
    return explained.sum(-1) / _pair_energy(variances, mean)


def one_step_time(variances: Tensor, mean: Tensor, start: float, step: float) -> Tensor:
    """Return the m whose x_m is nearest to one Euler step from x_start in the mean: s + h R2(s), below s + h.

    It holds for any data and any coupling, as E<v, u> = E|v|^2; R2 alone takes Gaussians.
    """
    return start + step * explained_share(variances, mean, start)


def projected_time(variances: Tensor, mean: Tensor, start: float, end: float, growth: Tensor) -> Tensor:
    """Return the m whose x_m is nearest, for the same pair, to where a sampler takes x_start by `end`.

    `growth` [..., d] is S_end / S_start, what the sampler multiplies x - t mean by. A perfect sampler has s(end) /
    s(start) and still is late: from noise it gives 0 at t=1 for N(0, I).
    """
    moved = end * mean.square() + 1 + growth * (start * variances - (1 - start))
    return moved.sum(-1) / _pair_energy(variances, mean)


def _pair_energy(variances: Tensor, mean: Tensor) -> Tensor:
    return (mean.square() + variances + 1).sum(-1)


# --- MixFlow ---------------------------------------------------------------------------------------------------------


def linear_mixflow(variances: Tensor, mean: Tensor, t: Time, gamma: float) -> tuple[Tensor, Tensor]:
    """Return (slope, loss) [d] of the best affine network under m ~ U[(1 - gamma) t, t], at a fixed t, by direction.

    With b = E m and c = E m^2 the slope is [(lam + 1) b - 1] / [(lam + 1) c - 2 b + 1 + mean^2 (c - b^2)], and the loss
    lam + 1 - numerator^2 / denominator.
    """
    first, second = t * (1 - gamma / 2), t * t * (1 - gamma + gamma**2 / 3)
    covariance = (variances + 1) * first - 1
    variance = (variances + 1) * second - 2 * first + 1 + mean.square() * (second - first * first)
    return covariance / variance, variances + 1 - covariance.square() / variance
