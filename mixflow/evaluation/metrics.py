"""What a Fréchet distance does not tell: right class, lost variance, memorised training images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixflow.evaluation.arrays import Array, as_tensor
from mixflow.runtime.errors import UserError

# Numbers turned into float64 at a time (128 MiB), and the most images.
_BLOCK_NUMBERS = 1 << 24
_BLOCK_IMAGES = 2048


def class_accuracy(logits: Array, labels: Array) -> float:
    """Return the share of rows of `logits` [n, classes] whose largest entry is at `labels` [n], in [0, 1]."""
    scores, wanted = as_tensor(logits), as_tensor(labels)
    if scores.ndim != 2 or len(scores) == 0 or wanted.shape != scores.shape[:1]:
        raise UserError(
            f"logits {list(scores.shape)} need a label per row, got labels {list(wanted.shape)}: keep the file's order"
        )
    return float((scores.argmax(dim=1) == wanted.to(scores.device)).double().mean())


def variance_ratio(samples: Array, reference: Array) -> float:
    """Return tr cov(samples) / tr cov(reference) over all pixels, ddof = 1; 1 is ideal.

    The total variance is the mean squared distance of an image from its set's mean image. Truncation, low temperature
    and strong guidance lower it, often while the Fréchet distance improves: a gain with a falling ratio is cooling, not
    repair. Residual noise raises it.

    Args:
        samples, reference: images [n, ...] and [m, ...] of one shape, memory maps welcome.

    Raises `UserError` for unequal image shapes, fewer than two images, or a reference without variance.
    """
    _require_same_images(samples=samples, reference=reference)
    reference_variance = _total_variance(reference)
    if reference_variance == 0:
        raise UserError("all reference images are equal, so that there is no variance to compare with: check the set")
    return _total_variance(samples) / reference_variance


def variance_ratio_influence(samples: Array, reference: Array) -> tuple[float, Tensor]:
    """Return `variance_ratio` and how far each image pulls it, float64 [n].

    The derivative by the weight of an image at the squared distance r from the mean image is a constant and
    n / (n-1) r / tr cov(reference). `UserError` as there.
    """
    value = variance_ratio(samples, reference)
    device = samples.device if isinstance(samples, Tensor) else torch.device("cpu")
    block = _block_images(samples)
    starts = range(0, len(samples), block)
    mean = torch.stack([_flat(samples[i : i + block], device).sum(dim=0) for i in starts]).sum(dim=0) / len(samples)
    squares = torch.cat([(_flat(samples[i : i + block], device) - mean).square().sum(dim=1) for i in starts])
    return value, squares / (_total_variance(reference) * (len(samples) - 1) / len(samples))


def nearest_distances(samples: Array, reference: Array) -> Tensor:
    """Return for each of `samples` [n, ...] its Euclidean distance to the nearest of `reference` [m, ...], float64 [n].

    Images of uint8 count as values in [0, 1] and their distances are exact, zero for a copy. Divide by the square root
    of the number of pixels times channels for the root-mean-square difference. Works block by block on the device of
    `samples`. Raises `UserError` for unequal image shapes or empty sets.
    """
    _require_same_images(samples=samples, reference=reference)
    device = samples.device if isinstance(samples, Tensor) else torch.device("cpu")
    block = _block_images(samples)
    nearest = []
    for i in range(0, len(samples), block):
        u = _flat(samples[i : i + block], device)  # [b,d]
        u_norm = u.square().sum(dim=1, keepdim=True)
        smallest = torch.full((len(u),), math.inf, dtype=torch.float64, device=device)
        for j in range(0, len(reference), block):
            v = _flat(reference[j : j + block], device)  # [c,d]
            # In float64 the squares and products of 8-bit integers add up without rounding.
            squared = torch.addmm(u_norm + v.square().sum(dim=1), u, v.T, alpha=-2)  # [b,c]
            smallest = torch.minimum(smallest, squared.amin(dim=1))
        nearest.append(smallest.clamp(min=0).sqrt())
    scale = 255.0 if as_tensor(samples[:1]).dtype == torch.uint8 else 1.0
    return torch.cat(nearest) / scale


def memorisation(samples: Array, train: Array, held_out: Array) -> dict[str, float]:
    """Compare how near samples lie to training images and to real images that were never trained on.

    The nearest of more images is nearer, whatever they are. So `train` and `held_out` are first cut to the same number
    of images (every s-th, so that sorted sets stay balanced). Three questions, each with its yardstick:

    * Do samples prefer training images? `nearest_train` against `nearest_held_out`: equal when nothing is memorised.
    * How often? `share_nearer_train`: 0.5 when nothing is memorised, ties counting half. Blurred samples come nearer to
      both sets alike and leave these two answers alone.
    * Are there copies of the part cut off? `nearest_train_all`, against the whole training set, beside the score of
      unseen real images there, `held_out_to_train_all`. `share_copies` is the share of samples nearer to the training
      set than 99 % of the unseen real images are: about 0.01 when samples are as sharp as real images and not
      memorised. Blur lowers the former and raises the latter, so read them together with the first two.

    Distances are means of `nearest_distances`, in its units. `held_out_to_train` is the distance of unseen real images
    at the same number of images, `num_compared`: near samples are copies only if they are well below it.

    Args:
        samples, train, held_out: images [n, ...] of one shape; `train` is exactly what the model was trained on.

    Raises `UserError` for unequal image shapes or empty sets.
    """
    _require_same_images(samples=samples, train=train, held_out=held_out)
    size = min(len(train), len(held_out))
    train_part, held_out_part = _every_nth(train, size), _every_nth(held_out, size)
    to_train = nearest_distances(samples, train_part)
    to_held_out = nearest_distances(samples, held_out_part)
    to_train_all = nearest_distances(samples, train)
    real_to_train_all = nearest_distances(held_out, train)
    nearer = (to_train < to_held_out).double() + 0.5 * (to_train == to_held_out).double()
    copy_distance = real_to_train_all.quantile(0.01)
    return {
        "nearest_train": float(to_train.mean()),
        "nearest_held_out": float(to_held_out.mean()),
        "share_nearer_train": float(nearer.mean()),
        "held_out_to_train": float(nearest_distances(held_out, train_part).mean()),
        "nearest_train_all": float(to_train_all.mean()),
        "held_out_to_train_all": float(real_to_train_all.mean()),
        "share_copies": float((to_train_all < copy_distance.to(to_train_all)).double().mean()),
        "num_compared": size,
    }


def _every_nth(images: Array, size: int) -> Array:
    """Return `size` of `images` [n, ...], evenly spaced."""
    indices = torch.arange(size) * len(images) // size
    return images[indices.to(images.device)] if isinstance(images, Tensor) else images[indices.numpy()]


def _total_variance(images: Array) -> float:
    """Return the trace of the covariance (ddof = 1) of `images` [n, ...] in squared units of their values."""
    if len(images) < 2:
        raise UserError(f"a variance needs at least 2 images, got {len(images)}: generate or load more")
    device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    # About the first image, so that the difference of the two sums does not cancel.
    origin = _flat(images[:1], device)
    total = torch.zeros_like(origin[0])
    squares = torch.zeros_like(origin[0])
    block = _block_images(images)
    for i in range(0, len(images), block):
        difference = _flat(images[i : i + block], device) - origin  # [b,d]
        total += difference.sum(dim=0)
        squares += difference.square().sum(dim=0)
    return float((squares - total.square() / len(images)).sum() / (len(images) - 1))


def _block_images(images: Array) -> int:
    """Return how many of `images` [n, ...] to work on at a time."""
    return min(max(_BLOCK_NUMBERS // math.prod(images.shape[1:]), 1), _BLOCK_IMAGES)


def _flat(images: Array, device: torch.device) -> Tensor:
    """Return `images` [b, ...] as float64 [b, d]."""
    return as_tensor(images).to(device).double().flatten(start_dim=1)


def _require_same_images(**sets: Array) -> None:
    shapes = {name: list(images.shape) for name, images in sets.items()}
    image_shapes = {tuple(shape[1:]) for shape in shapes.values()}
    if len(image_shapes) > 1 or any(len(shape) < 2 or shape[0] == 0 for shape in shapes.values()):
        raise UserError(
            f"image sets must not be empty and must hold images of one shape, got "
            f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}: use one resolution and channel count"
        )
    in_bytes = {name: as_tensor(images[:1]).dtype == torch.uint8 for name, images in sets.items()}
    if len(set(in_bytes.values())) > 1:
        raise UserError(
            f"{' and '.join(name for name in sets if in_bytes[name])} hold uint8 images and "
            f"{' and '.join(name for name in sets if not in_bytes[name])} do not: give all in the same units"
        )
