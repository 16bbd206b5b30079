"""Latent caches: contiguous memory-mapped shards and the `index.json` that describes them.

`index.json` holds {format, settings, num_classes, latent_shape, splits: {name: {num_images, shards: [{file, bytes,
sha256, count}]}}} and, where the autoencoder has files, {autoencoder_sha256: {file: sha256}, mirrors: whether each
image is stored twice, as it is and mirrored}. A shard is a safetensors file with `stored` [n,...] or [n,2,...] (what
the autoencoder keeps of an image), `labels` int64 [n] and `indices` int64 [n].
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.files import atomic_path, file_sha256, read_json, write_json
from mixflow.runtime.progress import log
from mixflow.runtime.seeds import Stream, permutation

FORMAT = "mixflow-latents-1"
VERIFIED = "verified.json"  # beside the index: {shard: {bytes, mtime_ns, sha256}} as they were when last hashed


def write_shard(path: Path, labels: np.ndarray, indices: np.ndarray, batches: Iterable[np.ndarray]) -> dict[str, Any]:
    """Write one shard from `labels`, `indices` [n] and batches of `stored` [b,...], b summing to n; return its entry.

    Only one batch is in memory at a time. An exception out of `batches` leaves no file behind.
    """
    sha256 = hashlib.sha256()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            sha256.update(data)

        rows = 0
        for batch in batches:
            if rows == 0:
                write(_shard_header(len(labels), batch))
                write(np.ascontiguousarray(indices, np.int64).data.cast("B"))
                write(np.ascontiguousarray(labels, np.int64).data.cast("B"))
            write(np.ascontiguousarray(batch).data.cast("B"))
            rows += len(batch)
        assert rows == len(labels), (rows, len(labels))
        size = file.tell()
    return {"file": path.name, "bytes": size, "sha256": sha256.hexdigest(), "count": len(labels)}


def shard_entry(path: Path, count: int) -> dict[str, Any]:
    """Return the entry of a shard that was written earlier."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "count": count}


class LatentSplit:
    """Random access to one split of a cache through memory maps; nothing is read before it is asked for."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]], mirrors: bool) -> None:
        self.paths = [folder / shard["file"] for shard in shards]
        self.mirrors = mirrors  # whether `stored` holds image and mirror image, [n,2,...]
        self._shards = [_Shard(path) for path in self.paths]
        self.labels = np.concatenate([shard.arrays["labels"] for shard in self._shards])
        self._starts = np.cumsum([0] + [len(shard.arrays["labels"]) for shard in self._shards])

    def __len__(self) -> int:
        return len(self.labels)

    def preload(self) -> threading.Thread | None:
        """Have the kernel read all shards from end to end, in the background, where half of the free memory holds them.

        Rows are then found in memory: reading in order is what a disk does best, and an epoch reads everything anyway.
        What is cached this way is given back as soon as anyone needs the memory. Returns the thread, None where the
        shards are too large or the system knows no such wish.
        """
        if not hasattr(os, "posix_fadvise"):  # Linux has it; elsewhere nothing is read ahead
            return None
        if sum(path.stat().st_size for path in self.paths) > _available_memory() // 2:
            return None

        def read() -> None:
            for path in self.paths:
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

        thread = threading.Thread(target=read, name="preload-latents", daemon=True)
        thread.start()
        return thread

    def gather(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Return (stored [n,...], labels [n]) of the given positions, in the order asked for.

        `mirrored` (bool [n]; None: none) asks for the mirror image instead: its own stored values where the cache has
        both, of which only the one asked for is read, else the flipped ones.
        """
        first = self._shards[0].arrays["stored"]
        stored = np.empty((len(indices), *first.shape[1 + self.mirrors :]), dtype=first.dtype)
        rows = np.asarray(indices, np.int64)
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        rows = rows - self._starts[shard_of]
        mirror = np.zeros(len(rows), np.int64) if mirrored is None else np.asarray(mirrored, np.int64)
        if self.mirrors:
            rows = 2 * rows + mirror
        groups = [(self._shards[shard], np.flatnonzero(shard_of == shard)) for shard in np.unique(shard_of)]
        for shard, chosen in groups:
            shard.will_need(rows[chosen], stored[0].nbytes)
        for shard, chosen in groups:
            stored[chosen] = shard.arrays["stored"].reshape(-1, *stored.shape[1:])[rows[chosen]]
        if not self.mirrors and mirror.any():
            stored[mirror > 0] = stored[mirror > 0][..., ::-1]
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
        self.mirrors: bool = self.index.get("mirrors", False)  # whether mirror images are stored too
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
        return UserError(
            f"latent shard '{path}' {what}: delete it and '{self.index_path}' and run the same command again, which "
            "makes only what is missing"
        )

    def verify(self) -> None:
        """Compare every shard with the SHA-256 in the index; a corrupted one is a `UserError` that names it.

        What was found right is remembered in `verified.json` with size and time, and hashed again when they change.
        """
        memory = self.index_path.parent / VERIFIED
        known = {}
        with contextlib.suppress(UserError):  # missing, or broken: then everything is hashed
            known = read_json(memory)
        facts = {}
        for shard in self._shards():
            status = (self.index_path.parent / shard["file"]).stat()
            facts[shard["file"]] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": shard["sha256"]}
        if facts == known:
            return
        doubtful = [name for name, fact in facts.items() if known.get(name) != fact]
        with ThreadPoolExecutor(max_workers=8) as pool:
            paths = [self.index_path.parent / name for name in doubtful]
            for path, found in zip(paths, pool.map(file_sha256, paths), strict=True):
                wanted = facts[path.name]["sha256"]
                if found != wanted:
                    raise self._broken(path, f"is corrupted (sha256 {found[:12]}… instead of {wanted[:12]}…)")
        try:
            write_json(memory, facts)
        except (UserError, OSError) as error:  # a cache that others share read-only
            log.info("every start hashes the latents again: %s", error)

    def check_autoencoder(self, autoencoder: dict[str, Any]) -> None:
        """Raise `UserError` unless the cache was made by the autoencoder of this resolved entry."""
        made = self.index["settings"]["autoencoder"]
        for key in ["kind", *sorted(made.keys() | autoencoder.keys())]:
            if made.get(key) != autoencoder.get(key):
                raise UserError(
                    f"the latents '{self.index_path}' were made with autoencoder {key} {made.get(key)!r}, not "
                    f"{autoencoder.get(key)!r} as now asked for: make them again with cache-latents, or undo the change"
                )

    def split(self, name: str) -> LatentSplit:
        """Open a split such as 'train' or 'held_out'."""
        if name not in self.index["splits"]:
            raise UserError(f"'{self.index_path}' has no split '{name}'" + did_you_mean(name, self.index["splits"]))
        shards = self.index["splits"][name]["shards"]
        return LatentSplit(self.index_path.parent, shards, self.mirrors)


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


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Prefetcher(Generic[Key, Value]):
    """Runs `fetch(key)` in a background thread for the keys that come next, so that their values are ready in time.

    `fetch` must depend on its key alone; it never runs twice at once. What is ahead is bounded by what the caller
    announces, an error surfaces where its value is asked for, and there is no state to save.
    """

    def __init__(self, fetch: Callable[[Key], Value]) -> None:
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._coming: dict[Key, Future[Value]] = {}

    def get(self, key: Key, *following: Key) -> Value:
        """Return `fetch(key)` and start on the `following` keys; announced ones that are not among them lapse."""
        value = self._coming.pop(key, None) or self._pool.submit(self._fetch, key)
        for lapsed in self._coming.keys() - set(following):
            self._coming.pop(lapsed).cancel()
        for later in following:
            if later not in self._coming:
                self._coming[later] = self._pool.submit(self._fetch, later)
        return value.result()

    def close(self) -> None:
        """Stop the thread. Not needed at the end of the program, which waits for the batch being fetched at most."""
        self._pool.shutdown(cancel_futures=True)


_NUMPY_DTYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "I64": np.int64}
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _NUMPY_DTYPES.items()}


def _available_memory() -> int:
    """Return the bytes that can be had without swapping, page cache that would give way included."""
    with open("/proc/meminfo", encoding="ascii") as file:
        (kibibytes,) = (line.split()[1] for line in file if line.startswith("MemAvailable:"))
    return 1024 * int(kibibytes)


def _shard_header(count: int, batch: np.ndarray) -> bytes:
    """Return the head of a safetensors file: an 8-byte length and a JSON header; the raw values follow."""
    header, at = {}, 0
    shapes = {"indices": ("I64", [count]), "labels": ("I64", [count])}
    shapes["stored"] = (_DTYPE_NAMES[batch.dtype], [count, *batch.shape[1:]])
    for name, (dtype, shape) in shapes.items():
        end = at + math.prod(shape) * np.dtype(_NUMPY_DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values are aligned
    return len(text).to_bytes(8, "little") + text


class _Shard:
    """A memory-mapped shard: `arrays` by name, without a copy."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        values = 8 + int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8:values])
        header.pop("__metadata__", None)
        self._start = values + header["stored"]["data_offsets"][0]
        self.arrays = {
            name: np.frombuffer(
                self._map,
                _NUMPY_DTYPES[entry["dtype"]],
                math.prod(entry["shape"]),
                values + entry["data_offsets"][0],
            ).reshape(entry["shape"])
            for name, entry in header.items()
        }

    def will_need(self, rows: np.ndarray, row_bytes: int) -> None:
        """Have the disk start on all these rows of `stored` at once, rather than on one when its turn comes."""
        for start in (self._start + rows * row_bytes).tolist():
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + row_bytes - page)
