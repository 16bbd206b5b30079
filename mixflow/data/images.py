"""Datasets: uint8 pixels, class labels, and the split into training and held-out images; draws of a Gaussian."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from mixflow.runtime.seeds import Stream, normal, permutation

NUMBERS_AT_A_TIME = 2**20  # drawn, for the generator's words take several times their memory


class Images(Protocol):
    """One split of a dataset: everything about its images but the pixels, which are read one image at a time."""

    @property
    def labels(self) -> np.ndarray:
        """Class of every image, int64 [N]."""
        ...

    @property
    def indices(self) -> np.ndarray:
        """Position of every image in the whole dataset, int64 [N]."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """What images are made of: uint8, or float32 of a dataset that holds no pixels."""
        ...

    def read(self, position: int, out: np.ndarray) -> None:
        """Write the image at `position` into `out`, [H,W,C]; raises an exception where it cannot be read."""
        ...

    def name(self, position: int) -> str:
        """Return what to call an image in messages."""
        ...

    def fingerprint(self, start: int, stop: int) -> str | None:
        """Return a hash of which images stand at these positions, None where the settings alone decide that."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, all in memory."""

    images: np.ndarray  # uint8 [N,H,W,C], or float32 where they are no pixels
    labels: np.ndarray  # int64 [N]
    indices: np.ndarray  # int64 [N], position in the whole dataset

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.images.dtype

    def read(self, position: int, out: np.ndarray) -> None:
        out[:] = self.images[position]

    def name(self, position: int) -> str:
        return f"image {self.indices[position]}"

    def fingerprint(self, start: int, stop: int) -> None:
        return None


def read_ahead(
    batches: Sequence[tuple[Images, range]],
    buffers: tuple[np.ndarray, np.ndarray],  # [B,H,W,C] each
    num_threads: int,
) -> Generator[tuple[np.ndarray, dict[str, str]]]:
    """Yield (pixels [b,H,W,C], {unreadable image: reason}) of each batch of positions, in order.

    The next batch is read in threads (Pillow decodes without holding the interpreter) while the caller works on this
    one. Both live in the two buffers, so that no third batch is ever in memory: pixels are valid until the next one.
    """

    def read(images: Images, position: int, out: np.ndarray) -> str | None:
        try:
            images.read(position, out)
        except Exception as error:  # broken image files make Pillow raise almost anything
            return " ".join(f"{type(error).__name__}: {error}".split())
        return None

    with ThreadPoolExecutor(num_threads, thread_name_prefix="read-images") as pool:

        def start(number: int) -> list[Future[str | None]]:
            images, positions = batches[number]
            buffer = buffers[number % 2]
            return [pool.submit(read, images, position, buffer[row]) for row, position in enumerate(positions)]

        try:
            coming = start(0) if batches else []
            for number, (images, positions) in enumerate(batches):
                reading, coming = coming, start(number + 1) if number + 1 < len(batches) else []
                reasons = [future.result() for future in reading]
                broken = {images.name(at): reason for at, reason in zip(positions, reasons, strict=True) if reason}
                yield buffers[number % 2][: len(positions)], broken
        finally:
            pool.shutdown(cancel_futures=True)  # also where the caller stops early


def load_digits(resolution: int, num_held_out: int, seed: int) -> dict[str, ImageSet]:
    """Return scikit-learn's handwritten digits as {"train": ..., "held_out": ...}.

    The 1,797 grey images of 8x8 with 17 grey levels are scaled to 0..255 and enlarged to `resolution` with Pillow's
    bicubic filter. Which images are held out depends on `seed` alone; both splits keep the dataset's order.
    """
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    grey = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    size = (resolution, resolution)
    images = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in grey])
    held_out = np.zeros(len(images), dtype=bool)
    held_out[permutation(seed, Stream.SPLIT, 0, len(images))[:num_held_out]] = True
    return {
        name: ImageSet(images[chosen][..., None], labels[chosen].astype(np.int64), np.flatnonzero(chosen))
        for name, chosen in (("train", ~held_out), ("held_out", held_out))
    }


def draw_gaussian(
    variances: np.ndarray,  # [channels * resolution^2], in the order of a flattened [C,H,W]
    channels: int,
    resolution: int,
    num_images: int,
    seed: int,
) -> dict[str, ImageSet]:
    """Return {"train": draws of N(0, diag(variances))}, float32, of class 0; draw i depends on (seed, i) alone."""
    shape = (channels, resolution, resolution)
    std = torch.from_numpy(np.sqrt(variances)).reshape(shape).to(torch.float32)
    draws = np.empty((num_images, resolution, resolution, channels), np.float32)
    block = max(1, NUMBERS_AT_A_TIME // std.numel())
    for start in range(0, num_images, block):
        indices = torch.arange(start, min(start + block, num_images))
        drawn = std * normal(seed, Stream.DATA, 0, indices, shape)
        draws[start : start + len(indices)] = drawn.permute(0, 2, 3, 1).numpy()
    return {"train": ImageSet(draws, np.zeros(num_images, np.int64), np.arange(num_images, dtype=np.int64))}
