"""What float32 means on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """Decide on TF32 in convolutions and products, whatever the caller has decided for other networks.

    Unless told otherwise cuDNN uses it. A CPU never does.
    """
    cudnn, product = torch.backends.cudnn, torch.backends.cuda.matmul
    operations = [cudnn.conv, cudnn.rnn, product]  # type: ignore[attr-defined]
    before = [operation.fp32_precision for operation in operations]
    try:
        flags = cudnn.allow_tf32, product.allow_tf32
    except RuntimeError:  # they cannot be read where somebody has set the precisions alone
        flags = None
    # The flags too: torch.compile reads them, which fails where they contradict the precisions.
    cudnn.allow_tf32 = product.allow_tf32 = tf32
    for operation in operations:
        operation.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        if flags is not None:
            cudnn.allow_tf32, product.allow_tf32 = flags
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision
