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
    # Not by `allow_tf32`, which cannot be read where somebody has set these.
    convolution, product = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = convolution.fp32_precision, product.fp32_precision
    convolution.fp32_precision = product.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision, product.fp32_precision = before
