"""How far a metric would move with other samples of the same model: sampling noise, and nothing else.

A standard error here says nothing about training again (several times more for FID), another reference, or another
protocol; it regards the reference as given. It comes from one set of samples, without drawing any of them twice: the
duplicates of a bootstrap raise FID.

FID, sFID, IS, KID, precision and density are means, or smooth functions, of the samples: to first order their error is
that of the mean of each image's influence (the infinitesimal jackknife). Influences are averaged over groups of
consecutive images and the groups compared, so that labels which run through the classes again and again, and so are
balanced in every group, do not count as noise (random labels do). What is beyond first order makes the result too
large and not too small: 1.3 times the truth for FID and KID where the model equals the data and all of the distance is
the bias of a finite set, right where it is well away from them. Recall and coverage are not smooth; see `_share_error`.
tests/unit/test_uncertainty.py holds all of them against sets drawn again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from mixflow.evaluation.arrays import Array
from mixflow.evaluation.frechet import frechet_influence
from mixflow.evaluation.inception_score import inception_score_influence
from mixflow.evaluation.kernel import kernel_distance
from mixflow.evaluation.precision_recall import (
    MAX_KEYED,
    Counts,
    density_coverage_counts,
    precision_recall_counts,
)

_FEWEST_IMAGES = 20  # two for each of at least ten groups


class Estimate(NamedTuple):
    """A metric and its sampling noise."""

    value: float
    standard_error: float | None  # None where there are too few images to tell
    groups: tuple[float, ...] | None = None  # of `group_influences`; None where the metric has none


class Spread(NamedTuple):
    """One metric of several sets of samples, of disjoint seeds."""

    mean: float
    standard_deviation: float | None  # of one set, ddof = 1; None for a single set
    minimum: float  # what EDM and its successors report
    count: int  # type: ignore[assignment]  # of the values; the method of tuples is not missed


def spread(values: Sequence[float]) -> Spread:
    """Return the mean, standard deviation, minimum and number of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, min(values), len(values))


def frechet_estimate(mu: Array, sigma: Array, features: Array, factor: Array | None = None) -> Estimate:
    """Return `frechet_distance_to` with its standard error.

    The latter is up to 1.7 times too large with one or two images per feature or fewer.
    """
    value, influence = frechet_influence(mu, sigma, features, factor)
    return mean_estimate(value, influence)


def inception_score_estimate(logits: Array, split_size: int = 5000) -> Estimate:
    """Return `inception_score` with its standard error."""
    score, influence = inception_score_influence(logits, split_size)
    return mean_estimate(score, influence)


def kid_estimate(
    reference: Array, samples: Array, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Estimate:
    """Return the mean of `kernel_distance` with its standard error, the noise of drawing subsets of samples included.

    torch-fidelity's standard deviation over subsets is another thing: it hardly depends on the number of images.
    """
    distance = kernel_distance(reference, samples, num_subsets, subset_size, seed)
    return mean_estimate(distance.mean, distance.influence)


def precision_recall_estimate(
    reference: Array,
    samples: Array,
    k: int = 3,
    mode: str = "adm",
    block_size: int = 10_000,
    reference_radii: Tensor | None = None,
) -> tuple[Estimate, Estimate]:
    """Return both numbers of `precision_recall` with standard errors; recall's takes the samples' radii as given."""
    counts = precision_recall_counts(reference, samples, k, mode, block_size, reference_radii)
    inside = (counts.balls > 0).double()
    return mean_estimate(float(inside.mean()), inside), _share_estimate(counts)


def density_coverage_estimate(
    reference: Array, samples: Array, k: int = 5, reference_radii: Tensor | None = None
) -> tuple[Estimate, Estimate]:
    """Return both numbers of `density_coverage` with standard errors."""
    counts = density_coverage_counts(reference, samples, k, reference_radii)
    density = mean_estimate(float(counts.balls.mean() / k), counts.balls / k)
    return density, _share_estimate(counts)


def mean_estimate(value: float, influence: Tensor) -> Estimate:
    """Return a metric that is to first order the mean of `influence` [n], in file order, with its sampling noise."""
    return Estimate(value, standard_error(influence), group_influences(influence))


def group_influences(influence: Tensor) -> tuple[float, ...] | None:
    """Return what each group of consecutive images adds to the mean of the centred `influence` [n].

    They add up to 0. Those of another model's images from the same noise and labels, subtracted one by one, are those
    of the difference of the two metrics: what the two sets share cancels. Ten groups, or as many as have a thousand
    images (each class of ImageNet once), but no more than fifty; None for fewer than 20 images.
    """
    if len(influence) < _FEWEST_IMAGES:
        return None
    num_groups = min(max(len(influence) // 1000, 10), 50)
    # Sums and not means, so that groups of unequal size count by it.
    groups = (influence - influence.mean()).tensor_split(num_groups)
    return tuple((torch.stack([group.sum() for group in groups]) / len(influence)).tolist())


def standard_error(influence: Tensor) -> float | None:
    """Return the standard error of the mean of `influence` [n], in file order; None for fewer than 20 images.

    (G / (G-1) Σ c²)^½ over the G `group_influences` c: good to 24 % of itself with ten groups, to 10 % with fifty.
    """
    groups = group_influences(influence)
    if groups is None:
        return None
    return math.sqrt(len(groups) / (len(groups) - 1) * math.fsum(c * c for c in groups))


def _share_estimate(counts: Counts) -> Estimate:
    share = float((counts.samples > 0).double().mean())
    return Estimate(share, None if len(counts.balls) < _FEWEST_IMAGES else _share_error(counts))


def _share_error(counts: Counts) -> float:
    """Return the standard error of the share of the R reference points that some sample reaches.

    Let m_S be how many reference points are reached by exactly the samples S. Were the number of samples Poisson, and
    did each reach the same points whatever the others are, then sum over S of (-1)^(|S|+1) m_S² / R² would have the
    variance as its mean: points r, s that l_r, l_s samples reach on average, and l_rs both, are both missed with
    probability exp(-l_r - l_s + l_rs) by one set of samples, exp(-l_r - l_s) by two independent ones; and 1[N = 0] and
    (-1)^N are estimates without bias of exp(-l) and exp(-2l). The terms of |S| = 1 alone are the jackknife, too large
    by up to 2 times; they stand in where the sum is not positive, which happens where a handful of points is missed.
    Beyond |S| = 2 the terms fade out by a binomial tail (Euler's summation), as they alternate; the last one takes the
    Poisson spread of the number of samples away.

    For coverage that holds exactly. Recall's radii do depend on the other samples, as of two samples close together
    either lets the other's ball grow when it is left out.
    """
    num_points, num_samples = len(counts.samples), len(counts.balls)
    sizes, terms = counts.samples, []
    for size in range(1, MAX_KEYED + 1):
        squares = torch.unique(counts.keys[sizes == size], return_counts=True)[1].double().square().sum()
        tail = sum(comb(MAX_KEYED - 2, i) for i in range(max(size - 2, 0), MAX_KEYED - 1)) / 2 ** (MAX_KEYED - 2)
        terms.append((-1) ** (size + 1) * tail * squares)
    poisson = (sizes == 1).sum() ** 2 / num_samples
    variance = torch.stack(terms).sum() - poisson
    variance = torch.where(variance > 0, variance, terms[0] - poisson)
    return float(variance.clamp(min=0).sqrt() / num_points)
