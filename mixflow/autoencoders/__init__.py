"""Pixels to latents and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mixflow.autoencoders.pixels import Pixels
from mixflow.autoencoders.sd_vae import SDVae
from mixflow.runtime.errors import UserError, did_you_mean

__all__ = ["Autoencoder", "load_autoencoder"]

_KINDS = ("pixels", "sd_vae")


class Autoencoder(Protocol):
    """What the stages ask of an autoencoder."""

    mirrors: bool  # encode gives two of each, image and mirror image; else a mirror image is the flip of what is stored
    is_random: bool  # whether `latents` draws from a posterior, and so takes noise

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B,H,W,C] -> what the cache stores of them: [B,...], or [B,2,...] with both mirrors."""
        ...

    def latents(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """Stored values of one mirror -> latents float32 [B,C,h,w], drawn with `noise` where `is_random`."""
        ...

    def decode(self, latents: Tensor, to_uint8: str = "round") -> Tensor:
        """Latents [B,C,h,w] -> images uint8 [B,H,W,3]; to_uint8 is 'round' (as SiT) or 'truncate' (as REPA)."""
        ...


def load_autoencoder(
    settings: dict[str, Any], folder: Path | None = None, device: torch.device | str = "cpu"
) -> Autoencoder:
    """Build the autoencoder of a resolved config entry ({kind: ..., ...}).

    `folder` holds the network's files, for kinds that have one; without it such a kind only knows `latents`.
    """
    options = dict(settings)
    kind = options.pop("kind")
    if kind not in _KINDS:
        raise UserError(f"autoencoder kind '{kind}' is not known{did_you_mean(kind, _KINDS)}")
    return Pixels(**options) if kind == "pixels" else SDVae(folder, device, **options)
