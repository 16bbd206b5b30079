"""ImageNet as it is unpacked: one folder of images per class, read one by one and centre-cropped as ADM does."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from mixflow.runtime.errors import UserError

ENDINGS = (".jpeg", ".jpg", ".png")
MAX_NAMED = 3  # classes in an error


class ImageNet:
    """The images `{folder}/train/{class}/{image}` with their labels; pixels are read only when asked for.

    Class ids are the ranks of the sorted folder names, and images are sorted by name within their class: position and
    label of an image depend on the names alone.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: str | os.PathLike[str], resolution: int, num_classes: int, num_images: int) -> None:
        """List the folder; nothing is opened. Raises `UserError` that names everything that is not as expected."""
        self.folder = Path(folder).expanduser() / "train"
        self.shape = (resolution, resolution, 3)
        classes = _list_classes(self.folder)
        _check_complete(self.folder, classes, num_classes, num_images)
        self.names = [f"{name}/{file}" for name, files in classes.items() for file in files]
        counts = [len(files) for files in classes.values()]
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self.indices = np.arange(len(self.names), dtype=np.int64)

    def read(self, position: int, out: np.ndarray) -> None:
        """Write the cropped image at `position` into `out`, uint8 [R,R,3]. Raises whatever Pillow says of its file."""
        # As the peers' loaders: grey, palette and CMYK images become RGB, and EXIF rotation is not applied.
        with Image.open(self.folder / self.names[position]) as image:
            out[:] = center_crop(image.convert("RGB"), self.shape[0])

    def name(self, position: int) -> str:
        """Return the file of an image as people look for it."""
        return str(self.folder / self.names[position])

    def fingerprint(self, start: int, stop: int) -> str:
        """Return a hash of which images, with which labels, stand at these positions."""
        text = "\n".join(self.names[start:stop]).encode("utf-8", "surrogateescape")
        return hashlib.sha256(text + self.labels[start:stop].tobytes()).hexdigest()


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return the central square of an image at `size` x `size` pixels: uint8 [size,size,C].

    ADM's rule (Dhariwal and Nichol, 2021), on which every published ImageNet FID rests: halve with a box filter while
    the shorter side is at least twice the size, then bicubic to the size, then crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _list_classes(folder: Path) -> dict[str, list[str]]:
    """Return the sorted image names of each class folder, classes sorted too."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"the training images '{folder}' cannot be listed ({error.strerror}): set the dataset's folder to the one "
            "that holds train/, with one folder of images per class in it"
        ) from None
    return {
        name: sorted(
            file for file in os.listdir(folder / name) if file.lower().endswith(ENDINGS) and not file.startswith(".")
        )
        for name in names
    }


def _check_complete(folder: Path, classes: dict[str, list[str]], num_classes: int, num_images: int) -> None:
    found = sum(len(files) for files in classes.values())
    empty = [name for name, files in classes.items() if not files]
    if (len(classes), found) == (num_classes, num_images) and not empty:
        return
    wrong = []
    if len(classes) != num_classes:
        wrong.append(f"{len(classes):,} class folders instead of {num_classes:,}")
    if found != num_images:
        wrong.append(f"{found:,} images instead of {num_images:,}")
    if empty:
        wrong.append(f"no image in {_some(empty)}")
    short = sorted((name for name in classes if classes[name]), key=lambda name: len(classes[name]))
    if found < num_images and short:
        wrong.append("fewest in " + ", ".join(f"{name} ({len(classes[name]):,})" for name in short[:MAX_NAMED]))
    fix = "unpack what is missing" if found <= num_images and len(classes) <= num_classes else "remove what is too much"
    raise UserError(f"'{folder}' has {'; '.join(wrong)}: {fix}, or correct num_classes and num_images of the dataset")


def _some(names: list[str]) -> str:
    """Name the first few."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")
