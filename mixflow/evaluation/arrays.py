"""What the metrics accept: torch tensors and numpy arrays, memory maps among them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixflow.runtime.errors import UserError

Array = Tensor | np.ndarray


def as_tensor(array: Array) -> Tensor:
    """Return `array` as a tensor that shares its memory; a read-only array, which torch cannot share, is copied."""
    if isinstance(array, Tensor):
        return array.detach()
    array = np.asarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def finite_matrix(array: Array, name: str) -> Tensor:
    """Return `array` as a finite tensor [n, d]; `UserError` names the first bad row otherwise."""
    matrix = as_tensor(array)
    if matrix.ndim != 2:
        raise UserError(f"{name} must have shape [n, d], got {list(matrix.shape)}: give one row per image")
    # Block by block: at 50,000 x 2048 the whole would take half a GiB.
    finite_rows = torch.cat([torch.isfinite(block).all(dim=1) for block in matrix.split(4096)])
    if not finite_rows.all():
        row = int((~finite_rows).nonzero()[0])
        raise UserError(
            f"row {row} of {name} holds NaN or infinity, as do {int((~finite_rows).sum())} of {len(matrix)} rows: "
            "mend or remove those images before measuring"
        )
    return matrix
