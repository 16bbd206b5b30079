"""From decoder output to grey levels. The peers differ by half a level, which metrics can see."""

from __future__ import annotations

import torch
from torch import Tensor

TO_UINT8 = ("round", "truncate")


def quantise(images: Tensor, to_uint8: str) -> Tensor:
    """Images in [-1,1], [B,C,H,W] -> uint8 [B,H,W,3], clamped, grey repeated.

    "round": the nearest level, floor(127.5 x + 128), as SiT. "truncate": floor(255 (x+1)/2), as REPA.
    """
    assert to_uint8 in TO_UINT8, to_uint8
    images = images.float()
    return _bytes(127.5 * images + 128.0 if to_uint8 == "round" else 255.0 * ((images + 1.0) / 2.0))


def quantise_unit(images: Tensor, to_uint8: str) -> Tensor:
    """Images in [0,1], [B,C,H,W] -> uint8 [B,H,W,3], clamped, grey repeated.

    "round": the nearest level, floor(255 x + 1/2). "truncate": floor(255 x), as RAE.
    """
    assert to_uint8 in TO_UINT8, to_uint8
    levels = 255.0 * images.float()
    return _bytes(levels + 0.5 if to_uint8 == "round" else levels)


def _bytes(levels: Tensor) -> Tensor:
    return levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
