"""What a few replicates tell: intervals, paired differences, and the smallest effect that they could have shown.

Replicates i = 1..n of two rows share the seeds of training and of sampling, so that each difference d_i compares equal
data order, noise and labels. The d_i are taken for independent and normal; nothing else is assumed. No torch; scipy is
imported when first asked for, since the Snakefile imports this package.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

LEVEL = 0.95  # of all intervals
POWER = 0.8  # at which an effect counts as one that could have been seen
NOISE = 2  # standard errors: a difference that chance exceeds in one case of twenty


class Summary(NamedTuple):
    """Mean and spread of at least one value."""

    mean: float
    standard_deviation: float | None  # ddof = 1; None for a single value, as are the others
    interval: tuple[float, float] | None  # of the mean, by Student's t
    p_value: float | None  # of a true mean of 0, two-sided; also None where all values are 0


def summary(values: Sequence[float]) -> Summary:
    """Return mean ± t(0.975, n-1) s / √n of `values`, and a t-test on them."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Summary(mean, None, None, None)
    deviation = statistics.stdev(values)
    error = deviation / math.sqrt(n)
    half = _quantile(n) * error
    return Summary(mean, deviation, (mean - half, mean + half), _p_value(mean, error, n))


def detectable(standard_deviation: float, n: int) -> float:
    """Return the smallest true mean difference that a two-sided t-test at 5% on n >= 2 pairs finds with 80% power.

    δ = λ s / √n, where λ solves P(|T(n-1, λ)| > t(0.975, n-1)) = 0.8 for the noncentral t distribution.
    """
    return _noncentrality(n) * standard_deviation / math.sqrt(n)


@cache
def _quantile(n: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, n - 1))


@cache
def _noncentrality(n: int) -> float:
    """Return λ. T = (Z + λ) / S with Z normal and S √(n-1) chi: an integral over S, for scipy's nct turns into NaN."""
    from scipy.integrate import quad
    from scipy.optimize import brentq
    from scipy.special import ndtr
    from scipy.stats import chi

    root, edge = math.sqrt(n - 1), 1e-10
    low, high = chi.ppf(edge, n - 1) / root, chi.isf(edge, n - 1) / root

    def lacking(shift: float) -> float:
        def found(s: float) -> float:
            beyond = ndtr(shift - _quantile(n) * s) + ndtr(-shift - _quantile(n) * s)
            return float(beyond * chi.pdf(s * root, n - 1) * root)

        return float(quad(found, low, high)[0]) - POWER

    return float(brentq(lacking, 0.1, 2 * _quantile(n) + 3))


def _p_value(mean: float, error: float, n: int) -> float | None:
    from scipy.stats import t

    if error == 0:
        return None if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) / error, n - 1))


def sampling_error(
    own: Sequence[float] | None,  # group influences of a metric, as metrics.json holds them
    control: Sequence[float] | None,
    errors: tuple[float | None, float | None],  # standard errors of the two, where the groups are not known
) -> float | None:
    """Return how far other samples of the same two models would move their difference, one standard error.

    With g_k = a_k - b_k the contributions of group k of G to the first-order change of the difference, its square is
    G / (G-1) Σ g_k²: what the two sets of samples share through common noise and labels cancels. Without groups the
    sets count as independent; None where nothing is known.
    """
    if own and control and len(own) == len(control):
        groups = len(own)
        return math.sqrt(groups / (groups - 1) * math.fsum((a - b) ** 2 for a, b in zip(own, control, strict=True)))
    if errors[0] is None or errors[1] is None:
        return None
    return math.hypot(*errors)  # type: ignore[arg-type]


def error_of_mean(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of the mean of independent numbers with these errors; None where one is not known."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if known and len(known) == len(errors) else None


def differs(found: Summary, noise: float | None) -> bool | None:
    """Is a mean difference one that chance does not explain? None where all of it is exactly 0.

    It is where its 95% interval leaves 0 out, and it exceeds twice the sampling error `noise` of the mean where that is
    known: a spread that a few replicates happen to show can be too small, but not smaller than what sampling makes.
    """
    if found.mean == 0 and found.standard_deviation == 0:
        return None
    if found.interval is None or found.interval[0] <= 0 <= found.interval[1]:
        return False
    return noise is None or abs(found.mean) > NOISE * noise


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values: below 5% the chance of any false one among all is below 5%."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
