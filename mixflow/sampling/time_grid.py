"""At which times a solver stops."""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow.flow import shift_time
from mixflow.runtime.errors import UserError


def time_grid(
    num_steps: int,  # N >= 1 intervals
    *,
    start: float = 0.0,
    end: float = 1.0,
    shift: float = 1.0,  # as in shift_time; start, end and last_step_size are times before the shift
    last_step_size: float = 0.0,  # 0: all steps are equal; SiT's SDE takes 0.04
) -> Tensor:
    """Return ascending times in [0, 1], float64 [N+1], paper time. Raises `UserError` for values that cannot be.

    A peer that asks torchdiffeq for `num_steps` points takes num_steps - 1 steps. RAE's grid of 50 points is
    time_grid(49, end=0.999, shift=...).
    """
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}: it must be at least 1")
    if not 0 <= start < end <= 1:
        raise UserError(f"start and end are {start} and {end}: they must satisfy 0 <= start < end <= 1")
    if not 0 <= last_step_size < end - start:
        raise UserError(f"last_step_size is {last_step_size}: it must lie in [0, {end - start}), below the whole span")
    if last_step_size == 0:
        times = torch.linspace(start, end, num_steps + 1, dtype=torch.float64)
    elif num_steps == 1:
        raise UserError(f"last_step_size is {last_step_size} but num_steps is 1: give at least 2 steps, or size 0")
    else:
        times = torch.linspace(start, end - last_step_size, num_steps, dtype=torch.float64)
        times = torch.cat([times, times.new_tensor([end])])
    return shift_time(times, shift)
