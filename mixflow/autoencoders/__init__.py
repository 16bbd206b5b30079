"""Pixels to latents and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mixflow.autoencoders.identity import Identity
from mixflow.autoencoders.pixels import Pixels
from mixflow.autoencoders.rae import RAE
from mixflow.autoencoders.sd_vae import SDVae
from mixflow.runtime.errors import UserError, did_you_mean

__all__ = ["RAE", "Autoencoder", "load_autoencoder"]

_KINDS = ("identity", "pixels", "rae", "sd_vae")


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
        """Latents [B,C,h,w] -> images uint8 [B,H,W,3]; to_uint8 is 'round' (SiT) or 'truncate' (REPA, RAE)."""
        ...


def load_autoencoder(
    settings: Mapping[str, Any],
    files: Mapping[str, Path] | None = None,  # by name, as the kind asks; {} for pixels
    device: torch.device | str = "cpu",
    *,
    mirrors: bool | None = None,  # for rae: whether the cache keeps mirror images too; other kinds have their own way
) -> Autoencoder:
    """Build the autoencoder of a resolved config entry ({kind: ..., ...}).

    Without some of its files it can do whatever does not take them: sd_vae's `latents` takes none.
    """
    options, files = dict(settings), dict(files or {})
    kind = options.pop("kind")
    if kind not in _KINDS:
        raise UserError(f"autoencoder kind '{kind}' is not known{did_you_mean(kind, _KINDS)}")
    if kind == "rae":
        return RAE(files, device, mirrors=bool(mirrors), **options)
    if kind == "identity":
        return Identity(**options)
    return Pixels(**options) if kind == "pixels" else SDVae(_folder(files), device, **options)


def _folder(files: Mapping[str, Path]) -> Path | None:
    """Return where an sd_vae's files lie, None if there are none. `UserError` without a config.json."""
    if not files:
        return None
    if "config.json" not in files:
        raise UserError(f"the autoencoder's download has no config.json among {', '.join(files)}: add it to its files")
    return files["config.json"].parent
