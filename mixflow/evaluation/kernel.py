"""Kernel Inception Distance (Bińkowski et al., 2018) by the protocol of torch-fidelity."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixflow.evaluation.arrays import Array, finite_matrix
from mixflow.runtime.errors import UserError


class KernelDistance(NamedTuple):
    """What the subsets give."""

    mean: float  # the KID: an estimate of the squared maximum mean discrepancy, slightly negative for equal sets
    subset_std: float  # standard deviation over subsets, which torch-fidelity prints; no standard error of the mean
    influence: Tensor  # [m] float64: how far each sample pulls the mean, 0 on average


def kernel_distance(
    reference: Array,  # [n, d] features of real images
    samples: Array,  # [m, d] features of generated images, on the same device
    num_subsets: int = 100,
    subset_size: int = 1000,  # images drawn from either set for a subset, without replacement
    seed: int = 2020,
) -> KernelDistance:
    """Return the mean over random subsets of the unbiased squared MMD with kernel (x·y / d + 1)³, in float64.

    The subsets are those that torch-fidelity draws with samples as `input1` and reference as `input2`; it multiplies
    in float32, which moved a KID of 0.005 by 1e-8.

    An image's influence is its part in the row sums of those subsets that hold it, less their means. So it knows the
    noise of drawing subsets of the samples (part of their sampling noise) and regards the reference as given.

    Raises `UserError` for shapes that do not belong together, NaN, infinity, or sets smaller than a subset.
    """
    real, fake = finite_matrix(reference, "reference"), finite_matrix(samples, "samples")
    if real.shape[1] != fake.shape[1]:
        raise UserError(
            f"reference has {real.shape[1]} features and samples have {fake.shape[1]}: use one extractor for both"
        )
    if num_subsets < 1 or subset_size < 2:
        raise UserError(
            f"KID needs at least 1 subset of at least 2 images, got {num_subsets} of {subset_size}: the protocol has "
            "100 of 1000"
        )
    for name, points in (("reference", real), ("samples", fake)):
        if len(points) < subset_size:
            raise UserError(
                f"{name} holds {len(points)} images where a subset of KID takes {subset_size}: give more, or lower "
                "subset_size and name it beside the number"
            )

    draws = np.random.RandomState(seed)  # an old generator, but torch-fidelity's
    distances = []
    influence = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    for _ in range(num_subsets):
        chosen = torch.from_numpy(draws.choice(len(fake), subset_size, replace=False)).to(fake.device)
        y = fake[chosen].double()  # [s,d]
        x = real[torch.from_numpy(draws.choice(len(real), subset_size, replace=False)).to(real.device)].double()
        pairs = subset_size * (subset_size - 1)
        within_fake = _kernel(y, y).fill_diagonal_(0).sum(dim=1) / pairs  # [s]
        within_real = _kernel(x, x).fill_diagonal_(0).sum() / pairs
        across = _kernel(y, x).sum(dim=1) / subset_size**2  # [s]
        distances.append(within_fake.sum() + within_real - 2 * across.sum())
        pull = 2 * (within_fake - across)
        influence[chosen] += (pull - pull.mean()) * (len(fake) / num_subsets)
    values = torch.stack(distances)
    return KernelDistance(float(values.mean()), float(values.std(correction=0)), influence)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return (x·y / d + 1)³ [n, m] of the rows of x [n, d] and y [m, d]."""
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)
