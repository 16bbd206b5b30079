"""Metrics against closed forms and independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixflow.evaluation import (
    Moments,
    class_accuracy,
    covariance_factor,
    frechet_distance,
    inception_score,
    memorisation,
    moments,
    nearest_distances,
    precision_recall,
    resize_tf1,
    variance_ratio,
)
from mixflow.runtime.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_features(n: int, d: int, seed: int = 0) -> torch.Tensor:
    g = generator(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) / d**0.5 + torch.rand(d, generator=g)


# Moments


@pytest.mark.parametrize("splits", [[300], [1, 299], [100, 0, 200], [7] * 42 + [6]])
def test_moments_do_not_depend_on_batches_or_devices(splits):
    features = random_features(300, 16)
    whole = np.cov(features.double().numpy(), rowvar=False)
    streamed, parts = Moments(16), []
    for batch in features.split(splits):
        streamed.update(batch)
        parts.append(Moments(16))
        parts[-1].update(batch)
    merged = Moments(16)
    for part in parts:
        merged.merge(part)
    states = [part.state() for part in parts]
    reduced = Moments.from_state({key: torch.stack([state[key] for state in states]).sum(0) for key in states[0]})
    for seen in (streamed, merged, reduced):
        assert seen.n == 300
        torch.testing.assert_close(seen.mean, features.double().mean(0), rtol=0, atol=1e-13)
        np.testing.assert_allclose(seen.covariance, whole, rtol=0, atol=1e-12)
        assert torch.equal(seen.covariance, seen.covariance.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_moments_are_float64_sums_of_any_float_type(dtype):
    features = random_features(5000, 4).to(dtype)  # more rows than are converted at a time
    mu, sigma = moments(features)
    assert mu.dtype == sigma.dtype == torch.float64
    np.testing.assert_allclose(sigma, np.cov(features.double().numpy(), rowvar=False), rtol=0, atol=1e-12)


def test_moments_survive_a_mean_a_thousand_times_the_spread():
    features = random_features(2000, 8).double() + 1000
    np.testing.assert_allclose(moments(features)[1], np.cov(features.numpy(), rowvar=False), rtol=0, atol=2e-8)


def test_moments_read_memory_maps(tmp_path, recwarn):
    features = random_features(50, 4)
    np.save(tmp_path / "features.npy", features.numpy())
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    torch.testing.assert_close(moments(mapped), moments(features), rtol=0, atol=0)
    assert not recwarn.list


def test_moments_refuse_what_would_spoil_them():
    features = random_features(10, 4)
    features[3, 2] = float("nan")
    features[7, 0] = float("inf")
    with pytest.raises(UserError, match="row 3 of features holds NaN or infinity, as do 2 of 10"):
        moments(features)
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        moments(random_features(1, 4))
    with pytest.raises(UserError, match=r"shape \[n, d\]"):
        moments(torch.zeros(3))
    with pytest.raises(UserError, match="4 columns where 5"):
        Moments(5).update(random_features(10, 4))
    with pytest.raises(UserError, match="cannot be merged"):
        Moments(5).merge(Moments(4))


# Fréchet distance


def test_frechet_distance_of_commuting_covariances():
    """For covariances of common eigenvectors: |mu1 - mu2|² + sum of (sqrt a - sqrt b)² over the eigenvalues."""
    g = generator()
    a, b = torch.rand(32, generator=g).double() + 0.1, torch.rand(32, generator=g).double() + 0.1
    basis = torch.linalg.qr(torch.randn(32, 32, generator=g).double()).Q
    mu = torch.randn(32, generator=g).double()
    expected = float(mu.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = frechet_distance(mu, basis * a @ basis.T, torch.zeros(32), basis * b @ basis.T)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n1", "n2"), [(20, 15), (200, 15), (20, 200), (200, 300)])
def test_frechet_distance_equals_the_nuclear_norm(n1, n2):
    """tr (S1 S2)^½ is the nuclear norm of X1 X2ᵀ / sqrt((n1 - 1)(n2 - 1)), X centred: no root of rounding errors."""
    x1, x2 = random_features(n1, 48, seed=1).double(), random_features(n2, 48, seed=2).double()
    c1, c2 = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (x1, x2))
    norm = torch.linalg.svdvals(c1 @ c2.T).sum()
    expected = (x1.mean(0) - x2.mean(0)).square().sum() + c1.square().sum() + c2.square().sum() - 2 * norm
    tolerance = 1e-11 if min(n1, n2) > 48 else 5e-6
    assert frechet_distance(*moments(x1), *moments(x2)) == pytest.approx(float(expected), rel=0, abs=tolerance)


@pytest.mark.parametrize("n", [20, 200])
def test_a_cached_factor_changes_nothing(n):
    real, fake = moments(random_features(n, 48, seed=1)), moments(random_features(100, 48, seed=2))
    factor = covariance_factor(real[1])
    torch.testing.assert_close(factor @ factor.T, real[1], rtol=0, atol=1e-13)
    assert frechet_distance(*real, *fake, factor=factor) == frechet_distance(*real, *fake)


def test_frechet_distance_of_points():
    """No variance at all: both covariances are zero and the squared distance of the means remains."""
    assert frechet_distance(np.zeros(3), np.zeros((3, 3)), np.full(3, 2.0), np.zeros((3, 3))) == 12


def test_frechet_distance_names_what_does_not_fit():
    mu, sigma = moments(random_features(20, 4))
    mu8, sigma8 = moments(random_features(20, 8))
    with pytest.raises(UserError, match=r"mu2 has shape \[8\] where \[4\]"):
        frechet_distance(mu, sigma, mu8, sigma8)
    with pytest.raises(UserError, match=r"sigma1 has shape \[8, 8\] where \[4, 4\]"):
        frechet_distance(mu, sigma8, mu, sigma)
    with pytest.raises(UserError, match="sigma2 holds NaN"):
        frechet_distance(mu, sigma, mu, sigma * float("nan"))


# Inception Score, precision and recall, resize: what the golden numbers do not cover


def test_inception_score_limits():
    certain = torch.eye(10).repeat(5, 1) * 1e4  # each image sure of its class, classes balanced
    assert inception_score(certain) == pytest.approx(10, rel=1e-12)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1, rel=1e-12)
    by_class = certain[certain.argmax(1).argsort()]
    assert inception_score(by_class, split_size=5) == pytest.approx(1, rel=1e-12)  # file order counts
    with pytest.raises(UserError, match="0 images"):
        inception_score(torch.zeros(0, 10))
    with pytest.raises(UserError, match="split_size"):
        inception_score(certain, split_size=0)


@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_precision_and_recall_see_different_failures(mode):
    two_modes = torch.cat(
        [torch.randn(100, 2, generator=generator(1)), torch.randn(100, 2, generator=generator(2)) + 20]
    )
    dropped = torch.randn(200, 2, generator=generator(3)) * 0.8
    precision, recall = precision_recall(two_modes, dropped, mode=mode)
    assert precision > 0.9
    assert 0.3 < recall <= 0.5  # the second mode is never reached


def test_precision_recall_names_what_does_not_fit():
    points = random_features(20, 4)
    with pytest.raises(UserError, match="did you mean 'exact'"):
        precision_recall(points, points, mode="exat")
    with pytest.raises(UserError, match="samples holds 3 images where k = 3 needs at least 4"):
        precision_recall(points, points[:3])
    with pytest.raises(UserError, match="4 features and samples have 3"):
        precision_recall(points, points[:, :3])
    with pytest.raises(UserError, match="must be at least 1"):
        precision_recall(points, points, k=0)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 4, dtype=torch.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8)],
)
def test_resize_takes_byte_images_only(images):
    with pytest.raises(UserError, match="must be uint8"):
        resize_tf1(images, 299)


# Accuracy, variance, memorisation


def test_class_accuracy():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert class_accuracy(logits, np.array([0, 1, 0, 0])) == 0.75
    with pytest.raises(UserError, match="a label per row"):
        class_accuracy(logits, torch.tensor([0, 1]))


def random_images(n: int, seed: int, size: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (n, size, size, 1), generator=generator(seed), dtype=torch.uint8)


def test_variance_ratio_is_the_ratio_of_covariance_traces(monkeypatch):
    samples, reference = random_images(50, 1) // 2, random_images(80, 2)
    traces = [np.trace(np.cov(x.flatten(1).double().numpy(), rowvar=False)) for x in (samples, reference)]
    expected = pytest.approx(traces[0] / traces[1], rel=1e-12)
    assert variance_ratio(samples, reference) == expected
    assert traces[0] / traces[1] == pytest.approx(0.25, rel=0.1)
    monkeypatch.setattr("mixflow.evaluation.metrics._BLOCK_IMAGES", 7)
    assert variance_ratio(samples.numpy(), reference.numpy()) == expected


def test_variance_ratio_names_what_does_not_fit():
    images = random_images(10, 1)
    with pytest.raises(UserError, match=r"samples \[10, 6, 6, 1\], reference \[10, 6, 6, 3\]"):
        variance_ratio(images, images.expand(-1, -1, -1, 3))
    with pytest.raises(UserError, match="samples hold uint8 images and reference do not"):
        variance_ratio(images, images / 255)
    with pytest.raises(UserError, match="no variance"):
        variance_ratio(images, images[:1].expand(5, -1, -1, -1))
    with pytest.raises(UserError, match="at least 2 images"):
        variance_ratio(images[:1], images)


@pytest.mark.parametrize("block", [3, 2048])
def test_nearest_distances_equal_all_pairs(monkeypatch, block):
    monkeypatch.setattr("mixflow.evaluation.metrics._BLOCK_IMAGES", block)
    samples, reference = random_images(11, 1), random_images(17, 2)
    samples[4] = reference[9]
    pairs = torch.cdist(samples.flatten(1).double() / 255, reference.flatten(1).double() / 255)
    found = nearest_distances(samples, reference)
    torch.testing.assert_close(found, pairs.amin(1), rtol=1e-12, atol=1e-12)
    assert found[4] == 0  # exactly: a copy is a copy
    as_floats = nearest_distances(samples.float() / 255, reference.float() / 255)
    torch.testing.assert_close(as_floats, found, rtol=1e-5, atol=1e-6)


def test_memorisation_tells_copies_from_new_images():
    train, held_out = random_images(200, 1), random_images(50, 2)
    new = memorisation(random_images(400, 3), train, held_out)
    assert new["num_compared"] == 50
    assert new["share_nearer_train"] == pytest.approx(0.5, abs=0.1)
    assert new["nearest_train"] == pytest.approx(new["nearest_held_out"], rel=0.02)
    assert new["held_out_to_train"] == pytest.approx(new["nearest_train"], rel=0.02)
    assert new["nearest_train_all"] == pytest.approx(new["held_out_to_train_all"], rel=0.02)
    assert new["nearest_train_all"] < new["nearest_train"]  # more images, a nearer one: why sizes are made equal
    assert new["share_copies"] < 0.06

    # A quarter of the samples copies a training image; the compared quarter of the training set holds some of them.
    samples = random_images(400, 3)
    samples[:100] = train[:100]
    copied = memorisation(samples, train, held_out)
    assert copied["share_copies"] == pytest.approx(0.25 + 0.75 * new["share_copies"], abs=0.02)
    assert copied["share_nearer_train"] > new["share_nearer_train"]
    assert copied["nearest_train_all"] < 0.8 * copied["held_out_to_train_all"]


def test_memorisation_does_not_mistake_blur_for_copies():
    train, held_out = random_images(200, 1), random_images(50, 2)
    blurred = (random_images(400, 3).double() * 0.1 + 0.9 * 127.5).byte()
    found = memorisation(blurred, train, held_out)
    assert found["nearest_train_all"] < found["held_out_to_train_all"]  # nearer to everything ...
    assert found["nearest_train"] == pytest.approx(found["nearest_held_out"], rel=0.03)  # ... alike


def test_memorisation_of_a_perfect_memory():
    train, held_out = random_images(40, 1), random_images(40, 2)
    found = memorisation(train, train, held_out)
    assert found["nearest_train"] == found["nearest_train_all"] == 0
    assert found["share_nearer_train"] == found["share_copies"] == 1
