"""Pixels to latents and back."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from mixflow.autoencoders.pixels import Pixels
from mixflow.runtime.errors import UserError, did_you_mean

__all__ = ["Autoencoder", "load_autoencoder"]


class Autoencoder(Protocol):
    """What the stages ask of an autoencoder."""

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B,H,W,C] -> what the cache stores of them [B,...]: the posterior, or the pixels."""
        ...

    def latents(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """Stored values -> latents float32 [B,C,h,w], drawn with `noise` where the posterior is random."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,h,w] -> images uint8 [B,H,W,3]."""
        ...


_KINDS = {"pixels": Pixels}


def load_autoencoder(settings: dict[str, Any]) -> Autoencoder:
    """Build the autoencoder of a resolved config entry ({kind: ..., ...})."""
    options = dict(settings)
    kind = options.pop("kind")
    if kind not in _KINDS:
        raise UserError(f"autoencoder kind '{kind}' is not known{did_you_mean(kind, _KINDS)}")
    return _KINDS[kind](**options)
