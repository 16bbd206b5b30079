"""The identity autoencoder: latents are the pixels, scaled to [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


class Pixels:
    """Stores uint8 pixels as they are, so that the cache loses nothing."""

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B,H,W,C] -> stored uint8 [B,C,H,W]."""
        return images.permute(0, 3, 1, 2).contiguous()

    def latents(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """Stored uint8 [B,C,H,W] -> latents float32 [B,C,H,W] in [-1,1]; there is nothing random about pixels."""
        return stored.to(torch.float32) / 127.5 - 1.0

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,H,W] -> images uint8 [B,H,W,3], grey repeated; clamped, rounded to the nearest level."""
        pixels = (latents.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
