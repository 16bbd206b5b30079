"""KID against torch-fidelity's own arithmetic and the definition."""

from __future__ import annotations

import pytest
import torch

from mixflow.evaluation.kernel import kernel_distance
from mixflow.evaluation.uncertainty import kid_estimate
from mixflow.runtime.errors import UserError


def features(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize(("n", "m", "d", "shift"), [(300, 400, 16, 0.1), (250, 250, 64, 0.0), (200, 900, 8, 1.0)])
def test_it_equals_torch_fidelitys(n, m, d, shift):
    from torch_fidelity.metric_kid import (
        KEY_METRIC_KID_MEAN,
        KEY_METRIC_KID_STD,
        kid_features_to_metric,
    )

    reference, samples = features(n, d, 1), features(m, d, 2, shift)
    options = {"kid_subsets": 20, "kid_subset_size": 200, "rng_seed": 2020, "verbose": False}
    found = kernel_distance(reference, samples, num_subsets=20, subset_size=200)
    theirs = kid_features_to_metric(samples.double(), reference.double(), **options)
    # The sums that nearly cancel are about 1.
    assert found.mean == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-10, abs=1e-13)
    assert found.subset_std == pytest.approx(theirs[KEY_METRIC_KID_STD], rel=1e-10, abs=1e-13)
    in_float32 = kid_features_to_metric(samples, reference, **options)
    assert found.mean == pytest.approx(in_float32[KEY_METRIC_KID_MEAN], rel=1e-4, abs=1e-6)


def test_one_subset_of_all_images_is_the_definition():
    x, y = features(40, 6, 1).double(), features(40, 6, 2, 0.5).double()
    total = 0.0
    for i in range(40):
        for j in range(40):
            if i != j:
                total += float(((x[i] @ x[j] / 6 + 1) ** 3 + (y[i] @ y[j] / 6 + 1) ** 3) / (40 * 39))
            total -= float(2 * (x[i] @ y[j] / 6 + 1) ** 3 / 40**2)
    assert kernel_distance(x, y, num_subsets=1, subset_size=40).mean == pytest.approx(total, rel=1e-10)


def test_equal_distributions_are_at_no_distance():
    """Without bias: negative values occur."""
    values = [kernel_distance(features(100, 8, 2 * i), features(100, 8, 2 * i + 1), 1, 100).mean for i in range(40)]
    mean = sum(values) / len(values)
    assert min(values) < 0 < max(values)
    assert abs(mean) < 2 * float(torch.tensor(values).std()) / len(values) ** 0.5


def test_influence_is_what_an_image_adds():
    """Swapping one image for another moves the distance by the difference of their influences, to first order."""
    reference, samples = features(150, 6, 1), features(200, 6, 2, 0.3)
    whole = kernel_distance(reference, samples, num_subsets=10, subset_size=100)
    assert float(whole.influence.mean()) == pytest.approx(0, abs=1e-14)
    step = 1e-4
    nudged = samples.double().clone()
    nudged[7] += step
    moved = kernel_distance(reference, nudged, num_subsets=10, subset_size=100)
    # The image's own part moves fully in its row and half in the others' rows, which the factor 2 stands for.
    expected = float(moved.influence[7] - whole.influence[7]) / 200
    share = 0.99  # less the mean over a subset of 100, of which the image is one
    assert moved.mean - whole.mean == pytest.approx(expected / share, rel=0.05)


def test_what_does_not_fit_is_named():
    points = features(50, 4, 1)
    with pytest.raises(UserError, match="samples holds 20 images where a subset of KID takes 50: give more, or lower"):
        kernel_distance(points, points[:20], subset_size=50)
    with pytest.raises(UserError, match="reference holds 50 images where a subset of KID takes 1000"):
        kid_estimate(points, points)
    with pytest.raises(UserError, match="4 features and samples have 3"):
        kernel_distance(points, points[:, :3], subset_size=50)
    with pytest.raises(UserError, match="at least 2 images, got 5 of 1"):
        kernel_distance(points, points, num_subsets=5, subset_size=1)
