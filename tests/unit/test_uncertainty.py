"""Standard errors against the spread of metrics over sets drawn again, and influences against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mixflow.evaluation.frechet import covariance_factor, frechet_distance, frechet_distance_to, frechet_influence
from mixflow.evaluation.inception_score import inception_score, inception_score_influence
from mixflow.evaluation.kernel import kernel_distance
from mixflow.evaluation.metrics import variance_ratio, variance_ratio_influence
from mixflow.evaluation.moments import moments
from mixflow.evaluation.precision_recall import density_coverage, precision_recall, squared_radii
from mixflow.evaluation.uncertainty import (
    Estimate,
    Spread,
    density_coverage_estimate,
    frechet_estimate,
    group_influences,
    inception_score_estimate,
    kid_estimate,
    precision_recall_estimate,
    spread,
    standard_error,
)
from mixflow.runtime.errors import UserError


def features(n: int, d: int, g: torch.Generator, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(n, d, generator=g) * scale + shift


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ratio(estimate: Callable[[], Estimate], repeats: int) -> float:
    """Return the root mean squared standard error over the standard deviation (good to 1/sqrt(2 repeats))."""
    found = [estimate() for _ in range(repeats)]
    values = torch.tensor([one.value for one in found], dtype=torch.float64)
    errors = torch.tensor([one.standard_error for one in found], dtype=torch.float64)
    return float(errors.square().mean().sqrt() / values.std())


# Against sets drawn again. All ratios are seeded; 200 repeats leave 5 % of chance.


@pytest.mark.parametrize(
    ("n", "d", "shift", "scale", "low", "high"),
    [
        (1000, 8, 0.3, 0.8, 0.85, 1.15),  # well away from the reference
        (1000, 8, 0.0, 1.0, 1.0, 1.45),  # nothing but bias: too large, as documented
        (24, 32, 0.5, 0.9, 1.0, 1.8),  # fewer images than features
    ],
)
def test_frechet_distance_drawn_again(n, d, shift, scale, low, high):
    g = generator()
    mu, sigma = moments(features(20_000, d, g))
    factor = covariance_factor(sigma)
    assert low < ratio(lambda: frechet_estimate(mu, sigma, features(n, d, g, shift, scale), factor), 200) < high
    assert frechet_estimate(mu, sigma, features(19, d, g)).standard_error is None


@pytest.mark.parametrize(("n", "split_size"), [(1000, 5000), (1000, 250), (1050, 500)])
def test_inception_score_drawn_again(n, split_size):
    g = generator()
    weights = torch.randn(8, 20, generator=g) * 1.5
    found = ratio(lambda: inception_score_estimate(features(n, 8, g) @ weights, split_size), 200)
    assert 0.85 < found < 1.15


@pytest.mark.parametrize(("shift", "low", "high"), [(0.3, 0.85, 1.15), (0.0, 1.0, 1.45)])
def test_kid_drawn_again(shift, low, high):
    g = generator()
    reference = features(1000, 8, g)
    found = ratio(lambda: kid_estimate(reference, features(600, 8, g, shift, 0.9 if shift else 1), 15, 150), 150)
    assert low < found < high


@pytest.mark.parametrize(
    ("n", "d", "shift", "scale"), [(400, 4, 0.5, 0.8), (300, 8, 0.3, 0.9), (900, 8, 0.3, 0.8), (300, 8, 0.0, 1.0)]
)
def test_neighbours_drawn_again(n, d, shift, scale):
    g = generator()
    reference = features(300, d, g)
    radii = squared_radii(reference, 3, "exact")
    sets = [features(n, d, g, shift, scale) for _ in range(150)]
    estimates = [
        [
            *precision_recall_estimate(reference, samples, mode="exact", reference_radii=radii),
            # k = 3 for a coverage that misses more than a handful of points.
            *density_coverage_estimate(reference, samples, k=3, reference_radii=radii),
        ]
        for samples in sets
    ]
    for name, found in zip(("precision", "recall", "density", "coverage"), zip(*estimates, strict=True), strict=True):
        again = iter(found)
        assert 0.8 < ratio(lambda again=again: next(again), len(sets)) < 1.2, name


def test_half_precision_has_the_same_errors():
    g = generator()
    reference, samples = features(400, 8, g), features(500, 8, g, 0.3, 0.9)
    for adm, exact in zip(
        *(precision_recall_estimate(reference, samples, mode=m) for m in ("adm", "exact")), strict=True
    ):
        assert adm.standard_error == pytest.approx(exact.standard_error, rel=0.15)


def test_balanced_labels_are_no_noise():
    """With classes in turn, the class means do not vary; with random labels they do."""
    g = generator()
    means = features(10, 8, g, scale=3)
    mu, sigma = moments(features(20_000, 8, g) + means[torch.arange(20_000) % 10])

    def estimate(labels: torch.Tensor) -> Estimate:
        return frechet_estimate(mu, sigma, features(1000, 8, g, 0.2, 0.8) + means[labels])

    balanced = ratio(lambda: estimate(torch.arange(1000) % 10), 200)
    drawn = ratio(lambda: estimate(torch.randint(0, 10, (1000,), generator=g)), 200)
    assert 0.85 < balanced < 1.2
    assert 0.85 < drawn < 1.2


# The values are those of the metrics themselves.


def test_values_are_the_metrics():
    g = generator()
    reference, samples = features(300, 8, g), features(200, 8, g, 0.3)
    mu, sigma = moments(reference)
    assert frechet_estimate(mu, sigma, samples).value == frechet_distance_to(mu, sigma, samples)
    assert frechet_estimate(mu, sigma, samples[:7]).value == frechet_distance_to(mu, sigma, samples[:7])
    assert inception_score_estimate(samples, 70).value == inception_score(samples, 70)
    assert kid_estimate(reference, samples, 5, 100).value == kernel_distance(reference, samples, 5, 100).mean
    for mode in ("adm", "exact"):
        estimates = precision_recall_estimate(reference, samples, mode=mode)
        assert tuple(one.value for one in estimates) == precision_recall(reference, samples, mode=mode)
    assert tuple(one.value for one in density_coverage_estimate(reference, samples)) == density_coverage(
        reference, samples
    )


def test_a_cached_factor_is_used():
    g = generator()
    samples = features(200, 8, g)
    mu, sigma = moments(features(300, 8, g))
    factor = covariance_factor(sigma)
    assert frechet_estimate(mu, sigma, samples, factor) == frechet_estimate(mu, sigma, samples)
    assert frechet_distance_to(mu, sigma, samples, factor) == frechet_distance_to(mu, sigma, samples)
    # Another factor gives another distance: it is not computed again.
    assert frechet_distance_to(mu, sigma, samples, 0 * factor) > frechet_distance_to(mu, sigma, samples) + 1
    assert frechet_estimate(mu, sigma, samples, 2 * factor).value < frechet_distance_to(mu, sigma, samples) - 1


# Influences are derivatives.


def weighted_frechet(mu: torch.Tensor, sigma: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> float:
    """The distance where row i counts weights[i] times, by the general formula for the root of the product."""
    total = weights.sum()
    mean = (weights[:, None] * rows).sum(dim=0) / total
    centred = (rows - mean) * weights[:, None].sqrt()
    covariance = centred.T @ centred / total * (len(rows) / (len(rows) - 1))
    return frechet_distance(mu, sigma, mean, covariance)


@pytest.mark.parametrize(("n", "tolerance"), [(100, 1e-5), (5, 2e-3)])  # singular covariances: rounding of the distance
def test_frechet_influence_is_the_derivative(n, tolerance):
    g = generator(3)
    mu, sigma = moments(features(500, 8, g))
    rows = features(n, 8, g, 0.4, 0.7).double()
    _, influence = frechet_influence(mu, sigma, rows)
    centred = influence - influence.mean()
    for i in (0, n - 1):
        weights, step = torch.ones(n).double(), 1e-3
        weights[i] = 1 + step
        above = weighted_frechet(mu, sigma, rows, weights)
        weights[i] = 1 - step
        slope = (above - weighted_frechet(mu, sigma, rows, weights)) / (2 * step)
        assert slope * n == pytest.approx(float(centred[i]), rel=tolerance, abs=tolerance * float(centred.std()))


def test_frechet_influence_outlives_dead_features():
    g = generator()
    rows, reference = features(200, 8, g, 0.3), features(300, 8, g)
    alive = frechet_estimate(*moments(reference), rows)
    dead = torch.zeros(300, 2)
    found = frechet_estimate(*moments(torch.cat([reference, dead], dim=1)), torch.cat([rows, dead[:200]], dim=1))
    assert found[:2] == (pytest.approx(alive.value, abs=1e-6), pytest.approx(alive.standard_error, rel=1e-4))


def test_inception_score_influence_is_the_derivative():
    logits = features(60, 10, generator(), scale=2).double()
    score, influence = inception_score_influence(logits, split_size=5000)
    assert float(influence.mean()) == pytest.approx(0, abs=1e-12)

    def weighted(weights: torch.Tensor) -> float:
        p = torch.softmax(logits, dim=1)
        weights = weights / weights.sum()
        marginal = weights @ p
        return math.exp(float((weights[:, None] * p * (p / marginal).log()).sum()))

    weights, step = torch.ones(60).double(), 1e-4
    assert weighted(weights) == pytest.approx(score, rel=1e-12)
    weights[3] = 1 + step
    above = weighted(weights)
    weights[3] = 1 - step
    assert (above - weighted(weights)) / (2 * step) * 60 == pytest.approx(float(influence[3]), rel=1e-6)


def test_variance_ratio_influence_is_the_derivative():
    g = generator(5)
    images, reference = features(40, 6, g, 0.3, 0.8).double(), features(50, 6, g).double()
    value, influence = variance_ratio_influence(images, reference)
    assert value == variance_ratio(images, reference)

    def weighted(weights: torch.Tensor) -> float:
        mean = weights @ images / weights.sum()
        squares = (images - mean).square().sum(dim=1)
        return float(weights @ squares / weights.sum() * 40 / 39 / reference.var(dim=0).sum())

    weights, step = torch.ones(40).double(), 1e-4
    assert weighted(weights) == pytest.approx(value, rel=1e-12)
    weights[3] = 1 + step
    above = weighted(weights)
    weights[3] = 1 - step
    slope = (above - weighted(weights)) / (2 * step) * 40
    assert slope == pytest.approx(float(influence[3] - influence.mean()), rel=1e-6)


# Differences of two models' metrics, whose samples share noise and labels.


def paired_sets(g: torch.Generator, n: int, change: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples [n, 4] of two models from the same noise: the second answers it a little differently."""
    noise = features(n, 4, g)
    return 0.9 * noise + 0.2, (0.9 - change) * noise + 0.2 + change * features(n, 4, g)


def paired_error(mu, sigma, sets) -> float:
    groups = [frechet_estimate(mu, sigma, rows).groups for rows in sets]
    return math.sqrt(10 / 9 * sum((a - b) ** 2 for a, b in zip(*groups, strict=True)))


@pytest.mark.parametrize("change", [0.1, 0.5])
def test_the_error_of_a_paired_difference_drawn_again(change):
    g = generator(6)
    mu, sigma = moments(features(20_000, 4, g))
    differences, errors = [], []
    for _ in range(150):
        sets = paired_sets(g, 400, change)
        one, other = (frechet_distance_to(mu, sigma, rows) for rows in sets)
        differences.append(one - other)
        errors.append(paired_error(mu, sigma, sets) ** 2)
    truth = torch.tensor(differences).std().item()
    assert math.sqrt(sum(errors) / len(errors)) == pytest.approx(truth, rel=0.2)
    # As if the sets had nothing in common, it would be far too large.
    apart = math.hypot(*(frechet_estimate(mu, sigma, rows).standard_error for rows in sets))
    assert change > 0.1 or apart > 2 * truth


def test_the_error_of_a_paired_difference_is_that_of_a_paired_bootstrap():
    g = generator(7)
    mu, sigma = moments(features(20_000, 4, g))
    sets = paired_sets(g, 1000, 0.3)
    drawn = []
    for _ in range(150):
        rows = torch.randint(0, 1000, (1000,), generator=g)
        one, other = (frechet_distance_to(mu, sigma, rows_of[rows]) for rows_of in sets)
        drawn.append(one - other)
    # One set of ten groups knows its error to a quarter.
    assert paired_error(mu, sigma, sets) == pytest.approx(torch.tensor(drawn).std().item(), rel=0.5)


# The rest


def test_standard_error_of_a_mean():
    values = features(20_000, 1, generator(), 5, 3)[:, 0].double()
    assert standard_error(values) == pytest.approx(3 / 20_000**0.5, rel=0.35)  # 20 groups
    assert standard_error(values[:19]) is None
    groups = group_influences(values)
    assert groups is not None
    assert len(groups) == 20
    assert sum(groups) == pytest.approx(0, abs=1e-12)
    assert groups[1] == pytest.approx(float((values[1000:2000] - values.mean()).sum()) / 20_000)
    assert group_influences(values[:19]) is None
    assert standard_error(torch.full((20,), 0.1)) == pytest.approx(0, abs=1e-8)
    in_turn = (torch.arange(5000) % 5).double()
    assert standard_error(in_turn) == pytest.approx(0, abs=1e-12)


def test_shares_at_their_limits():
    g = generator()
    reference = features(100, 4, g)
    far, near = features(100, 4, g, 1000), reference.repeat(3, 1)
    assert [one[:2] for one in precision_recall_estimate(reference, far, mode="exact")] == [(0, 0), (0, 0)]
    assert density_coverage_estimate(reference, near)[1][:2] == (1, 0)
    assert [one.standard_error for one in precision_recall_estimate(reference, far[:10])] == [None, None]
    assert [one.standard_error for one in density_coverage_estimate(reference, far[:10])] == [None, None]


def test_spread():
    assert spread([2.0, 4.0, 3.0]) == Spread(mean=3, standard_deviation=1, minimum=2, count=3)
    assert spread([2.5]) == (2.5, None, 2.5, 1)


def test_what_does_not_fit_is_named():
    g = generator()
    mu, sigma = moments(features(50, 4, g))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_estimate(mu, sigma, features(1, 4, g))
    with pytest.raises(UserError, match=r"mu1 has shape \[4\] where \[3\]"):
        frechet_estimate(mu, sigma, features(30, 3, g))
