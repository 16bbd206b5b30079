"""No autoencoder: latents are the numbers that a dataset is drawn as. They are no pixels, and cannot become any."""

from __future__ import annotations

from torch import Tensor

from mixflow.runtime.errors import UserError


class Identity:
    """Stores float32 numbers as they are."""

    mirrors = False
    is_random = False

    def encode(self, images: Tensor) -> Tensor:
        """Draws float32 [B,H,W,C] -> stored float32 [B,C,H,W]."""
        return images.permute(0, 3, 1, 2).contiguous()

    def latents(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """Stored float32 [B,C,H,W] -> the same: there is nothing random about them."""
        return stored

    def decode(self, latents: Tensor, to_uint8: str = "round") -> Tensor:
        """Raise `UserError`: the latents are those of no image."""
        raise UserError("latents of an autoencoder of kind identity are no images: sample a checkpoint of images")
