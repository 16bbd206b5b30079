"""Precision and recall (Kynkäänniemi et al., 2019), as the ADM evaluator has them or exactly; density and coverage.

All four ask which points lie in which balls, where a point's ball reaches to its k-th nearest neighbour within its own
set. No more than a tile of distances exists at a time, whatever the number of points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixflow.evaluation.arrays import Array, finite_matrix
from mixflow.runtime.errors import UserError, did_you_mean

# Rows and columns of distances held at a time: 32 MiB in float64, as are the features of each side at d = 2048.
_TILE = 2048

# Two exact squared distances that differ by less than this times the sum of both squared norms are equal: far above the
# rounding of a float64 product of some thousand terms, far below what float32 features can differ by in practice.
_TIE = 1e-12

_HALF_MAX = 65504.0


def precision_recall(
    reference: Array,  # [n, d] features of real images
    samples: Array,  # [m, d] features of generated images, on the same device
    k: int = 3,  # a point's ball reaches to its k-th nearest neighbour within its own set
    mode: str = "adm",
    block_size: int = 10_000,  # of "adm": rows and columns whose distances overflow half precision together
    reference_radii: Tensor | None = None,  # `squared_radii(reference, k, mode, block_size)` from an earlier call
) -> tuple[float, float]:
    """Return (precision, recall), both in [0, 1].

    Precision is the share of samples inside the ball of at least one reference point, recall the share of reference
    points inside the ball of at least one sample; being on the surface counts as inside.

    `mode="exact"` works in float64; distances equal to 1e-12 of the squared norms are equal, so that copies of a point
    do not depend on rounding. `mode="adm"` follows the ADM evaluator, which works in half precision block by block (in
    float32 where a block of `block_size`² distances overflows) and so reads both shares higher by 0.001 to 0.006: use
    it beside published numbers. Half-precision norms are added up in the order of TensorFlow 2.21 on a CPU with AVX2,
    which decides on one point in 200; another processor or a GPU may take another. At 10,000 x 50,000 x 2048 either
    mode stays within 0.5 GiB beside the features (benchmarks/precision_recall.py).

    Raises `UserError` for shapes that do not belong together, NaN, infinity, sets of no more than k points, or an
    unknown mode.
    """
    counts = precision_recall_counts(reference, samples, k, mode, block_size, reference_radii)
    return float((counts.balls > 0).double().mean()), float((counts.samples > 0).double().mean())


def density_coverage(
    reference: Array,  # [n, d] features of real images
    samples: Array,  # [m, d] features of generated images, on the same device
    k: int = 5,
    reference_radii: Tensor | None = None,  # `squared_radii(reference, k, "exact")` from an earlier call
) -> tuple[float, float]:
    """Return (density >= 0, coverage in [0, 1]) of Naeem et al., 2020, in float64.

    Density is the mean number of reference balls around a sample, divided by k (above 1 where samples crowd in the
    modes); coverage is the share of reference points with a sample in their ball. The surface counts as outside, as in
    the authors' package prdc, and distances equal to 1e-12 of the squared norms are equal: a set compared with itself
    has density and coverage 1.

    Raises `UserError` as `precision_recall` does.
    """
    counts = density_coverage_counts(reference, samples, k, reference_radii)
    return float(counts.balls.mean() / k), float((counts.samples > 0).double().mean())


def squared_radii(points: Array, k: int, mode: str, block_size: int = 10_000) -> Tensor:
    """Return the squared distance [n] of each point [n, d] to its k-th nearest other one; of equal points each counts.

    float64 for `mode="exact"`, where `block_size` changes nothing, float32 for `mode="adm"`. Every pair is multiplied
    once. Raises `UserError` as `precision_recall` does.
    """
    [rows] = _checked({"points": finite_matrix(points, "points")}, k, mode, block_size)
    return _squared_radii(rows, k, mode, block_size)


class Counts(NamedTuple):
    """Who lies in whose ball; all float64."""

    balls: Tensor  # [m] reference balls around each sample
    samples: Tensor  # [n] samples that reach each reference point: those with it in their ball, or those in its ball
    keys: Tensor  # [n] sum of the random keys of those samples: equal for equal sets of at most `MAX_KEYED` samples


MAX_KEYED = 8


def precision_recall_counts(
    reference: Array,
    samples: Array,
    k: int = 3,
    mode: str = "adm",
    block_size: int = 10_000,
    reference_radii: Tensor | None = None,
) -> Counts:
    """Count reference balls around samples and sample balls around reference points; the surface is inside."""
    real, fake = _points(reference, samples, k, mode, block_size)
    real_radii = _cached(reference_radii, real, k, mode, block_size)  # [n]
    fake_radii = _squared_radii(fake, k, mode, block_size)  # [m]
    distances = _Adm(real, fake, block_size) if mode == "adm" else _Exact(real, fake, norm_scale=1 - _TIE)
    counts = _Counter(real, fake)
    for rows, columns in _tile_pairs(len(real), len(fake), block_size):
        tile = distances.tile(rows, columns)  # [b,c]
        counts.add(rows, columns, tile <= real_radii[rows, None], tile <= fake_radii[None, columns])
    return counts.result()


def density_coverage_counts(
    reference: Array, samples: Array, k: int = 5, reference_radii: Tensor | None = None
) -> Counts:
    """Count reference balls around samples and samples in reference balls; the surface is outside."""
    real, fake = _points(reference, samples, k, "exact", _TILE)
    real_radii = _cached(reference_radii, real, k, "exact", _TILE)  # [n]
    distances = _Exact(real, fake, norm_scale=1 + _TIE)
    counts = _Counter(real, fake)
    for rows, columns in _tile_pairs(len(real), len(fake), _TILE):
        inside = distances.tile(rows, columns) < real_radii[rows, None]  # [b,c]
        counts.add(rows, columns, inside, inside)
    return counts.result()


class _Counter:
    """Sums of `Counts`, tile by tile."""

    def __init__(self, real: Tensor, fake: Tensor) -> None:
        self._balls = torch.zeros(len(fake), dtype=torch.float64, device=real.device)
        self._reached = torch.zeros(len(real), 2, dtype=torch.float64, device=real.device)
        # Whole numbers below 2^50, of which MAX_KEYED add up without rounding, in any order.
        keys = torch.randint(1, 2**50, (len(fake),), generator=torch.Generator().manual_seed(0))
        self._weights = torch.stack([torch.ones(len(fake)).double(), keys.double()], dim=1).to(real.device)  # [m,2]

    def add(self, rows: slice, columns: slice, in_real: Tensor, in_fake: Tensor) -> None:
        """Take who is inside reference balls, and who reaches reference points, both bool [b, c]."""
        self._balls[columns] += in_real.sum(dim=0)
        self._reached[rows] += in_fake.double() @ self._weights[columns]

    def result(self) -> Counts:
        return Counts(self._balls, self._reached[:, 0].contiguous(), self._reached[:, 1].contiguous())


def _points(reference: Array, samples: Array, k: int, mode: str, block_size: int) -> tuple[Tensor, Tensor]:
    sets = {"reference": finite_matrix(reference, "reference"), "samples": finite_matrix(samples, "samples")}
    real, fake = _checked(sets, k, mode, block_size)
    if real.shape[1] != fake.shape[1]:
        raise UserError(
            f"reference has {real.shape[1]} features and samples have {fake.shape[1]}: use one extractor for both"
        )
    return real, fake


def _checked(sets: dict[str, Tensor], k: int, mode: str, block_size: int) -> list[Tensor]:
    if mode not in _MODES:
        raise UserError(f"precision_recall knows no mode '{mode}'{did_you_mean(mode, _MODES)}")
    if k < 1 or block_size < 1:
        raise UserError(f"k and block_size must be at least 1, got {k} and {block_size}: the protocol's k is 3")
    for name, points in sets.items():
        if len(points) <= k:
            raise UserError(f"{name} holds {len(points)} images where k = {k} needs at least {k + 1}: give more")
    return list(sets.values())


def _cached(radii: Tensor | None, points: Tensor, k: int, mode: str, block_size: int) -> Tensor:
    if radii is None:
        return _squared_radii(points, k, mode, block_size)
    assert radii.shape == points.shape[:1], "the cached radii belong to another set"
    return radii.to(points.device)


def _squared_radii(points: Tensor, k: int, mode: str, block_size: int) -> Tensor:
    distances = _Adm(points, points, block_size) if mode == "adm" else _Exact(points, points)
    nearest = torch.full((len(points), k + 1), torch.inf, dtype=distances.dtype, device=points.device)

    def merge(rows: slice, tile: Tensor) -> None:  # [b,c]
        candidates = tile.topk(min(k + 1, tile.shape[1]), dim=1, largest=False).values
        nearest[rows] = torch.cat([nearest[rows], candidates], dim=1).topk(k + 1, dim=1, largest=False).values

    for rows, columns in _tile_pairs(len(points), len(points), block_size):
        if rows.start == columns.start:
            tile = distances.tile(rows, columns)
            # Without rounding a point is at no distance from itself; the ADM evaluator takes what it finds there.
            merge(rows, tile if mode == "adm" else tile.fill_diagonal_(0))
        elif rows.start < columns.start:
            tile, mirrored = distances.both(rows, columns)
            merge(rows, tile)
            merge(columns, mirrored)
    return nearest.amax(dim=1)  # of k + 1, as the nearest is the point itself


def _tile_pairs(num_rows: int, num_columns: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Yield spans of rows and columns of at most `_TILE`, none of which crosses a multiple of `block_size`."""
    for rows in _tiles(num_rows, block_size):
        for columns in _tiles(num_columns, block_size):
            yield rows, columns


def _tiles(n: int, block_size: int) -> Iterator[slice]:
    for block in range(0, n, block_size):
        stop = min(block + block_size, n)
        for start in range(block, stop, _TILE):
            yield slice(start, min(start + _TILE, stop))


class _Exact:
    """Squared Euclidean distances of the rows of `u` [n, d] and `v` [m, d] in float64.

    `norm_scale` just below (above) 1 makes them bounds from below (above) on the distances without rounding.
    """

    dtype = torch.float64

    def __init__(self, u: Tensor, v: Tensor, norm_scale: float = 1.0) -> None:
        self._u, self._v = u, v
        self._u_norm = _squared_norms(u).mul_(norm_scale)  # [n]
        self._v_norm = self._u_norm if v is u else _squared_norms(v).mul_(norm_scale)  # [m]
        self._rows, self._u_rows = slice(0, 0), u[:0].double()

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Return the distances [b, c] of some rows of u and v."""
        if rows != self._rows:  # pairs of tiles come row by row
            self._rows, self._u_rows = rows, self._u[rows].double()
        product = self._u_rows @ self._v[columns].double().T
        return product.mul_(-2).add_(self._u_norm[rows, None]).add_(self._v_norm[None, columns]).clamp_(min=0)

    def both(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the distances [b, c] and, where u is v, [c, b], those from the other side."""
        tile = self.tile(rows, columns)
        return tile, tile.T


class _Adm:
    """Squared distances in half precision, as float32, or from float64 in blocks where some entry overflows.

    Products of halves are exact in float32 (and in TF32), so a float32 product of rounded inputs, rounded at the end,
    is the half-precision product with float32 accumulation, on every device and under every TF32 setting.
    """

    dtype = torch.float32

    def __init__(self, u: Tensor, v: Tensor, block_size: int) -> None:
        self._u, self._v, self._block_size = u, v, block_size
        self._u_norm = _half_norms(u)  # [n]
        self._v_norm = self._u_norm if v is u else _half_norms(v)  # [m]
        # Norms that overflow half precision are large enough for TF32 to matter; float64 does not depend on that.
        self._exact = _Exact(u, v)
        self._overflows = self._overflowing_blocks()

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Return the distances [b, c] of some rows of u and v, none of which crosses a block."""
        if self._overflow(rows, columns):
            return self._exact.tile(rows, columns).float()
        return self._in_half(self._product(rows, columns), rows, columns).float()

    def both(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the distances [b, c] and, where u is v, [c, b]: half-precision norms are added in another order."""
        if self._overflow(rows, columns) or self._overflow(columns, rows):
            return self.tile(rows, columns), self.tile(columns, rows)
        product = self._product(rows, columns)
        mirrored = self._in_half(product.T, columns, rows)
        return self._in_half(product, rows, columns).float(), mirrored.float()

    def _product(self, rows: slice, columns: slice) -> Tensor:
        """Return -2 u vᵀ [b, c] in half precision."""
        u, v = self._u[rows].half().float(), self._v[columns].half().float()
        return (u @ v.T).half().mul_(-2)

    def _in_half(self, product: Tensor, rows: slice, columns: slice) -> Tensor:
        return (product + self._u_norm[rows, None]).add_(self._v_norm[None, columns]).clamp_(min=0)

    def _overflow(self, rows: slice, columns: slice) -> bool:
        return self._overflows[rows.start // self._block_size][columns.start // self._block_size]

    def _overflowing_blocks(self) -> list[list[bool]]:
        """Tell for each block [rows / block_size][columns / block_size] whether some distance is infinite or NaN."""
        # No distance exceeds (|u| + |v|)², which decides most blocks, in one transfer to the host.
        u_largest, v_largest = (
            torch.stack([block.amax() for block in norms.double().split(self._block_size)])
            for norms in (self._u_norm, self._v_norm)
        )
        bounds = (u_largest.sqrt()[:, None] + v_largest.sqrt()).square().tolist()
        overflows = [[bound > 0.9 * _HALF_MAX for bound in row] for row in bounds]
        for i, row in enumerate(overflows):
            for j, possible in enumerate(row):
                row[j] = possible and not self._all_finite(i, j)
        return overflows

    def _all_finite(self, i: int, j: int) -> bool:
        u_start, v_start = i * self._block_size, j * self._block_size
        num_rows, num_columns = (
            min(self._block_size, len(x) - start) for x, start in ((self._u, u_start), (self._v, v_start))
        )
        for row, column in _tile_pairs(num_rows, num_columns, self._block_size):
            rows = slice(u_start + row.start, u_start + row.stop)
            columns = slice(v_start + column.start, v_start + column.stop)
            if not torch.isfinite(self._in_half(self._product(rows, columns), rows, columns)).all():
                return False
        return True


def _squared_norms(points: Tensor) -> Tensor:
    """Return the squared norms [n] in float64."""
    return torch.cat([block.double().square().sum(dim=1) for block in points.split(_TILE)])


def _half_norms(points: Tensor) -> Tensor:
    """Return the squared norms [n] in half precision, added up in the order of TensorFlow on a CPU."""
    return torch.cat([_half_sums(block.half().square()) for block in points.split(_TILE)])


def _half_sums(x: Tensor) -> Tensor:
    """Return the row sums [n] of x [n, d], all in half precision, as Eigen adds them up in packets of eight.

    The packets of a row go by turns into four sums of packets, these then into the first of them, and its eight
    numbers, in float32, into one. A row longer than 1600 is the sum of two that are added up like this.
    """
    n, d = x.shape
    if d > 1600:
        middle = -(-d // 16) * 8
        return _half_sums(x[:, :middle]) + _half_sums(x[:, middle:])
    packets, rest = x[:, : d // 8 * 8].reshape(n, -1, 8), x[:, d // 8 * 8 :]
    in_turns = packets.shape[1] // 4 * 4
    sums = x.new_zeros(n, 4, 8)
    for i in range(0, in_turns, 4):
        sums += packets[:, i : i + 4]
    # Every addition rounds, which is why none of these loops is a sum over a dimension.
    packet = x.new_zeros(n, 8)
    for part in (*sums.unbind(dim=1), *packets[:, in_turns:].unbind(dim=1)):
        packet += part
    total = x.new_zeros(n)
    for number in rest.unbind(dim=1):
        total += number
    return total + packet.float().sum(dim=1).half()


_MODES = ("adm", "exact")
