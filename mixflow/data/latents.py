"""Latent caches: contiguous memory-mapped shards and the `index.json` that describes them.

`index.json` holds {format, settings, num_classes, latent_shape, splits: {name: {num_images, shards: [{file, bytes,
sha256, count}]}}}. A shard is a safetensors file with `stored` [n,...] (what the autoencoder keeps of an image),
`labels` int64 [n] and `indices` int64 [n].
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.files import atomic_path, file_sha256, read_json
from mixflow.runtime.seeds import Stream, permutation

FORMAT = "mixflow-latents-1"


def write_shard(path: Path, stored: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Any]:
    """Write one shard unless it is there (its name holds a hash of the settings, and it is whole); return its entry."""
    if not path.exists():
        with atomic_path(path) as temporary:
            save_file({"stored": stored.contiguous(), "labels": labels, "indices": indices}, temporary)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "count": len(labels)}


class LatentSplit:
    """Random access to one split of a cache through memory maps; nothing is read before it is asked for."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]]) -> None:
        self.paths = [folder / shard["file"] for shard in shards]
        arrays = [_map_shard(path) for path in self.paths]
        self._stored = [shard["stored"] for shard in arrays]
        self.labels = np.concatenate([np.asarray(shard["labels"]) for shard in arrays])
        self._starts = np.cumsum([0] + [len(shard["labels"]) for shard in arrays])

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return (stored [n,...], labels [n]) of the given positions, in the order asked for."""
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        stored = np.empty((len(indices), *self._stored[0].shape[1:]), dtype=self._stored[0].dtype)
        for shard in np.unique(shard_of):
            chosen = shard_of == shard
            stored[chosen] = self._stored[shard][indices[chosen] - self._starts[shard]]
        return torch.from_numpy(stored), torch.from_numpy(self.labels[indices])


class LatentCache:
    """A latent cache opened by its `index.json`. Sizes are checked at once, hashes by `verify`."""

    def __init__(self, index_path: str | os.PathLike[str]) -> None:
        self.index_path = Path(index_path)
        self.index = read_json(index_path)
        if not isinstance(self.index, dict) or self.index.get("format") != FORMAT:
            raise UserError(f"'{index_path}' is not a latent cache (format '{FORMAT}'): make it with cache-latents")
        self.latent_shape: tuple[int, ...] = tuple(self.index["latent_shape"])
        self.num_classes: int = self.index["num_classes"]
        for shard in self._shards():
            path = self.index_path.parent / shard["file"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise self._broken(path, f"{found} where the index says {shard['bytes']:,}")

    def _shards(self) -> Iterator[dict[str, Any]]:
        for split in self.index["splits"].values():
            yield from split["shards"]

    def _broken(self, path: Path, what: str) -> UserError:
        folder = self.index_path.parent
        return UserError(f"latent shard '{path}' {what}: delete '{folder}' and run the same command again")

    def verify(self) -> None:
        """Compare every shard with the SHA-256 in the index; a corrupted one is a `UserError` that names it."""
        shards = list(self._shards())
        with ThreadPoolExecutor(max_workers=8) as pool:
            paths = [self.index_path.parent / shard["file"] for shard in shards]
            for shard, path, found in zip(shards, paths, pool.map(file_sha256, paths), strict=True):
                if found != shard["sha256"]:
                    raise self._broken(path, f"is corrupted (sha256 {found[:12]}… instead of {shard['sha256'][:12]}…)")

    def split(self, name: str) -> LatentSplit:
        """Open a split such as 'train' or 'held_out'."""
        if name not in self.index["splits"]:
            raise UserError(f"'{self.index_path}' has no split '{name}'" + did_you_mean(name, self.index["splits"]))
        return LatentSplit(self.index_path.parent, self.index["splits"][name]["shards"])


class DataOrder:
    """Which image stands at which position of the endless, per-epoch shuffled stream of training images."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Return the image index at each position (int64 [n], ascending): a function of (seed, position) alone."""
        indices = np.empty_like(positions)
        epochs = positions // self.num_images
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(self.seed, Stream.DATA_ORDER, epoch, self.num_images)
            indices[epochs == epoch] = self._order[positions[epochs == epoch] % self.num_images]
        return indices


_NUMPY_DTYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "I64": np.int64}


def _map_shard(path: Path) -> dict[str, np.ndarray]:
    """Memory-map every tensor of a safetensors file (an 8-byte length, a JSON header, then the raw values)."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    return {
        name: np.memmap(
            path, _NUMPY_DTYPES[entry["dtype"]], "r", 8 + header_bytes + entry["data_offsets"][0], tuple(entry["shape"])
        )
        for name, entry in header.items()
    }
