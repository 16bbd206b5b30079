"""Improved precision and recall (Kynkäänniemi et al., 2019), as the ADM evaluator computes them or exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow.evaluation.arrays import Array, finite_matrix
from mixflow.runtime.errors import UserError, did_you_mean


def precision_recall(
    reference: Array,  # [n, d] features of real images
    samples: Array,  # [m, d] features of generated images, on the same device
    k: int = 3,  # a point's ball reaches to its k-th nearest neighbour within its own set
    mode: str = "adm",
    block_size: int = 10_000,  # rows and columns of distances held at a time: about 12 * block_size² bytes
) -> tuple[float, float]:
    """Return (precision, recall), both in [0, 1].

    Precision is the share of samples inside the ball of at least one reference point, recall the share of reference
    points inside the ball of at least one sample; being on the surface counts as inside.

    `mode="exact"` works in float64. `mode="adm"` follows the ADM evaluator, which works in half precision block by
    block (in float32 where a block of `block_size`² distances overflows) and so reads both shares higher by
    0.001 to 0.006: use it beside published numbers. The one thing it cannot follow is the order in which TensorFlow
    adds up half-precision norms, worth one or two points of a few hundred.

    Raises `UserError` for shapes that do not belong together, NaN, infinity, sets of no more than k points, or an
    unknown mode.
    """
    if mode not in _DISTANCES:
        raise UserError(f"precision_recall knows no mode '{mode}'{did_you_mean(mode, _DISTANCES)}")
    if k < 1 or block_size < 1:
        raise UserError(f"k and block_size must be at least 1, got {k} and {block_size}: the protocol's k is 3")
    real, fake = finite_matrix(reference, "reference"), finite_matrix(samples, "samples")
    if real.shape[1] != fake.shape[1]:
        raise UserError(
            f"reference has {real.shape[1]} features and samples have {fake.shape[1]}: use one extractor for both"
        )
    for name, points in (("reference", real), ("samples", fake)):
        if len(points) <= k:
            raise UserError(f"{name} holds {len(points)} images where k = {k} needs at least {k + 1}: give more")

    real_radii = _squared_radii(real, k, mode, block_size)  # [n]
    fake_radii = _squared_radii(fake, k, mode, block_size)  # [m]
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    for i in range(0, len(real), block_size):
        for j in range(0, len(fake), block_size):
            rows, columns = slice(i, i + block_size), slice(j, j + block_size)
            distances = _DISTANCES[mode](real[rows], fake[columns])  # [b,c]
            fake_inside[columns] |= (distances <= real_radii[rows, None]).any(dim=0)
            real_inside[rows] |= (distances <= fake_radii[None, columns]).any(dim=1)
    return float(fake_inside.double().mean()), float(real_inside.double().mean())


def _squared_radii(points: Tensor, k: int, mode: str, block_size: int) -> Tensor:
    """Return the squared distance [n] of each point to its k-th nearest other one; of equal points each counts."""
    radii = []
    for row_block in points.split(block_size):
        nearest = torch.empty(len(row_block), 0, device=points.device)
        for column_block in points.split(block_size):
            distances = _DISTANCES[mode](row_block, column_block)  # [b,c]
            candidates = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False).values
            nearest = torch.cat([nearest.to(candidates), candidates], dim=1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), dim=1, largest=False).values
        # Position 0 of the sorted row is the point itself.
        radii.append(nearest.amax(dim=1))
    return torch.cat(radii)


def _exact_distances(u: Tensor, v: Tensor) -> Tensor:
    """Return squared Euclidean distances [b, c] of the rows of `u` [b, d] and `v` [c, d] in float64."""
    u, v = u.double(), v.double()
    return torch.addmm(v.square().sum(dim=1), u, v.T, alpha=-2).add_(u.square().sum(dim=1)[:, None]).clamp_(min=0)


def _adm_distances(u: Tensor, v: Tensor) -> Tensor:
    """Return squared Euclidean distances [b, c], float32, computed in half precision unless some entry overflows.

    Products of halves are exact in float32 (and in TF32), so a float32 product of rounded inputs, rounded at the end,
    is the half-precision product with float32 accumulation, on every device and under every TF32 setting.
    """
    u_half, v_half = u.half(), v.half()
    u_norm = u_half.square().float().sum(dim=1).half()[:, None]  # [b,1]
    v_norm = v_half.square().float().sum(dim=1).half()[None, :]  # [1,c]
    distances = (u_half.float() @ v_half.float().T).half()
    distances = distances.mul_(-2).add_(u_norm).add_(v_norm).clamp_(min=0)
    if torch.isfinite(distances).all():
        return distances.float()
    # Norms that overflow half precision are large enough for TF32 to matter: float64 does not depend on the setting.
    return _exact_distances(u, v).float()


_DISTANCES = {"adm": _adm_distances, "exact": _exact_distances}
