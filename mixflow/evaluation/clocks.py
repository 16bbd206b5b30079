"""At which time of the true path a generated state is: Slow Flow's paired measure, and clocks of the marginal law.

Linear path x_t = t x1 + (1 - t) x0 throughout, paper time. A clock of the marginal law knows the generated states by
mean and variance on axes on which the data have mean mu_i and variance lam_i, so that true states at time m have mean
m mu_i and variance s_i(m)^2 = m^2 lam_i + (1 - m)^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from mixflow.flow.gaussian import marginal_std, projected_time

NULL_VARIANCE = 1e-4  # of the data, where noise has 1: an axis below it tells the noise that is left, down to m = 0.99
_FLOOR = 1e-8  # of variances under a logarithm: what float32 states of unit size cannot tell from zero
_GRID = 400  # steps of the walk downhill, in [0, 1]

QUANTILES = {"min": 0.0, "p1": 0.01, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99,
             "max": 1.0}  # fmt: skip


# --- the paired measure ----------------------------------------------------------------------------------------------


def paired_time(x: Tensor, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (m [B], distance [B], |x1 - x0|^2 [B]), float64, for states x and pairs x0, x1, all [B,...].

    m = <x - x0, x1 - x0> / |x1 - x0|^2 is the time of the point m x1 + (1 - m) x0 that is nearest to x, on the whole
    line: values outside [0, 1] are not cut off. The distance to that point is per element, as a standard deviation.
    """
    x, noise, data = (tensor.flatten(1).double() for tensor in (x, noise, data))
    path, moved = data - noise, x - noise
    length = path.square().sum(dim=1)
    m = (moved * path).sum(dim=1) / length
    rest = moved - m[:, None] * path
    return m, rest.square().mean(dim=1).sqrt(), length


def exact_paired_times(
    times: Tensor,  # [T]
    mean_square: Tensor,  # [A] mu_i^2; of classes that share their variances, its average over them
    variance: Tensor,  # [A] lam_i, within the classes
    start: float = 0.0,  # the flow starts at x_start of a real pair; 0: at its noise
) -> list[float]:
    """Return the m [T] that minimises E|x_t - (m x1 + (1 - m) x0)|^2 for the exact flow on Gaussian data.

    Below t though every marginal is right: the pair (x0, x1) was drawn at random, and the flow leads x0 elsewhere.
    """
    first, mean = marginal_std(variance, start), mean_square.sqrt()
    return [float(projected_time(variance, mean, start, t, marginal_std(variance, t) / first)) for t in times.tolist()]


def exact_own_end_times(times: Tensor, mean_square: Tensor, variance: Tensor) -> list[float]:
    """Return the m [T] that minimises E|x_t - (m x_1 + (1 - m) x0)|^2 for the exact flow's own end point x_1.

    With x_t = t mu + s(t) z it is sum[t mu^2 + (s - 1)(sqrt(lam) - 1)] / sum[mu^2 + (sqrt(lam) - 1)^2]; t for straight
    paths alone.
    """
    gain = variance.sqrt() - 1
    moved = times[:, None] * mean_square + (marginal_std(variance, times[:, None]) - 1) * gain
    return (moved.sum(dim=1) / (mean_square + gain.square()).sum()).tolist()


def quantiles(values: np.ndarray) -> dict[str, list[float]]:
    """Return the quantiles over images and the mean of values [n,T], each a list of T."""
    found = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {name: row.tolist() for name, row in zip(QUANTILES, found, strict=True)} | {
        "mean": values.mean(axis=0).tolist()
    }


# --- clocks of the marginal law --------------------------------------------------------------------------------------


def wasserstein_time(
    t: float,
    mean: Tensor,  # [A] of the generated states, float64 like all
    variance: Tensor,  # [A]
    data_mean: Tensor,  # [A] mu
    data_variance: Tensor,  # [A] lam
) -> float:
    """Return argmin_m sum (sqrt(variance) - s(m))^2 + |mean - m mu|^2 in [0, 1], the minimum that t leads downhill to.

    That is W2 between Gaussians with these moments. Only near t: where lam is 1 the marginals at m and 1 - m are equal.
    """
    std = variance.sqrt()

    def distance(m: float) -> float:
        return float(((std - marginal_std(data_variance, m)).square() + (mean - m * data_mean).square()).sum())

    return _minimum_near(distance, t)


def kl_time(t: float, mean: Tensor, variance: Tensor, data_mean: Tensor, data_variance: Tensor) -> float:
    """Return argmin_m sum .5 [v/s^2 - 1 - log(v/s^2) + (mean - m mu)^2/s^2] in [0, 1], near t as `wasserstein_time`.

    KL(generated | true at m) between Gaussians. Towards t = 1 axes without variance in the data rule it.
    """
    v = variance.clamp_min(_FLOOR)

    def divergence(m: float) -> float:
        true = marginal_std(data_variance, m).square().clamp_min(_FLOOR)
        ratio = v / true
        return 0.5 * float((ratio - 1 - ratio.log() + (mean - m * data_mean).square() / true).sum())

    return _minimum_near(divergence, t)


def energy_time(t: float, energy: float, data_energy: float, dimensions: int) -> float | None:
    """Return the m with E|x_m|^2 = `energy`, of two the one nearest to t; None below the least energy of any m.

    E|x_m|^2 = m^2 D + (1 - m)^2 d with D = E|x1|^2 and d dimensions, so m = (d +- sqrt(d^2 - L (d - energy))) / L with
    L = D + d. Not cut off at 0 and 1.
    """
    total = data_energy + dimensions
    discriminant = dimensions**2 - total * (dimensions - energy)
    if discriminant < 0:
        return None
    roots = [(dimensions + sign * math.sqrt(discriminant)) / total for sign in (-1, 1)]
    return min(roots, key=lambda root: abs(root - t))


def least_energy(data_energy: float, dimensions: int) -> float:
    """Return the least E|x_m|^2 of all m, that at m = d / (D + d)."""
    return data_energy * dimensions / (data_energy + dimensions)


def null_space_time(variance: Tensor, data_variance: Tensor) -> float | None:
    """Return 1 - std along the axes on which the data do not vary (lam <= NULL_VARIANCE); None without such axes."""
    still = data_variance <= NULL_VARIANCE
    return 1 - math.sqrt(variance[still].mean()) if still.any() else None


def _minimum_near(distance: Callable[[float], float], t: float) -> float:
    """Return the minimum in [0, 1] of the valley that t lies in: of several minima the one reached downhill from t."""
    found = cache(lambda k: distance(k / _GRID))
    at = round(min(max(t, 0.0), 1.0) * _GRID)
    while True:
        around = [k for k in (at - 1, at, at + 1) if 0 <= k <= _GRID]
        lowest = min(around, key=lambda k: (found(k), k != at))
        if lowest == at:
            break
        at = lowest
    ends = around[0] / _GRID, around[-1] / _GRID
    inside = minimize_scalar(distance, bounds=ends, method="bounded", options={"xatol": 1e-8}).x
    return min((float(inside), *ends), key=distance)  # the search never ends on a bound, where a minimum can lie


def axis_moments(states: Tensor, axes: Tensor | None, coordinates: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums over images of values and of their squares on each axis, float64 [A], for states [B,...].

    `axes` [d,A] are orthonormal columns (None: the coordinates themselves), `coordinates` [A] those looked at (None:
    all).
    """
    with torch.autocast(states.device.type, enabled=False):
        values = states.flatten(1)
        values = (values if coordinates is None else values[:, coordinates]).double()
        values = values if axes is None else values @ axes
        return values.sum(dim=0), values.square().sum(dim=0)
