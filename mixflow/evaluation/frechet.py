"""Fréchet distance between two Gaussians: FID, sFID and FD differ only in the features they are given."""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow.evaluation.arrays import Array, as_tensor, finite_matrix
from mixflow.evaluation.moments import moments
from mixflow.runtime.errors import UserError

_BLOCK_ROWS = 4096  # rows turned into float64 at a time


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array, *, factor: Array | None = None) -> float:
    """Return |mu1 - mu2|² + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^½), in squared feature units.

    With sigma1 = F Fᵀ the product sigma1 sigma2 has the eigenvalues of the symmetric Fᵀ sigma2 F, so that the trace of
    the root is the sum of their square roots (negative ones, which are rounding, count as zero). This is several times
    faster than the matrix square root (benchmarks/frechet.py) and needs no epsilon; on CUDA `eigvalsh` is fast where
    `eig` of the product is slow. The result itself is not clipped: equal arguments may give -1e-13. Where a covariance
    is singular (dead features, or no more images than features), the eigenvalues that ought to be zero add up to about
    1e-8 d times the scale of the covariances.

    Args:
        mu1, mu2: means [d]; the first is by custom the reference.
        sigma1, sigma2: covariances [d, d]. Any float type; the work is done in float64 on the device of `sigma1`.
        factor: `covariance_factor(sigma1)` [d, d] from an earlier call, where the reference is used again and again.

    Raises `UserError` for shapes that do not belong together, NaN or infinity.
    """
    device = sigma1.device if isinstance(sigma1, Tensor) else torch.device("cpu")
    mu1, sigma1, mu2, sigma2 = (as_tensor(x).to(device, torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    d = mu1.numel()
    _require_finite(mu1=(mu1, [d]), sigma1=(sigma1, [d, d]), mu2=(mu2, [d]), sigma2=(sigma2, [d, d]))
    if factor is None:
        factor = covariance_factor(sigma1)
    factor = as_tensor(factor).to(sigma1)
    assert factor.shape == sigma1.shape, "the cached factor belongs to another covariance"
    product = factor.T @ symmetric(sigma2) @ factor
    trace_of_root = torch.linalg.eigvalsh(symmetric(product)).clamp(min=0).sqrt().sum()
    difference = mu1 - mu2
    return float(difference @ difference + sigma1.trace() + sigma2.trace() - 2 * trace_of_root)


def frechet_distance_to(mu1: Array, sigma1: Array, features: Array, factor: Array | None = None) -> float:
    """Return `frechet_distance` from a Gaussian to that of `features` [n, d], the faster and better way for few rows.

    With the centred rows X / (n-1)^½ as the factor of their covariance, the eigenvalues that count are those of the
    n x n matrix X sigma1 Xᵀ / (n-1): no covariance of the rows is formed, and none of its zeros is computed. With more
    rows than features it goes by their moments, and by the cached `covariance_factor(sigma1)` where one is given.
    Raises `UserError` as `frechet_distance` and `moments` do.
    """
    rows = finite_matrix(features, "features")
    if len(rows) > rows.shape[1]:
        return frechet_distance(mu1, sigma1, *moments(rows), factor=factor)
    mu1, sigma1, centred, difference = _few_rows(mu1, sigma1, rows)
    product = centred @ symmetric(sigma1) @ centred.T / (len(rows) - 1)  # [n,n]
    trace_of_root = torch.linalg.eigvalsh(symmetric(product)).clamp(min=0).sqrt().sum()
    trace = centred.square().sum() / (len(rows) - 1)
    return float(difference @ difference + sigma1.trace() + trace - 2 * trace_of_root)


def frechet_influence(mu1: Array, sigma1: Array, features: Array, factor: Array | None = None) -> tuple[float, Tensor]:
    """Return `frechet_distance_to` and how far each image pulls it, float64 [n].

    The derivative by the weight of the row x, with c = x - mu2, sigma1 = F Fᵀ and A = Fᵀ sigma2 F, is a constant and
    2 (mu2 - mu1) c + n / (n-1) (|c|² - cᵀ F A^{-½} Fᵀ c). A^{-½} acts within the span of the rows, so that it exists
    for fewer rows than features, too. Takes one `eigh` more than the distance. `UserError` as there.
    """
    rows = finite_matrix(features, "features")
    n, d = rows.shape
    if n <= d:
        value = frechet_distance_to(mu1, sigma1, rows)
        _, sigma1, centred, difference = _few_rows(mu1, sigma1, rows)
        product = centred @ symmetric(sigma1) @ centred.T / (n - 1)  # [n,n]
        eigenvalues, vectors = torch.linalg.eigh(symmetric(product))
        root_terms = (n - 1) * vectors.square() @ eigenvalues.clamp(min=0).sqrt()  # [n]
        return value, -2 * centred @ difference + n / (n - 1) * (centred.square().sum(dim=1) - root_terms)

    mu1, sigma1 = (as_tensor(x).to(rows.device, torch.float64) for x in (mu1, sigma1))
    _require_finite(mu1=(mu1, [d]), sigma1=(sigma1, [d, d]))
    mu2, sigma2 = moments(rows)
    factor = covariance_factor(sigma1) if factor is None else as_tensor(factor).to(sigma2)
    value = frechet_distance(mu1, sigma1, mu2, sigma2, factor=factor)
    eigenvalues, vectors = torch.linalg.eigh(symmetric(factor.T @ sigma2 @ factor))
    smallest = eigenvalues[-1].clamp(min=0) * 1e-12  # what is below is rounding
    weights = torch.where(eigenvalues > smallest, eigenvalues.clamp(min=smallest) ** -0.25, 0)
    root = factor @ (vectors * weights)  # [d,d], of which root rootᵀ = F A^{-½} Fᵀ
    influence = []
    for block in rows.split(_BLOCK_ROWS):
        centred = block.double() - mu2  # [b,d]
        quadratic = centred.square().sum(dim=1) - (centred @ root).square_().sum(dim=1)
        influence.append(2 * centred @ (mu2 - mu1) + n / (n - 1) * quadratic)
    return value, torch.cat(influence)


def _few_rows(mu1: Array, sigma1: Array, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mu1 [d], sigma1 [d, d], `rows` less their mean [n, d], and mu1 less that mean [d], all float64."""
    if len(rows) < 2:
        raise UserError(f"a covariance needs at least 2 images, got {len(rows)}: generate or load more")
    d = rows.shape[1]
    mu1, sigma1 = (as_tensor(x).to(rows.device, torch.float64) for x in (mu1, sigma1))
    _require_finite(mu1=(mu1, [d]), sigma1=(sigma1, [d, d]))
    rows = rows.double()
    mu2 = rows.mean(dim=0)
    return mu1, sigma1, rows - mu2, mu1 - mu2


def _require_finite(**matrices: tuple[Tensor, list[int]]) -> None:
    for name, (value, shape) in matrices.items():
        if list(value.shape) != shape:
            raise UserError(
                f"{name} has shape {list(value.shape)} where {shape} is expected: reference and samples must come "
                "from the same extractor"
            )
        if not torch.isfinite(value).all():
            raise UserError(f"{name} holds NaN or infinity: measure the features of the images again")


def covariance_factor(sigma: Array) -> Tensor:
    """Return F [d, d], float64, with F Fᵀ = `sigma` [d, d]: its Cholesky factor, or by `eigh` where it is singular."""
    sigma = symmetric(as_tensor(sigma).double())
    cholesky, info = torch.linalg.cholesky_ex(sigma)
    if not info:
        return cholesky
    eigenvalues, eigenvectors = torch.linalg.eigh(sigma)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()


def symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part of `matrix` [d, d]."""
    return (matrix + matrix.T) / 2
