"""The identity autoencoder: latents are the pixels, scaled to [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow.autoencoders.quantise import quantise


class Pixels:
    """Stores uint8 pixels as they are, so that the cache loses nothing."""

    mirrors = False
    is_random = False

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B,H,W,C] -> stored uint8 [B,C,H,W]."""
        return images.permute(0, 3, 1, 2).contiguous()

    def latents(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """Stored uint8 [B,C,H,W] -> latents float32 [B,C,H,W] in [-1,1]; there is nothing random about pixels."""
        return stored.to(torch.float32) / 127.5 - 1.0

    def decode(self, latents: Tensor, to_uint8: str = "round") -> Tensor:
        """Latents [B,C,H,W] -> images uint8 [B,H,W,3], grey repeated; `to_uint8` as in `quantise`."""
        return quantise(latents, to_uint8)
