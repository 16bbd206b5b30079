"""What a network sees in a set of images, made in parts that survive a kill and that any number of processes share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixflow.evaluation.images import Batch, read_ahead
from mixflow.evaluation.moments import Moments
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path

# Batches are counted from the first image of the file and parts are whole batches, so that an image meets the same
# neighbours however many processes there are and wherever one of them was killed: the features are equal to the bit.
BATCH = 64
ROWS_PART = 4 * BATCH  # images, 5 MB of Inception features
MOMENTS_PART = 256 * BATCH  # images, 66 MB of float64 sums
_ROWS_AT_ONCE = 8  # batches whose moments are taken together: float64 products of few rows are slow

See = Callable[[np.ndarray], dict[str, Tensor]]  # uint8 [B,H,W,3] -> features by name, float32 [B,d], on one device


class Source(Protocol):
    """Images in a fixed order: a sample file, a folder, or a cache."""

    path: Path

    def __len__(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return uint8 [stop - start, H, W, 3]."""


class Parts:
    """One safetensors file per part in `folder`, each whole or absent."""

    def __init__(self, folder: Path, num_images: int, part: int) -> None:
        self.folder, self.num_images, self.part = folder, num_images, part

    def starts(self) -> list[int]:
        """Return the first image of each part."""
        return list(range(0, self.num_images, self.part))

    def missing(self) -> list[int]:
        """Return the first image of each part that is not there yet."""
        return [start for start in self.starts() if not self._path(start).exists()]

    def end(self, start: int) -> int:
        """Return the image after the last of a part."""
        return min(start + self.part, self.num_images)

    def write(self, start: int, tensors: dict[str, Tensor]) -> None:
        """Write a part, atomically."""
        with atomic_path(self._path(start)) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    def read(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor of every part, in order. `UserError` for a damaged part."""
        for start in self.starts():
            path = self._path(start)
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    yield file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"'{path}' cannot be read ({error}): delete '{self.folder}' and run again") from None

    def rows(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Return the features [N,d] of all images, in file order."""
        whole = None
        done = 0
        for part in self.read(name):  # filled in place: never twice in memory
            if whole is None:
                whole = torch.empty(self.num_images, *part.shape[1:], dtype=part.dtype, device=device)
            whole[done : done + len(part)] = part
            done += len(part)
        assert whole is not None
        assert done == self.num_images
        return whole

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:09d}.safetensors"


class Rows:
    """Collects the features of a part themselves, beside what checks ask of its pixels."""

    def __init__(self) -> None:
        self._features: list[dict[str, Tensor]] = []
        self._pixels: list[dict[str, np.ndarray]] = []

    def add(self, features: dict[str, Tensor], batch: Batch) -> None:
        """Take what was seen in a batch."""
        self._features.append(features)
        # Safetensors of old torch know no uint64.
        self._pixels.append({"digests": batch.digests.view(np.int64), "low": batch.low, "high": batch.high})

    def tensors(self) -> dict[str, Tensor]:
        """Return features by name [n,d] float32, and of the pixels digests [n] int64, low and high [n] int8."""
        whole = {name: torch.cat([one[name] for one in self._features]) for name in self._features[0]}
        pixels = {name: np.concatenate([one[name] for one in self._pixels]) for name in self._pixels[0]}
        return {**whole, **{name: torch.from_numpy(array) for name, array in pixels.items()}}


class Sums:
    """Collects the moments of a part, and the features of some of its images: for sets too large to keep."""

    def __init__(self, names: Sequence[str], kept_of: str, kept: np.ndarray) -> None:
        """Moments of the features `names`; rows of `kept_of` for the images `kept`, sorted indices [K]."""
        self.names, self.kept_of, self.kept = names, kept_of, kept
        self._waiting: dict[str, list[Tensor]] = {name: [] for name in names}
        self._moments: dict[str, Moments] = {}
        self._rows: list[Tensor] = []

    def add(self, features: dict[str, Tensor], batch: Batch) -> None:
        """Take what was seen in a batch."""
        first, last = batch.start, batch.start + len(batch.pixels)
        mine = self.kept[np.searchsorted(self.kept, first) : np.searchsorted(self.kept, last)] - first
        rows = features[self.kept_of]
        self._rows.append(rows[torch.from_numpy(mine).to(rows.device, non_blocking=True)])
        for name in self.names:
            self._waiting[name].append(features[name])
        if len(self._waiting[self.names[0]]) == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        for name, waiting in self._waiting.items():
            if waiting:
                rows = torch.cat(waiting)
                if name not in self._moments:
                    self._moments[name] = Moments(rows.shape[1], rows.device)
                self._moments[name].update(rows)
                waiting.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Return {feature}.n, .sum and .outer as `Moments.state` gives them, and kept [k,d]."""
        self._flush()
        states = {f"{name}.{key}": x for name in self.names for key, x in self._moments[name].state().items()}
        return {**states, "kept": torch.cat(self._rows)}


def look(
    images: Source,
    see: See,
    parts: Parts,
    starts: Sequence[int],  # the parts to make
    collector: Callable[[], Rows | Sums],
    *,
    should_stop: Callable[[], object],  # asked between two parts
    advance: Callable[[int], None],  # told of every batch's number of images
) -> None:
    """Make parts one after the other. Raises `UserError` for damaged images, with the finished parts kept."""
    spans = [
        (first, min(first + BATCH, parts.end(start)))
        for start in starts
        for first in range(start, parts.end(start), BATCH)
    ]
    collected = collector()
    waiting: tuple[int, Rows | Sums] | None = None
    with contextlib.closing(read_ahead(images, spans)) as batches:
        for batch in batches:
            # Queued before the part before it is written, so that the device has work meanwhile.
            features = see(batch.pixels)
            if waiting is not None:
                parts.write(waiting[0], waiting[1].tensors())
                waiting = None
                if should_stop():
                    return
            collected.add(features, batch)
            last = batch.start + len(batch.pixels)
            advance(len(batch.pixels))
            if last % parts.part == 0 or last == parts.num_images:
                waiting, collected = ((last - 1) // parts.part * parts.part, collected), collector()
    if waiting is not None:
        parts.write(waiting[0], waiting[1].tensors())


def total_moments(parts: Parts, name: str) -> tuple[Tensor, Tensor, int]:
    """Return mean [d], covariance [d,d] (float64, ddof 1) and number of images of a feature, from parts of sums."""
    total: Moments | None = None
    for n, first, outer in zip(*(parts.read(f"{name}.{key}") for key in ("n", "sum", "outer")), strict=True):
        moments = Moments.from_state({"n": n, "sum": first, "outer": outer})
        if total is None:
            total = moments
        else:
            total.merge(moments)
    assert total is not None
    return total.mean, total.covariance, total.n
