"""Warnings: each with its sentence where something is wrong, and none where chance or good practice explains it."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from mixflow.evaluation import checks
from mixflow.evaluation.checks import (
    comparison_warnings,
    count_warning,
    dimension_warning,
    duplicate_warning,
    label_kind,
    label_warning,
    order_warning,
    overlap_warning,
    pixel_warning,
    require_size,
    sample_warnings,
)
from mixflow.runtime.errors import UserError


def assert_sentence(text):
    """One sentence: no second line, no full stop before the end, and a fix after the last colon."""
    assert "\n" not in text
    assert ". " not in text
    assert not text.endswith(".")
    assert ": " in text


# --- pixel values


def pixels(*ranges):
    """(low, high) of images with these ranges, as read ahead."""
    return (np.array(side, np.int8) for side in zip(*ranges, strict=True))


def test_unscaled_values_are_told():
    cast = {"0, 1": (0, 1), "255, 0, 1": (-1, 1), "255, 0": (-1, 0), "0, 1, 2": (0, 2), "254, 255, 0, 1, 2": (-2, 2)}
    for values, span in cast.items():
        sentence = pixel_warning("a.npz", *pixels(span, span, (0, 0)))
        assert sentence.startswith(
            f"'a.npz' has no other values than {values}, as if images of 0 to 1 or -1 to 1 had been"
        )
        assert "write clamp(255 x + 0.5, 0, 255) or clamp(127.5 x + 128, 0, 255)" in sentence
        assert_sentence(sentence)


def test_a_cast_of_floats_is_what_the_signed_range_shows():
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    images[:, 0, 0] = -1
    signed = images.astype(np.int8)  # what C makes of a cast to unsigned bytes, too, where it is defined at all
    assert set(np.unique(signed.view(np.uint8))) == {0, 255}
    low, high = signed.reshape(4, -1).min(axis=1), signed.reshape(4, -1).max(axis=1)
    assert "has no other values than 255, 0, as if" in pixel_warning("a", low, high)


def test_dark_images_are_told():
    sentence = pixel_warning("a.npz", *pixels((0, 16), (0, 31)))
    assert "'a.npz' has values of 0 to 31 alone, so that every metric sees dark images: scale them" in sentence
    assert_sentence(sentence)
    assert pixel_warning("a", *pixels((0, 16), (0, 32))) is None


def test_flat_images_are_told():
    sentence = pixel_warning("a.npz", *pixels((-128, 127), (-1, -1), (0, 0)))
    assert sentence.startswith("2 of the 3 images in 'a.npz' have the same value in every pixel (first: image 1, 255)")
    assert_sentence(sentence)
    assert "3 of the 3 images" in pixel_warning("a", *pixels((0, 0), (0, 0), (0, 0)))


def test_usual_pixels_are_not_told():
    assert pixel_warning("a", *pixels((-128, 127), (-128, 127))) is None
    assert pixel_warning("a", *pixels((0, 1), (0, 2), (-128, 127))) is None  # two very dark ones
    assert pixel_warning("a", *pixels((0, 100), (3, 90))) is None


# --- order

NUM_CLASSES = 1000


def classifier(classes, seed, confusion=0.0, num_logits=1008, accuracy=0.7):
    """Logits of a classifier that is right with probability `accuracy`, else takes a neighbouring or any class."""
    random = np.random.default_rng(seed)
    seen = np.where(random.random(len(classes)) < accuracy, classes, random.integers(0, num_logits, len(classes)))
    seen = np.where(random.random(len(classes)) < confusion, (classes + random.integers(0, 2, len(classes))), seen)
    logits = torch.zeros(len(classes), num_logits)
    logits[torch.arange(len(classes)), torch.from_numpy(seen % num_logits)] = 9.0
    return logits


def test_agreement_has_the_mean_and_variance_of_all_orders():
    """Against the enumeration of every order, through the bound that follows from them."""
    for classes in ([0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 3, 3], [0, 0, 1, 2]):
        counts = [sum(a == b for a, b in itertools.pairwise(order)) for order in itertools.permutations(classes)]
        mean, variance = checks._mean_and_variance(np.array(classes))
        assert mean == pytest.approx(np.mean(counts), rel=1e-12)
        assert variance == pytest.approx(np.var(counts), rel=1e-12)


def test_sorted_labels_are_told():
    labels = np.repeat(np.arange(10), 40)
    sentence = order_warning("a.npz", labels, None)
    assert sentence == (
        "'a.npz' is sorted by class (98% of neighbouring images have the same label, 9.8% would by chance), while the "
        "Inception score is taken over chunks of 5,000 images in file order: shuffle images and labels before there "
        "are more, or it will come out far too low"
    )
    assert_sentence(sentence)
    sentence = order_warning("a.npz", np.repeat(np.arange(1000), 50), None)
    assert "(98% of neighbouring images have the same label, 0.1% would by chance)" in sentence
    assert sentence.endswith("in file order and comes out far too low: shuffle images and labels")
    assert_sentence(sentence)


def test_images_sorted_by_what_is_seen_in_them_are_told_with_what_it_does():
    classes = np.repeat(np.arange(100), 100)
    sentence = order_warning("a.npz", None, classifier(classes, 0, num_logits=200))
    assert re.search(r"\(4\d% of neighbouring images look to be of the same class, 0\.\d% would by chance\)", sentence)
    low, high = map(float, re.search(r"and comes out as ([\d.]+) instead of ([\d.]+): shuffle", sentence).groups())
    assert low < 0.8 * high
    assert_sentence(sentence)
    small = order_warning("a.npz", None, classifier(classes[:4000], 0))
    assert "look to be of the same class" in small
    assert "before there are more" in small


def test_weak_samplers_sorted_by_class_are_told_too():
    assert (
        order_warning("a", None, classifier(np.repeat(np.arange(300), 20), 0, accuracy=0.55, num_logits=400))
        is not None
    )


def test_order_that_leaves_every_class_in_every_chunk_is_not_told():
    classes = np.tile(np.repeat(np.arange(100), 2), 30)  # two of each in a row
    assert order_warning("a", classes, None) is not None  # nobody knows
    assert order_warning("a", classes, classifier(classes, 0, num_logits=200)) is None


def test_shuffled_and_balanced_orders_are_not_told():
    random = np.random.default_rng(0)
    for n, k in ((2, 2), (5, 2), (12, 10), (40, 3), (200, 10), (1000, 1000), (5000, 7)):
        for _ in range(300 if n <= 1000 else 50):
            shuffled = random.permutation(np.arange(n) % k)
            assert order_warning("a", shuffled, None) is None
            assert order_warning("a", random.integers(0, k, n), None) is None
            skewed = np.minimum(random.geometric(0.3, n), k)
            assert order_warning("a", skewed, None) is None
        assert order_warning("a", np.arange(n) % k, None) is None
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(np.repeat(np.arange(NUM_CLASSES), 50))
        assert order_warning("a", shuffled, None) is None
    for seed in range(3):
        cyclic = classifier(np.arange(8000) % NUM_CLASSES, seed, confusion=0.3)  # alike: class i and class i + 1
        assert order_warning("a", None, cyclic) is None
        assert order_warning("a", None, classifier(np.random.default_rng(seed).integers(0, 1000, 8000), seed)) is None


def test_order_of_one_class_or_of_one_image_is_not_told():
    assert order_warning("a", np.zeros(500, np.int64), None) is None
    assert order_warning("a", np.zeros(1, np.int64), None) is None
    assert order_warning("a", None, torch.zeros(300, 1008)) is None
    assert order_warning("a", None, None) is None


def test_sorted_sets_of_few_images_are_told_from_a_few_dozen_on():
    assert order_warning("a", np.repeat(np.arange(4), 4), None) is None
    assert order_warning("a", np.repeat(np.arange(4), 8), None) is not None


# --- duplicates, counts, dimensions


def digests(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


def test_duplicates_are_counted_and_the_first_is_named():
    found = digests(10_000)
    assert duplicate_warning("a", found) is None
    found[[7000, 8000, 9000]] = found[[3, 3, 4]]
    sentence = duplicate_warning("a.npz", found)
    assert sentence.startswith(
        "3 of the 10,000 images in 'a.npz' repeat an earlier one (first: image 7,000 is image 3)"
    )
    assert_sentence(sentence)
    twice = np.concatenate([digests(500), digests(500)])
    assert "500 of the 1,000 images in 'a' repeat an earlier one (first: image 500 is image 0)" in duplicate_warning(
        "a", twice
    )
    assert "2 of the 3 images" in duplicate_warning("a", np.zeros(3, np.uint64))


def test_counts_and_dimensions_have_their_boundaries():
    assert count_warning("a", 50_000) is None
    for n in (49_999, 50_001):
        sentence = count_warning("a.npz", n)
        assert sentence.startswith(f"'a.npz' has {n:,} images where published numbers rest on 50,000")
        assert_sentence(sentence)
    dimensions = {"fid": 2048, "sfid": 2023}
    assert dimension_warning("a", 2049, dimensions) is None
    assert "(fid: 2,048)" in dimension_warning("a", 2048, dimensions)
    sentence = dimension_warning("a.npz", 2023, dimensions)
    assert sentence.startswith(
        "'a.npz' has 2,023 images, no more than features have dimensions (fid: 2,048, sfid: 2,023)"
    )
    assert "rank-deficient" in sentence
    assert "sample more than 2,048, or measure kid" in sentence
    assert_sentence(sentence)
    assert dimension_warning("a", 5, {}) is None


def test_the_boundary_of_dimensions_is_the_rank_of_the_covariance():
    features = np.random.default_rng(0).normal(size=(9, 8))
    assert np.linalg.matrix_rank(np.cov(features, rowvar=False)) == 8
    assert dimension_warning("a", 9, {"fid": 8}) is None
    assert np.linalg.matrix_rank(np.cov(features[:8], rowvar=False)) == 7
    assert dimension_warning("a", 8, {"fid": 8}) is not None


def test_sizes_must_agree():
    require_size("a.npz", (256, 256), "reference", (256, 256))
    with pytest.raises(UserError, match=r"'a\.npz' holds images of 320x256 but 'reference' was made at 256x256: name"):
        require_size("a.npz", (256, 320), "reference", (256, 256))


# --- labels


def test_equally_many_of_each_class_are_balanced_in_any_order():
    random = np.random.default_rng(0)
    for labels in (
        np.repeat(np.arange(1000), 50),
        np.arange(50_000) % 1000,
        random.permutation(50_000) % 1000,
        random.permutation(50_016) % 1000,  # sixteen classes have one more
        np.arange(10_000) % 1000,
        np.arange(100) % 10,
        random.permutation(np.arange(100) % 10),
        np.arange(16) % 1000,  # cyclic, and few
        np.arange(1, 1001).repeat(3),  # classes from 1 on
    ):
        assert label_kind(labels) == "balanced"
    for labels in (np.arange(50_000) % 1000, np.arange(16)):
        assert label_kind(labels, num_classes=1000) == "balanced"


def test_independent_uniform_labels_are_random():
    for seed in range(20):
        random = np.random.default_rng(seed)
        for n, k in ((50_000, 1000), (10_000, 1000), (2000, 1000), (500, 10), (50_000, 10)):
            assert label_kind(random.integers(0, k, n), k) == "random"
    # Drawn from the classes of a training set whose sizes differ somewhat, as ImageNet's do: 732 to 1,300.
    sizes = np.full(1000, 1300.0)
    sizes[:105] -= 568 * np.linspace(0, 1, 105) ** 2
    labels = np.random.default_rng(0).choice(1000, 50_000, p=sizes / sizes.sum())
    assert label_kind(labels) == "random"


def test_labels_that_tell_neither_are_unknown():
    random = np.random.default_rng(0)
    for labels in (
        None,
        np.zeros(100, np.int64),
        np.array([3]),
        np.array([0, 1]),
        random.integers(0, 100, 50_000) ** 2,  # some classes only
        np.minimum(random.geometric(0.01, 50_000), 999),  # skewed
        np.repeat([207, 360, 387], 500),
        np.delete(np.arange(50_000) % 1000, np.arange(0, 4000, 1000)),  # nearly balanced: not as papers mean it
        np.array([1, 0, 1, 0, 0, 1, 0, 1, 1, 0]),  # five each, as often comes by chance
    ):
        assert label_kind(labels) == "unknown"
    assert label_kind(np.arange(1, 1001).repeat(3), num_classes=1000) == "unknown"
    assert label_kind(np.arange(-1, 999).repeat(3), num_classes=1000) == "unknown"
    assert label_kind(np.repeat(np.arange(50), 1000), num_classes=1000) == "unknown"  # folders of 1,000 images


def test_few_random_labels_are_rarely_called_balanced():
    random = np.random.default_rng(0)
    for n, k in ((8, 2), (10, 10), (20, 1000), (30, 10), (64, 10), (100, 1000)):
        assert all(label_kind(random.integers(0, k, n), k) != "balanced" for _ in range(200))


def test_the_chance_of_equal_counts_is_the_multinomial_one():
    """By enumeration of all labels: the smallest balanced sets are called so just where chance is below 1e-6."""
    for n, k in ((6, 3), (7, 3), (4, 4), (5, 2)):
        equal = sum(np.ptp(np.bincount(labels, minlength=k)) <= 1 for labels in itertools.product(range(k), repeat=n))
        assert math.exp(checks._log_chance_of_equal_counts(n, k)) == pytest.approx(equal / k**n, rel=1e-9)


def test_label_kinds_that_differ_are_told():
    sentence = label_warning({"a": "balanced", "b": "random", "c": "unknown", "d": "random"})
    assert sentence.startswith("'a' has balanced labels and 'b', 'd' random ones")
    assert "lower FID by around 0.1 (RAE's README)" in sentence
    assert_sentence(sentence)
    assert label_warning({"a": "balanced", "b": "balanced", "c": "unknown"}) is None
    assert label_warning({"a": "random", "b": "unknown"}) is None
    assert label_warning({}) is None


# --- sets


def test_sets_with_images_in_common_are_told():
    one, other = digests(1000, 1), digests(800, 2)
    assert overlap_warning({"a": one, "b": other}) is None
    other[5:8] = one[10:13]
    sentence = overlap_warning({"a": one, "c": digests(10, 3), "b": other})
    assert sentence.startswith("'a' and 'b' have 3 images in common (they hold 1,000 and 800)")
    assert_sentence(sentence)
    assert "have 1,000 images in common" in overlap_warning({"a": one, "b": one[::-1]})
    assert len(comparison_warnings({"a": one, "b": other}, {"a": "balanced", "b": "random"})) == 2
    assert comparison_warnings({"a": one}, {"a": "balanced"}) == []


def test_all_that_is_odd_about_a_set_is_collected():
    n = 50_000
    usual = {"low": np.full(n, -128, np.int8), "high": np.full(n, 127, np.int8)}
    good = {"digests": digests(n), **usual, "labels": np.arange(n) % 1000, "dimensions": {"fid": 2048}}
    assert sample_warnings("a", **good) == []
    bad = {
        "digests": np.zeros(400, np.uint64),
        "low": np.zeros(400, np.int8),
        "high": np.ones(400, np.int8),
        "labels": np.repeat(np.arange(10), 40),
        "dimensions": {"fid": 2048},
    }
    sentences = sample_warnings("set/of/samples.npz", **bad)
    assert len(sentences) == 5
    for sentence, part in zip(
        sentences, ("no other values", "sorted by class", "repeat an earlier", "rank-deficient", "rest on"), strict=True
    ):
        assert part in sentence
        assert "'set/of/samples.npz'" in sentence
        assert_sentence(sentence)
