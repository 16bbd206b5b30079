"""Training latents for measurements: those of a cache, or encoded from cached pixels, chosen by seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixflow.autoencoders import RAE, load_autoencoder
from mixflow.data.latents import DataOrder, LatentCache
from mixflow.runtime.errors import UserError
from mixflow.runtime.seeds import Stream, normal


class RealLatents:
    """The training images of a latent cache as latents, in the order of a seed: epoch after epoch, each shuffled."""

    def __init__(
        self,
        settings: Mapping[str, Any],  # with autoencoder and, where latents are encoded from pixels, encode
        index: Path,
        files: Mapping[str, Path],  # of the autoencoder, by name
        device: torch.device,
    ) -> None:
        """Raises `UserError` for a cache of another autoencoder and for missing files."""
        autoencoder = settings["autoencoder"]
        self.encode: bool = settings.get("encode", False)
        needed = ["statistics"] if autoencoder["kind"] == "rae" else []
        if self.encode:
            needed = ["encoder/config.json", *needed]
        if missing := [name.partition("/")[0] for name in needed if name not in files]:
            options = " ".join(f"{role}=RECORD" for role in missing)
            raise UserError(f"'{index}' cannot be read as latents without {options}: give it with --autoencoder")
        self.cache = LatentCache(index)
        self.cache.check_autoencoder(settings["pixel_autoencoder"] if self.encode else autoencoder)
        self.codec = load_autoencoder(autoencoder, files, device)
        self.device = device
        self.images = self.cache.split("train")
        self.shape = tuple(self.cache.latent_shape)
        if self.encode:
            side = self.shape[1] // autoencoder["downsampling"]
            self.shape = (autoencoder["channels"], side, side)

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, seed: int, step: int, indices: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return (latents float32 [n,C,h,w], labels [n]) on the device, of the images at places first + indices.

        `indices` int64 [n], ascending, on the CPU. Posteriors are drawn from (seed, step, index).
        """
        chosen = DataOrder(len(self.images), seed)[first + np.asarray(indices)]
        stored, labels = self.images.gather(chosen)
        stored, labels = stored.to(self.device), labels.to(self.device)
        if self.encode:
            assert isinstance(self.codec, RAE)
            return self.codec.encode_latents(stored.permute(0, 2, 3, 1)), labels
        posterior = None
        if self.codec.is_random:
            posterior = normal(seed, Stream.POSTERIOR, step, indices.to(self.device), self.shape)
        return self.codec.latents(stored, posterior), labels

    def check_shape(self, name: str, wanted: tuple[int, ...], num_classes: int) -> None:
        """Raise `UserError` unless these are latents of the shape [C,h,w] and classes of the network `name`."""
        if self.shape != wanted or self.cache.num_classes > num_classes:
            raise UserError(
                f"'{name}' takes latents of shape {list(wanted)} and {num_classes} classes but "
                f"'{self.cache.index_path}' has {list(self.shape)} and {self.cache.num_classes}: name other latents"
            )
