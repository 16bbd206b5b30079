"""Mean and covariance of training latents: the Gaussian law that Slow Flow's nulls sample and its clocks know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mixflow.runtime.errors import UserError
from mixflow.runtime.seeds import Stream, permutation


@dataclass(frozen=True)
class LatentLaw:
    """Moments of latents of d numbers, float64.

    On principal axes where d allows a full covariance. Else axes are the coordinates themselves: `variance` is that of
    each, correlations are left out, and clocks look at `coordinates` alone.
    """

    count: int  # images behind it
    energy: float  # E|x1|^2
    mean: Tensor  # [d]
    variance: Tensor  # [d] along `axes`
    axes: Tensor | None = None  # [d,d] orthonormal columns; None: the coordinates
    coordinates: Tensor | None = None  # [A] int64, those that clocks look at; None: all
    class_means: Tensor | None = None  # [K,d], and the law around them, which all classes share:
    within_variance: Tensor | None = None  # [d] along
    within_axes: Tensor | None = None  # [d,d]
    class_shares: Tensor | None = None  # [K], how often each class occurs

    @property
    def axis_mean(self) -> Tensor:
        """The mean on the axes that clocks look at, [A]."""
        return self.mean @ self.axes if self.axes is not None else self._looked_at(self.mean)

    @property
    def axis_variance(self) -> Tensor:
        """The variance on the axes that clocks look at, [A]."""
        return self._looked_at(self.variance)

    def _looked_at(self, values: Tensor) -> Tensor:
        return values if self.coordinates is None else values[self.coordinates]

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it as tensors, for a file."""
        numbers = {"count": torch.tensor(self.count), "energy": torch.tensor(self.energy, dtype=torch.float64)}
        fields = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return numbers | {name: value.contiguous() for name, value in fields.items()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> LatentLaw:
        """Return what `tensors` gave."""
        fields = {name: value for name, value in tensors.items() if name not in ("count", "energy")}
        return cls(count=int(tensors["count"]), energy=float(tensors["energy"]), **fields)


def fit_law(
    batches: Iterable[tuple[Tensor, Tensor]],  # latents [n,C,h,w] and labels [n]
    num_classes: int,
    *,
    max_axes: int,  # up to so many numbers in a latent there is a full covariance; beyond, so many coordinates
    seed: int,  # of their choice
) -> LatentLaw:
    """Return the moments of all batches together, on their device.

    The law of the classes is there where the covariance is full, there are several classes, and twice as many images as
    classes at least: their means with the pooled covariance around them. Raises `UserError` for fewer than two images.
    """
    remaining = iter(batches)
    first = next(remaining, None)
    few = UserError("a mean and covariance need two latents at least: raise fit_images")
    if first is None:
        raise few
    d, device = first[0][0].numel(), first[0].device
    full = d <= max_axes
    total = torch.zeros(d, dtype=torch.float64, device=device)
    squares = total.new_zeros((d, d) if full else d)
    sums = total.new_zeros((num_classes, d) if full else (0, d))
    counts = total.new_zeros(num_classes)
    for latents, labels in chain([first], remaining):
        x = latents.flatten(1).double()
        total += x.sum(dim=0)
        squares += x.T @ x if full else x.square().sum(dim=0)
        counts += torch.bincount(labels, minlength=num_classes)
        if full:
            sums.index_add_(0, labels, x)
    count = int(counts.sum())
    if count < 2:
        raise few
    mean = total / count
    if not full:
        variance = ((squares - count * mean.square()) / (count - 1)).clamp_min(0)
        chosen = torch.from_numpy(permutation(seed, Stream.COORDINATES, 0, d)[:max_axes]).sort().values
        return LatentLaw(count, float(squares.sum() / count), mean, variance, coordinates=chosen.to(mean.device))
    energy = float(squares.trace() / count)
    variance, axes = _principal((squares - count * torch.outer(mean, mean)) / (count - 1))
    law = LatentLaw(count, energy, mean, variance, axes)
    present = counts > 0
    num_present = int(present.sum())
    if num_present < 2 or count < 2 * num_present:
        return law
    means = torch.where(present[:, None], sums / counts.clamp_min(1)[:, None], mean)  # of an absent class: the whole's
    between = (means * counts[:, None]).T @ means
    within_variance, within_axes = _principal((squares - between) / (count - num_present))
    return LatentLaw(
        count, energy, mean, variance, axes,
        class_means=means, within_variance=within_variance, within_axes=within_axes, class_shares=counts / count,
    )  # fmt: skip


def _principal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return variances [d] and axes [d,d], ascending. What rounding made negative is 0."""
    variance, axes = torch.linalg.eigh(covariance)
    return variance.clamp_min(0), axes
