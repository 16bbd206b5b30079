"""The bilinear resize of TensorFlow 1, which stands in front of the 2015 Inception network."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mixflow.evaluation.arrays import Array, as_tensor
from mixflow.runtime.errors import UserError


def resize_tf1(images: Array, size: int) -> Tensor:
    """Resize `images` to `size` x `size` pixels as TF1's ResizeBilinear did, bit for bit on a CPU.

    Target pixel i reads source position i * (in / out): the grid starts at the corner, not at pixel centres, and
    nothing is smoothed when shrinking. `torch.nn.functional.interpolate` differs by several grey levels.

    Args:
        images: uint8 [B, H, W, C] or [B, C, H, W], C = 1 or 3 (the former where both readings are possible).
        size: target height and width in pixels, 299 for Inception.

    Returns float32 in the layout of `images`, values in [0, 255]. Raises `UserError` for another shape or type.
    """
    pixels = as_tensor(images)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not {1, 3} & {pixels.shape[1], pixels.shape[3]}:
        raise UserError(
            f"images must be uint8 of shape [B, H, W, C] or [B, C, H, W] with 1 or 3 channels, got {pixels.dtype} "
            f"{list(pixels.shape)}: convert them to 0..255 first"
        )
    height, width = (1, 2) if pixels.shape[3] in (1, 3) else (2, 3)
    return _lerp(_lerp(pixels, width, size), height, size)


def _lerp(x: Tensor, dim: int, size: int) -> Tensor:
    """Interpolate linearly along `dim` to `size` entries; columns go before rows, as float32 rounding depends on it."""
    if x.shape[dim] == size:
        return x.float()  # all fractions are zero
    low, high, fraction = _grid(x.shape[dim], size, x.device)
    # Neighbours are picked before they become float32, and the rest is done in place: memory is what this waits for.
    below, above = x.index_select(dim, low).float(), x.index_select(dim, high).float()
    return above.sub_(below).mul_(fraction.view(-1, *[1] * (x.ndim - 1 - dim))).add_(below)


@functools.lru_cache(maxsize=8)  # a copy to the device for every batch would make the host wait
def _grid(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two neighbours of each target position and the way from the first to the second, [size] each."""
    # TensorFlow divides and multiplies in float32; a float64 position floors differently now and then.
    scale = torch.tensor(length, dtype=torch.float32) / size
    position = torch.arange(size, dtype=torch.float32) * scale
    low = position.floor()
    return low.long().to(device), (low.long() + 1).clamp(max=length - 1).to(device), (position - low).to(device)
