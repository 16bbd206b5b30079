"""Warnings that save days: what is wrong with a set of samples, or with how sets are compared, though metrics come out.

Every function returns one sentence that names the thing, the value, the consequence and the fix, or None.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mixflow.evaluation.inception_score import inception_score
from mixflow.runtime.errors import UserError

LabelKind = Literal["balanced", "random", "unknown"]

USUAL_COUNT = 50_000  # images behind published numbers
_CHUNK = 5000  # images that the Inception score is taken over at a time
_DARK = 32  # if no value is as large as this, the images were meant to be brighter
_CHANCE = 1e-6  # how often a warning may come by chance, at most


def sample_warnings(
    name: str | os.PathLike[str],  # what the set is called in the sentences
    *,
    digests: np.ndarray,  # uint64 [N], like the next two as in `images.Batch`, of all images in file order
    low: np.ndarray,  # int8 [N]
    high: np.ndarray,  # int8 [N]
    labels: np.ndarray | None = None,  # int64 [N], class that each image was drawn with
    logits: Tensor | None = None,  # [N,classes], what a classifier sees in the images
    dimensions: Mapping[str, int] | None = None,  # {Fréchet distance measured, such as fid: width of its features}
) -> list[str]:
    """Return everything that is odd about one set of samples, worst first."""
    sentences = (
        pixel_warning(name, low, high),
        order_warning(name, labels, logits),
        duplicate_warning(name, digests),
        dimension_warning(name, len(digests), dimensions or {}),
        count_warning(name, len(digests)),
    )
    return [sentence for sentence in sentences if sentence]


def comparison_warnings(digests: Mapping[str, np.ndarray], kinds: Mapping[str, LabelKind]) -> list[str]:
    """Return what is odd about comparing sets: {name: uint64 [N] as in `images.Batch`}, {name: kind of labels}."""
    sentences = (overlap_warning(digests), label_warning(kinds))
    return [sentence for sentence in sentences if sentence]


def require_size(
    samples: str | os.PathLike[str], size: tuple[int, int], reference: str | os.PathLike[str], wanted: tuple[int, int]
) -> None:
    """Raise `UserError` unless samples and reference have images of one size (height, width)."""
    if size != wanted:
        raise UserError(
            f"'{samples}' holds images of {size[1]}x{size[0]} but '{reference}' was made at {wanted[1]}x{wanted[0]}: "
            "name a reference of that resolution, or make one"
        )


def pixel_warning(name: str | os.PathLike[str], low: np.ndarray, high: np.ndarray) -> str | None:
    """Warn of values that were never scaled to bytes, and of flat images; `low` and `high` as in `images.Batch`."""
    is_flat = low == high
    num_flat, lowest, highest = int(is_flat.sum()), int(low.min()), int(high.max())
    if num_flat < len(low) and lowest >= -2 and highest <= 2:
        values = ", ".join(str(value % 256) for value in range(lowest, highest + 1))
        return (
            f"'{name}' has no other values than {values}, as if images of 0 to 1 or -1 to 1 had been cast to uint8 "
            "unscaled, so that every metric sees black images: write clamp(255 x + 0.5, 0, 255) or "
            "clamp(127.5 x + 128, 0, 255)"
        )
    if num_flat < len(low) and lowest >= 0 and highest < _DARK:
        return (
            f"'{name}' has values of {lowest} to {highest} alone, so that every metric sees dark images: scale them to "
            "0 to 255 before they are cast to uint8"
        )
    if num_flat:
        first = int(np.argmax(is_flat))
        return (
            f"{num_flat:,} of the {len(low):,} images in '{name}' have the same value in every pixel (first: image "
            f"{first:,}, {int(low[first]) % 256}), which NaN often becomes, and every metric counts them: sample them "
            "again"
        )
    return None


def order_warning(name: str | os.PathLike[str], labels: np.ndarray | None, logits: Tensor | None) -> str | None:
    """Warn of images sorted by class, or nearly so: by `labels` [N] if given, else as `logits` [N,classes] see them.

    The Inception score compares each image with the others of its chunk; where these are of few classes it comes out
    low. Given logits of several chunks it is computed in file order and spread over the file, and no warning comes
    where that makes no difference: two images of each class in a row are alike, but every chunk has all classes.
    """
    if labels is not None:
        classes, alike = labels, "have the same label"
    elif logits is not None:
        classes, alike = logits.argmax(dim=1).cpu().numpy(), "look to be of the same class"
    else:
        return None
    agreement = _agreement(classes)
    if agreement is None:
        return None
    found, chance = agreement
    what = (
        f"'{name}' is sorted by class ({found:.0%} of neighbouring images {alike}, {chance:.1%} would by chance), "
        f"while the Inception score is taken over chunks of {_CHUNK:,} images in file order"
    )
    num_chunks = math.ceil(len(classes) / _CHUNK)
    if num_chunks == 1:
        return f"{what}: shuffle images and labels before there are more, or it will come out far too low"
    if logits is None:
        return f"{what} and comes out far too low: shuffle images and labels"
    spread = torch.cat([torch.arange(first, len(logits), num_chunks) for first in range(num_chunks)])
    score, spread_score = (inception_score(rows, _CHUNK) for rows in (logits, logits[spread.to(logits.device)]))
    if score > 0.98 * spread_score:
        return None
    return f"{what} and comes out as {score:.4g} instead of {spread_score:.4g}: shuffle images and labels"


def duplicate_warning(name: str | os.PathLike[str], digests: np.ndarray) -> str | None:
    """Warn of images that are equal to the last bit, by `digests` uint64 [N]."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(first[inverse] != np.arange(len(digests)))  # of an earlier image
    if not len(repeats):
        return None
    repeated = int(first[inverse[repeats[0]]])
    return (
        f"{len(repeats):,} of the {len(digests):,} images in '{name}' repeat an earlier one (first: image "
        f"{int(repeats[0]):,} is image {repeated:,}), as when a seed is used twice or a sampler fills up its last "
        "batch, and every metric counts them as new ones: draw each image with a seed of its own"
    )


def dimension_warning(name: str | os.PathLike[str], num_images: int, dimensions: Mapping[str, int]) -> str | None:
    """Warn of too few images for a covariance of full rank, by `dimensions` {metric: width of its features}."""
    singular = {metric: width for metric, width in dimensions.items() if num_images <= width}
    if not singular:
        return None
    widths = ", ".join(f"{metric}: {width:,}" for metric, width in singular.items())
    return (
        f"'{name}' has {num_images:,} images, no more than features have dimensions ({widths}), so that the covariance "
        "is rank-deficient and the Fréchet distance far too large: sample more than "
        f"{max(singular.values()):,}, or measure kid"
    )


def count_warning(name: str | os.PathLike[str], num_images: int) -> str | None:
    """Warn of another number of images than published numbers have."""
    if num_images == USUAL_COUNT:
        return None
    return (
        f"'{name}' has {num_images:,} images where published numbers rest on {USUAL_COUNT:,}, and FID is biased by an "
        "amount that goes as 1 / images: compare it with sets of the same size alone"
    )


def rule_kind(rule: str) -> LabelKind:
    """Return the kind of labels that a sampler's rule draws: balanced ones have an order of some sort."""
    return "balanced" if rule.startswith("balanced") else "random"


def label_kind(labels: np.ndarray | None, num_classes: int | None = None) -> LabelKind:
    """Return how `labels` [N] were drawn: equally many of each class, independently of each other, or neither.

    'balanced': the counts of all classes differ by one at most, and that, or a cyclic order, is no chance. What lowers
    FID is that counts do not scatter, whatever N and the order are: 50 of each of 1,000 classes in any order is the
    case that papers speak of. 'random': the counts scatter as those of independent draws do. Their chi-square is no
    further than 5 standard deviations from that of uniform draws, or up to twice as large, as classes of unequal size
    (ImageNet's) make it. 'unknown': anything else, such as some of the classes only, or too few images to tell.

    Without `num_classes` the classes are those between the smallest and the largest label.
    """
    if labels is None:
        return "unknown"
    n, start = len(labels), int(labels.min()) if num_classes is None else 0
    k = int(labels.max()) - start + 1 if num_classes is None else num_classes
    if labels.min() < start or labels.max() >= start + k or k < 2 or n < 2:
        return "unknown"
    counts = np.bincount(labels - start, minlength=k)
    if counts.max() - counts.min() <= 1:
        is_cyclic = np.array_equal(labels - start, (labels[0] - start + np.arange(n)) % k)
        log_chance = -(n - 1) * math.log(k) if is_cyclic else _log_chance_of_equal_counts(n, k)
        return "balanced" if log_chance < math.log(_CHANCE) else "unknown"
    chi_square = float((counts.astype(np.float64) ** 2).sum()) * k / n - n
    deviation = math.sqrt(2 * (k - 1) * (1 - 1 / n))
    return "random" if k - 1 - 5 * deviation <= chi_square <= 2 * (k - 1) + 5 * deviation else "unknown"


def label_warning(kinds: Mapping[str, LabelKind]) -> str | None:
    """Warn of sets {name: kind of labels} that are compared though their labels were drawn in different ways."""
    balanced = [name for name, kind in kinds.items() if kind == "balanced"]
    random = [name for name, kind in kinds.items() if kind == "random"]
    if not balanced or not random:
        return None
    return (
        f"{_names(balanced)} {_has(balanced)} balanced labels and {_names(random)} random ones: equally many images of "
        "each class lower FID by around 0.1 (RAE's README), so compare sets whose labels were drawn in one way"
    )


def overlap_warning(digests: Mapping[str, np.ndarray]) -> str | None:
    """Warn of sets {name: uint64 [N]} that are compared, or averaged over, though they share images."""
    for (name, one), (other_name, other) in itertools.combinations(digests.items(), 2):
        if shared := len(np.intersect1d(one, other)):
            return (
                f"'{name}' and '{other_name}' have {shared:,} images in common (they hold {len(one):,} and "
                f"{len(other):,}), so that they differ by less than independent sets would: draw each set with "
                "seeds of its own"
            )
    return None


def _log_chance_of_equal_counts(n: int, k: int) -> float:
    """Return the logarithm of the probability that counts of n uniform draws from k classes differ by one at most."""
    each, more = divmod(n, k)  # images of each class, and classes that have one more
    log_orders = math.lgamma(n + 1) - k * math.lgamma(each + 1) - more * math.log(each + 1)
    return log_orders + math.log(math.comb(k, more)) - n * math.log(k)


def _agreement(classes: np.ndarray) -> tuple[float, float] | None:
    """Return which share of neighbours is of one class, and which would be by chance; None where it is no more.

    The number of such neighbours must exceed its mean over all orders of the same classes by what Bernstein's
    inequality allows once in a million sets, and by a fifth of what it could at most: in a cyclic order neighbouring
    classes may look alike (ImageNet's dogs) and be taken for each other now and then.
    """
    n = len(classes)
    if n < 2:
        return None
    mean, variance = _mean_and_variance(classes)
    found = int((classes[1:] == classes[:-1]).sum())
    excess = found - mean
    is_chance = excess**2 <= -2 * math.log(_CHANCE) * (variance + excess / 3)
    if excess <= 0 or is_chance or excess < 0.2 * (n - 1 - mean):
        return None
    return found / (n - 1), mean / (n - 1)


def _mean_and_variance(classes: np.ndarray) -> tuple[float, float]:
    """Return both for the number of neighbours of one class, over all orders of `classes` [n], n > 1."""
    n = len(classes)
    counts = [int(count) for count in np.unique(classes, return_counts=True)[1]]  # Python's integers are exact
    # Ordered choices of two images, three, and twice two, that are of one class each.
    pairs = sum(c * (c - 1) for c in counts)
    triples = sum(c * (c - 1) * (c - 2) for c in counts)
    pairs_of_pairs = pairs**2 - sum(c * (c - 1) * (4 * c - 6) for c in counts)
    second_moment = (n - 1) * pairs + 2 * triples + pairs_of_pairs  # times n (n - 1)
    return pairs / n, (n * second_moment - (n - 1) * pairs**2) / (n**2 * (n - 1))


def _names(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"
