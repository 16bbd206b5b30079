"""Image datasets: uint8 pixels, class labels, and the split into training and held-out images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mixflow.runtime.seeds import Stream, permutation


@dataclass(frozen=True)
class ImageSet:
    """Images of one split."""

    images: np.ndarray  # uint8 [N,H,W,C]
    labels: np.ndarray  # int64 [N]
    indices: np.ndarray  # int64 [N], position in the whole dataset


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
