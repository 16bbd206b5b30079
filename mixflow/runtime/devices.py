"""Processes and devices of a stage, through accelerate."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from mixflow.runtime.errors import UserError
from mixflow.runtime.processes import require_gpus

PRECISIONS = ("fp32", "tf32", "bf16")
# Processes wait for the slowest: for a whole batch of samples, or while one of them hashes a cache. NCCL gives up after
# 10 minutes.
_LONGEST_WAIT = timedelta(hours=4)


def start_accelerator(precision: str, expected_gpus: int | None = None) -> Accelerator:
    """Return an accelerator for this process, with float32 matrix products as `precision` asks.

    fp32 is strict (no TF32 in products or convolutions); tf32 allows TF32 on CUDA; bf16 runs the network under
    autocast with float32 master weights. `expected_gpus` stops at once on a machine that shows fewer.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision '{precision}' is not known: use one of {', '.join(PRECISIONS)}")
    require_gpus(expected_gpus)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return Accelerator(
        # Without it, a torch that could use CUDA makes a lone process of each where there is no GPU.
        cpu=torch.cuda.device_count() == 0,
        mixed_precision="bf16" if precision == "bf16" else "no",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
    )
