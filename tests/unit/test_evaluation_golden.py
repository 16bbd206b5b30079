"""Metric arithmetic against the ADM evaluator's own numbers (tests/golden/eval)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixflow.evaluation import frechet_distance, inception_score, moments, precision_recall, resize_tf1

GOLDEN = Path(__file__).parents[1] / "golden" / "eval"
SCALARS = json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="module")
def fid():
    return np.load(GOLDEN / "fid.npz")


@pytest.fixture(scope="module")
def neighbours():
    return np.load(GOLDEN / "prec_recall.npz")


@pytest.fixture(scope="module")
def activations():
    return np.load(GOLDEN / "inception_score.npz")


@pytest.fixture(scope="module")
def pixels():
    return np.load(GOLDEN / "resize.npz")


@pytest.mark.parametrize("case", SCALARS["fid"])
def test_moments_equal_the_evaluators(fid, case):
    for side in "ab":
        mu, sigma = moments(fid[f"{case}__{side}"])
        # The evaluator's means of float32 features are float32.
        mu_tolerance = 1e-12 if fid[f"{case}__{side}"].dtype == np.float64 else 2e-6
        np.testing.assert_allclose(mu, fid[f"{case}__mu_{side}"], rtol=0, atol=mu_tolerance)
        np.testing.assert_allclose(sigma, fid[f"{case}__sigma_{side}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", SCALARS["fid"])
@pytest.mark.parametrize("direction", ["ab", "ba"])
def test_frechet_distance_equals_the_evaluators(fid, case, direction):
    arguments = [fid[f"{case}__{field}_{side}"] for side in direction for field in ("mu", "sigma")]
    expected = SCALARS["fid"][case][f"fid_{direction}"]
    singular = case in ("constant_columns", "rank_deficient", "rank_deficient_disjoint")
    tolerance = 2e-6 if singular else 1e-9 * expected if case == "relu_corr_f64" else 3e-8
    assert frechet_distance(*arguments) == pytest.approx(expected, rel=0, abs=tolerance)


@pytest.mark.parametrize("case", SCALARS["fid"])
def test_distance_of_features_equals_the_evaluators(fid, case):
    """The whole way from float32 features, with float64 means where the evaluator has float32 ones."""
    distance = frechet_distance(*moments(fid[f"{case}__a"]), *moments(fid[f"{case}__b"]))
    singular = case in ("constant_columns", "rank_deficient", "rank_deficient_disjoint")
    expected = SCALARS["fid"][case]["fid_ab"]
    assert distance == pytest.approx(expected, rel=0, abs=2e-6 if singular else 1e-7)


NEIGHBOUR_CASES = [
    (case, k, i)
    for case, facts in SCALARS["prec_recall"].items()
    if case != "clamp_90"
    for i, k in enumerate(facts["nhood_sizes"])
]


@pytest.mark.parametrize(("case", "k", "i"), NEIGHBOUR_CASES)
def test_adm_precision_recall_equals_the_evaluators(neighbours, case, k, i):
    facts = SCALARS["prec_recall"][case]
    reference, samples = neighbours[f"{case}__ref"], neighbours[f"{case}__sample"]
    # base_fp16_small_blocks has oblong blocks, which change nothing as long as none overflows.
    precision, recall = precision_recall(reference, samples, k=k, mode="adm", block_size=facts["row_batch_size"])
    assert precision == pytest.approx(facts["precision"][i], abs=1e-9)
    assert recall == pytest.approx(facts["recall"][i], abs=1e-9)


@pytest.mark.parametrize(("case", "k", "i"), NEIGHBOUR_CASES)
@pytest.mark.parametrize("block_size", [10_000, 64])
def test_exact_precision_recall_equals_float64(neighbours, case, k, i, block_size):
    facts = SCALARS["prec_recall"][case]["float64_exact"]
    reference, samples = neighbours[f"{case}__ref"], neighbours[f"{case}__sample"]
    found = precision_recall(reference, samples, k=k, mode="exact", block_size=block_size)
    assert found == pytest.approx((facts["precision"][i], facts["recall"][i]), rel=0, abs=1e-12)


@pytest.mark.parametrize("case", SCALARS["inception_score"])
def test_inception_score_equals_the_evaluators(activations, case):
    facts = SCALARS["inception_score"][case]
    acts, weights = activations[f"{case}__acts"], activations[f"{case}__W"]
    in_float64 = inception_score(acts.astype(np.float64) @ weights.astype(np.float64), facts["split_size"])
    assert in_float64 == pytest.approx(facts["float64_logsoftmax"], rel=1e-12)
    if facts["inception_score"] != "nan":  # the evaluator's answer where a float32 probability is zero
        in_float32 = inception_score(acts @ weights, facts["split_size"])
        assert in_float32 == pytest.approx(facts["inception_score"], rel=1e-6)


@pytest.mark.parametrize("size", SCALARS["resize"])
def test_resize_is_tensorflows_to_the_bit(pixels, size):
    images, rows = torch.from_numpy(pixels[f"in_{size}"]), pixels["rows_index"]
    resized = resize_tf1(images, 299)
    assert resized.dtype == torch.float32
    np.testing.assert_array_equal(resized[0, rows].numpy(), pixels[f"resized_{size}_rows"])
    planar = resize_tf1(images.permute(0, 3, 1, 2), 299)
    assert torch.equal(planar.permute(0, 2, 3, 1), resized)
    if f"norm_{size}_grid" in pixels:
        grid = ((resized - 128) * 0.0078125)[0][np.ix_(rows, rows)]
        np.testing.assert_array_equal(grid.numpy(), pixels[f"norm_{size}_grid"])


def test_half_pixel_resize_is_another_one(pixels):
    images = torch.from_numpy(pixels["in_256"])
    usual = F.interpolate(images.permute(0, 3, 1, 2).float(), (299, 299), mode="bilinear").permute(0, 2, 3, 1)
    assert float((usual - resize_tf1(images, 299)).abs().mean()) > 5
