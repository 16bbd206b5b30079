"""Mean and covariance of features, streamed in float64 and summed over devices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixflow.evaluation.arrays import Array, finite_matrix
from mixflow.runtime.errors import UserError

# Rows turned into float64 at a time: 128 MiB at 4096 features.
_BLOCK_ROWS = 4096


class Moments:
    """Running n, sum of x, and sum of x xᵀ, all float64.

    The three are plain sums, so devices add theirs up in any order (`state`, one all-reduce of each, `from_state`), and
    how the rows were split changes the result by rounding only: below 1e-12 of the squared scale of the features.
    float32 sums would be wrong by 1e-5 on the trace at 50,000 rows, hence float64 for every input type.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)  # [d]
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)  # [d,d]

    def update(self, features: Array, name: str = "features") -> None:
        """Add rows [n, d] of any float type, from any device. `UserError` for another d, NaN or infinity."""
        rows = finite_matrix(features, name)
        if rows.shape[1] != len(self.sum):
            raise UserError(
                f"{name} have {rows.shape[1]} columns where {len(self.sum)} are expected: use one extractor throughout"
            )
        for block in rows.split(_BLOCK_ROWS):
            block = block.to(self.sum)  # [b,d] float64
            self.n += len(block)
            self.sum += block.sum(dim=0)
            self.outer.addmm_(block.T, block)

    def merge(self, other: Moments) -> None:
        """Add what `other` has seen."""
        if other.sum.shape != self.sum.shape:
            raise UserError(f"moments of {len(other.sum)} and of {len(self.sum)} features cannot be merged")
        self.n += other.n
        self.sum += other.sum.to(self.sum)
        self.outer += other.outer.to(self.outer)

    def state(self) -> dict[str, Tensor]:
        """Return float64 copies of `n` [], `sum` [d] and `outer` [d, d]; states of disjoint rows may be added up."""
        n = torch.tensor(self.n, dtype=torch.float64, device=self.sum.device)
        return {"n": n, "sum": self.sum.clone(), "outer": self.outer.clone()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        """Return the moments whose `state()` this is."""
        moments = cls(len(state["sum"]), device=state["sum"].device)
        moments.n = int(state["n"])
        moments.sum.copy_(state["sum"])
        moments.outer.copy_(state["outer"])
        return moments

    @property
    def mean(self) -> Tensor:
        """The mean [d]. `UserError` for fewer than two rows."""
        self._require_two_rows()
        return self.sum / self.n

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (ddof = 1) [d, d], exactly symmetric. `UserError` for fewer than two rows."""
        self._require_two_rows()
        covariance = (self.outer - torch.outer(self.sum, self.sum) / self.n) / (self.n - 1)
        return (covariance + covariance.T) / 2

    def _require_two_rows(self) -> None:
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.n}: generate or load more")


def moments(features: Array) -> tuple[Tensor, Tensor]:
    """Return mean [d] and unbiased covariance [d, d] of `features` [n, d], both float64, on the device of `features`.

    Raises `UserError` for NaN, infinity, or fewer than two rows.
    """
    rows = finite_matrix(features, "features")
    seen = Moments(rows.shape[1], device=rows.device)
    seen.update(rows)
    return seen.mean, seen.covariance
