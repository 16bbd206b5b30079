"""Precision, recall, density and coverage against brute force, prdc's own numbers, and one another."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow.evaluation.precision_recall import density_coverage, precision_recall, squared_radii
from mixflow.runtime.errors import UserError

MODULE = importlib.import_module("mixflow.evaluation.precision_recall")  # the package has the function by that name
PRDC = Path(__file__).parents[1] / "golden" / "prdc"
PRDC_NUMBERS = json.loads((PRDC / "golden.json").read_text())
ADM = Path(__file__).parents[1] / "golden" / "eval"
ADM_CASES = json.loads((ADM / "golden.json").read_text())["prec_recall"]


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def whole_numbers(n: int, d: int, seed: int) -> torch.Tensor:
    """Few values, so that many points coincide or lie on the surface of a ball; squared distances are exact."""
    return torch.randint(0, 4, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def squared_distances(u: torch.Tensor, v: torch.Tensor) -> np.ndarray:
    u, v = u.double().numpy(), v.double().numpy()
    return ((u[:, None] - v[None]) ** 2).sum(axis=2)


def brute_radii(points: torch.Tensor, k: int) -> np.ndarray:
    distances = squared_distances(points, points)
    np.fill_diagonal(distances, -1)  # first in the row, whatever coincides with it
    return np.sort(distances, axis=1)[:, k]


def brute_precision_recall(reference, samples, k):
    distances = squared_distances(reference, samples)
    in_real = distances <= brute_radii(reference, k)[:, None]
    in_fake = distances <= brute_radii(samples, k)[None]
    return in_real.any(axis=0).mean(), in_fake.any(axis=1).mean()


def brute_density_coverage(reference, samples, k):
    """Naeem et al., 2020: 1/(kM) sum_j sum_i 1[Y_j in B(X_i)], and 1/N sum_i 1[some Y_j in B(X_i)]."""
    inside = squared_distances(reference, samples) < brute_radii(reference, k)[:, None]
    return inside.sum() / (k * len(samples)), inside.any(axis=1).mean()


SETS = {
    "normal": (normal(90, 5, 0), normal(70, 5, 1) * 0.8 + 0.3),
    "ties": (whole_numbers(90, 3, 2), whole_numbers(60, 3, 3)),
    "duplicates": (whole_numbers(12, 5, 4).repeat(7, 1), torch.cat([whole_numbers(30, 5, 5), whole_numbers(12, 5, 4)])),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("tile", [2048, 17, 4])  # several tiles, ragged ones, and tiles narrower than k + 1
def test_exact_numbers_equal_brute_force(monkeypatch, name, k, tile):
    monkeypatch.setattr(MODULE, "_TILE", tile)
    reference, samples = SETS[name]
    np.testing.assert_allclose(squared_radii(reference, k, "exact"), brute_radii(reference, k), rtol=1e-12, atol=1e-12)
    expected = brute_precision_recall(reference, samples, k)
    assert precision_recall(reference, samples, k=k, mode="exact") == pytest.approx(expected, rel=1e-13)
    expected = brute_density_coverage(reference, samples, k)
    assert density_coverage(reference, samples, k=k) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(("case", "k"), [(case, k) for case in PRDC_NUMBERS for k in PRDC_NUMBERS[case]])
def test_density_and_coverage_equal_prdcs(case, k):
    with np.load(PRDC / "prdc.npz") as arrays:
        reference, samples = arrays[f"{case}__reference"], arrays[f"{case}__samples"]
    numbers = PRDC_NUMBERS[case][k]
    expected = (numbers["density"], numbers["coverage"])
    assert density_coverage(reference, samples, k=int(k)) == pytest.approx(expected, rel=1e-12)
    if case in ("gaussian", "crowded"):  # no point on a surface, which is inside here and outside there
        expected = (numbers["precision"], numbers["recall"])
        assert precision_recall(reference, samples, k=int(k), mode="exact") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_copies_do_not_depend_on_rounding(monkeypatch, seed):
    """A set compared with itself, in any order and tiling: k points are nearer to each point than the k-th other."""
    reference = normal(150, 40, seed) + 3
    shuffled = reference[torch.randperm(150, generator=torch.Generator().manual_seed(seed))]
    for tile in (2048, 13):
        monkeypatch.setattr(MODULE, "_TILE", tile)
        assert density_coverage(reference, shuffled) == (pytest.approx(1, rel=1e-14), 1)
    fourfold = reference.repeat(4, 1)  # all radii are zero
    assert precision_recall(fourfold, shuffled, mode="exact") == (1, 1)
    assert density_coverage(fourfold, shuffled, k=3) == (0, 0)


def test_density_exceeds_one_where_samples_crowd():
    density, coverage = density_coverage(normal(300, 4, 0), normal(300, 4, 1) * 0.3)
    assert density > 1.3
    assert coverage < 0.9


@pytest.mark.parametrize("case", [case for case in ADM_CASES if case != "clamp_90"])
def test_tiles_change_nothing_in_half_precision(monkeypatch, case):
    """Blocks decide what overflows; the tiles that they are worked through in do not."""
    with np.load(ADM / "prec_recall.npz") as arrays:
        reference, samples = arrays[f"{case}__ref"], arrays[f"{case}__sample"]
    block_size = ADM_CASES[case]["row_batch_size"]
    expected = precision_recall(reference, samples, mode="adm", block_size=block_size)
    radii = squared_radii(reference, 3, "adm", block_size)
    monkeypatch.setattr(MODULE, "_TILE", 37)
    assert torch.equal(squared_radii(reference, 3, "adm", block_size), radii)
    assert precision_recall(reference, samples, mode="adm", block_size=block_size) == expected


def test_one_large_image_moves_its_whole_block_to_float32():
    """One distance that overflows half precision decides for its block, in whatever tile it lies."""
    reference = normal(100, 16, 0) * 4
    reference[77] *= 80
    in_half, in_float32 = (squared_radii(reference, 3, "adm", block_size) for block_size in (50, 100))
    exact = squared_radii(reference, 3, "exact").float()
    assert torch.equal(in_float32, exact)
    assert not torch.equal(in_half[:50], exact[:50])


@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_cached_radii_change_nothing(mode):
    reference, samples = SETS["normal"]
    radii = squared_radii(reference, 3, mode)
    assert radii.dtype == {"adm": torch.float32, "exact": torch.float64}[mode]
    expected = precision_recall(reference, samples, mode=mode)
    assert precision_recall(reference, samples, mode=mode, reference_radii=radii) == expected
    assert precision_recall(reference, samples, mode=mode, reference_radii=0 * radii)[0] == 0
    if mode == "exact":
        radii = squared_radii(reference, 5, "exact")
        assert density_coverage(reference, samples, reference_radii=radii) == density_coverage(reference, samples)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_features_are_left_as_they_are(dtype):
    reference, samples = (points.to(dtype) for points in SETS["normal"])
    before = reference.clone(), samples.clone()
    for mode in ("adm", "exact"):
        precision_recall(reference, samples, mode=mode)
    density_coverage(reference, samples)
    assert torch.equal(reference, before[0])
    assert torch.equal(samples, before[1])


def test_what_does_not_fit_is_named():
    points = normal(20, 4, 0)
    with pytest.raises(UserError, match="samples holds 5 images where k = 5 needs at least 6"):
        density_coverage(points, points[:5])
    with pytest.raises(UserError, match="4 features and samples have 3"):
        density_coverage(points, points[:, :3])
    with pytest.raises(UserError, match="points holds 3 images where k = 3"):
        squared_radii(points[:3], 3, "adm")
    with pytest.raises(UserError, match="did you mean 'exact'"):
        squared_radii(points, 3, "exat")
    with pytest.raises(UserError, match="row 2 of samples holds NaN"):
        density_coverage(points, torch.where(torch.arange(20)[:, None] == 2, torch.nan, points))
