"""Images to be measured, out of .npz files and folders, read piece by piece: sets of them are larger than memory."""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
import threading
import tokenize
import zipfile
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np
from PIL import Image

from mixflow.runtime.errors import UserError
from mixflow.runtime.files import file_sha256

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_LOSSY = (".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # what Pillow may take a file for, whatever its name says
_PNG = b"\x89PNG\r\n\x1a\n"  # how such files begin; byte 24 is the number of bits per channel
_THREADS = 8  # at most, for decoding and hashing, which both let go of the interpreter
_AHEAD = 3  # batches read before they are asked for
_LOCAL_HEADER = 30  # bytes of a zip member's header, before name and extra field

# What zipfile and NumPy raise for files that are cut, damaged, encrypted, or something else altogether.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, EOFError, OSError),
    *(ValueError, TypeError, SyntaxError, RuntimeError, OverflowError),
)


class ImageArchive:
    """The images `arr_0`, [N,H,W,3], of an ADM-style .npz: memory-mapped if stored, else inflated on the way.

    They are uint8, or of another type if every value is a whole number of 0 to 255, which is checked as it is read.
    Nothing is ever unpickled. `labels` is `arr_1` if that is one integer per image; `notes` tells what is odd.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read headers and labels alone. Raises `UserError` for a missing or cut file, or another kind of array."""
        self.path = Path(path)
        self.labels: np.ndarray | None = None  # int64 [N]
        self.notes: list[str] = []
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                images = _Member(archive, self.path, "arr_0") if "arr_0.npy" in archive.namelist() else None
                labels = _Member(archive, self.path, "arr_1") if "arr_1.npy" in archive.namelist() else None
        except _DAMAGE as error:
            raise UserError(_why_no_archive(self.path, error)) from None
        if images is None:
            raise UserError(_why_no_images(self.path, names))
        _check_layout(self.path, images)
        self._images = images
        if images.dtype != np.uint8:
            waste = f", and takes {images.dtype.itemsize} times the disk" if images.dtype.itemsize > 1 else ""
            self.notes.append(
                f"arr_0 of '{path}' is {images.dtype}: it is read as uint8, so that every value must be a whole number "
                f"of 0 to 255{waste}: write uint8"
            )
        if labels is not None:
            if np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(self),):
                self.labels = self._read(labels, 0, len(self)).astype(np.int64)
            else:
                self.notes.append(
                    f"arr_1 of '{path}' is {labels.dtype} {list(labels.shape)} and ignored: labels are one integer for "
                    f"each of the {len(self):,} images"
                )
        if "mu" in names:
            self.notes.append(
                f"'{path}' holds statistics (mu) beside its images: OpenAI's evaluator would take those in place of "
                "the images, while here the images count"
            )

    def __len__(self) -> int:
        return self._images.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._images.shape[1], self._images.shape[2]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return images `start` ... `stop` - 1, uint8 [b,H,W,3], writable. Raises `UserError` for damage.

        What is inflated can only be read onwards: to go back means to begin anew.
        """
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        rows = self._read(self._images, start, stop)
        return rows if rows.dtype == np.uint8 else self._as_bytes(rows, start)

    def sha256(self) -> str:
        """Return the SHA-256 of the file."""
        return file_sha256(self.path)

    def _read(self, member: _Member, start: int, stop: int) -> np.ndarray:
        try:
            return member.read(start, stop)
        except _DAMAGE as error:
            raise UserError(f"'{self.path}' is damaged ({_reason(error)}): make or fetch it again") from None

    def _as_bytes(self, rows: np.ndarray, start: int) -> np.ndarray:
        """Return `rows` [b,H,W,3] as uint8. Raises `UserError` that names the first image with any other value."""
        with np.errstate(invalid="ignore"):  # whatever NaN and large numbers become, it is not what they were
            pixels = rows.astype(np.uint8)
        is_same = (pixels == rows).reshape(len(rows), -1).all(axis=1)
        if is_same.all():
            return pixels
        bad = int(np.argmin(is_same))
        image, name = rows[bad], f"image {start + bad} of '{self.path}'"
        if not np.isfinite(image).all():
            raise UserError(f"{name} holds NaN or infinity: find out why, and make the file again without such images")
        low, high = image.min(), image.max()
        found = f"{name} has {rows.dtype} values from {low:g} to {high:g}"
        lowest = np.nanmin(rows)  # of the batch: a bright image alone may have no value below 0
        if lowest >= -2 and high <= 2:  # models overshoot -1..1 and 0..1 somewhat
            if lowest < 0:
                raise UserError(f"{found}, as if -1 were black and 1 white: write uint8, clamp(127.5 x + 128, 0, 255)")
            raise UserError(f"{found}, as if 0 were black and 1 white: write uint8, clamp(255 x + 0.5, 0, 255)")
        if low >= 0 and high <= 255:
            raise UserError(f"{found}, not all of them whole numbers: write uint8, clamp(x + 0.5, 0, 255)")
        raise UserError(f"{found} where 0 to 255 is meant: scale or clamp them, and write uint8")


class ImageFolder:
    """The images in a folder and the folders in it, in natural order of their relative paths: 10.png follows 9.png.

    The order counts: the Inception score is taken over chunks of consecutive images. Names that begin with a dot are
    left out. Grey, palette and CMYK images become RGB as Pillow's `convert` makes them, which is what other
    evaluators see; EXIF rotation and colour profiles are not applied. `labels` are the ranks of the folders directly
    inside, if there are several and every image lies in one, else None; `notes` tells what is odd.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """List the folder and read the first header. Raises `UserError` without images, or if it cannot be listed."""
        self.path = Path(path)
        self.notes: list[str] = []
        files = list(_list_files(self.path, "", ()))
        self._names = sorted((name for name in files if name.lower().endswith(ENDINGS)), key=_natural)
        if not self._names:
            archives = sorted(name for name in files if name.endswith(".npz"))
            hint = f", but '{archives[0]}': name that file" if archives else ": name the folder that holds the images"
            raise UserError(f"the folder '{path}' holds no image ({', '.join(ENDINGS)}){hint}")
        self.size = self._header_size(self._names[0])  # height and width in pixels
        self.labels = self._folder_ranks()  # int64 [N]
        if lossy := sum(name.lower().endswith(_LOSSY) for name in self._names):
            self.notes.append(
                f"{lossy:,} of the {len(self):,} images in '{path}' are JPEG or WebP, and lossy compression moves FID: "
                "write PNG files or one .npz"
            )

    def __len__(self) -> int:
        return len(self._names)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return images `start` ... `stop` - 1, uint8 [b,H,W,3]. Raises `UserError` that names an unusable file."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        images = np.empty((stop - start, *self.size, 3), np.uint8)

        def decode(row: int) -> None:
            images[row] = self._pixels(self.path / self._names[start + row])

        with ThreadPoolExecutor(_num_threads(), thread_name_prefix="decode") as pool:
            deque(pool.map(decode, range(stop - start)), maxlen=0)  # raises what the first unusable image raised
        return images

    def sha256(self) -> str:
        """Return the SHA-256 over the files' relative paths and SHA-256, in order, as `sha256sum` lists them."""
        whole = hashlib.sha256()
        try:
            with ThreadPoolExecutor(_num_threads(), thread_name_prefix="hash") as pool:
                hashes = pool.map(file_sha256, [self.path / name for name in self._names])
                for name, found in zip(self._names, hashes, strict=True):
                    whole.update(f"{found}  {name}\n".encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise _unreadable(Path(error.filename), error) from None
        return whole.hexdigest()

    def _header_size(self, name: str) -> tuple[int, int]:
        try:
            with Image.open(self.path / name, formats=_FORMATS) as image:
                return image.height, image.width
        except Exception as error:  # broken image files make Pillow raise almost anything
            raise _unreadable(self.path / name, error) from None

    def _folder_ranks(self) -> np.ndarray | None:
        folders = [name.split("/")[0] if "/" in name else "" for name in self._names]
        ranks = {folder: rank for rank, folder in enumerate(sorted(set(folders), key=_natural))}
        if "" in ranks or len(ranks) == 1:
            return None
        self.notes.append(
            f"the {len(ranks):,} folders in '{self.path}' ({folders[0]} ... {folders[-1]}) are taken for the labels of "
            "its images"
        )
        return np.array([ranks[folder] for folder in folders], np.int64)

    def _pixels(self, path: Path) -> np.ndarray:
        """Return one image, uint8 [H,W,3]."""
        try:
            with open(path, "rb") as file:
                header = file.read(25)
                with Image.open(file, formats=_FORMATS) as image:
                    found = f"'{path}' is an image of {image.width}x{image.height} pixels"
                    if (image.height, image.width) != self.size:
                        raise UserError(
                            f"{found} where '{self._names[0]}' has {self.size[1]}x{self.size[0]}: bring all to "
                            "one size before they are measured"
                        )
                    # The file tells best: Pillow silently cuts 16-bit colours to their upper 8 bits.
                    if image.mode.startswith("I") or (header.startswith(_PNG) and header[24] == 16):
                        raise UserError(f"{found} with 16 bits per channel: write 8 bits, which is what metrics read")
                    if "A" in image.getbands() or "transparency" in image.info:
                        alpha = image.convert("RGBA").getchannel("A")
                        if alpha.getextrema()[0] != 255:
                            raise UserError(
                                f"{found}, some of which are transparent, and what is behind is unknown: write it on "
                                "the background that is meant, without an alpha channel"
                            )
                    return np.asarray(image.convert("RGB"))
        except UserError:
            raise
        except Exception as error:  # broken image files make Pillow raise almost anything
            raise _unreadable(path, error) from None


ImageSource = ImageArchive | ImageFolder


def open_images(path: str | os.PathLike[str]) -> ImageSource:
    """Open an .npz file or a folder of images. Raises `UserError` for anything else."""
    return ImageFolder(path) if os.path.isdir(path) else ImageArchive(path)


class Batch(NamedTuple):
    """Consecutive images, and what later checks want to know of each."""

    start: int  # position of the first
    pixels: np.ndarray  # uint8 [b,H,W,3], writable
    digests: np.ndarray  # uint64 [b], hashes of the pixels
    # Smallest and largest byte of each image, read as signed: what becomes of -1 in a cast is -1 again and not 255.
    low: np.ndarray  # int8 [b]
    high: np.ndarray  # int8 [b]


class Readable(Protocol):
    """Images that can be read in pieces."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return images `start` ... `stop` - 1, uint8 [b,H,W,3]."""
        ...


def read_ahead(images: Readable, spans: Iterable[tuple[int, int]]) -> Generator[Batch, None, None]:
    """Yield the images [start, stop) of every span, in the order of the spans.

    The next few batches are read, hashed and looked at in the background while the caller works on this one. Errors
    surface where their batch would have come. A caller that stops early stops the threads, with `close()` or by
    letting go of the iterator.
    """
    with (
        ThreadPoolExecutor(1, thread_name_prefix="read-images") as reader,  # one: inflating goes only forward
        ThreadPoolExecutor(_num_threads(), thread_name_prefix="hash-images") as pool,
    ):

        def load(start: int, stop: int) -> Batch:
            pixels = images.read(start, stop)
            digests, low, high = zip(*pool.map(_facts, pixels), strict=True)
            return Batch(start, pixels, np.array(digests, np.uint64), np.array(low, np.int8), np.array(high, np.int8))

        coming: deque[Future[Batch]] = deque()
        try:
            for span in spans:
                coming.append(reader.submit(load, *span))
                if len(coming) > _AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            reader.shutdown(cancel_futures=True)


def _facts(image: np.ndarray) -> tuple[int, int, int]:
    """Return digest, and smallest and largest byte read as signed, of pixels uint8 [H,W,3]."""
    signed: np.ndarray = image.view(np.int8)
    digest = hashlib.blake2b(image.data, digest_size=8).digest()
    return int.from_bytes(digest, "little"), int(signed.min()), int(signed.max())


def _num_threads() -> int:
    return min(_THREADS, len(os.sched_getaffinity(0)))


class _Member:
    """An array in an .npz: what it is, where it lies, and its rows. Raises what `_DAMAGE` lists."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, name: str) -> None:
        """Read the headers, and check that the bytes they speak of are there."""
        self._path, self._entry = path, archive.getinfo(f"{name}.npy")
        self._stream: IO[bytes] | None = None
        self._lock = threading.Lock()  # of the stream
        with archive.open(self._entry) as member:
            version = np.lib.format.read_magic(member)
            if version > (3, 0):
                raise ValueError(f"{name} has version {version[0]}.{version[1]} of the .npy format, which is not known")
            # Versions 2.0 and 3.0 differ in the encoding of field names, which no array of numbers has.
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, self.is_fortran, self.dtype = read(member)
            self._header_bytes = member.tell()
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        # The local header repeats the name, with an extra field of its own.
        with open(path, "rb") as file:
            file.seek(self._entry.header_offset)
            name_bytes, extra_bytes = struct.unpack_from("<HH", file.read(_LOCAL_HEADER), 26)
        self._start = self._entry.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes  # where its bytes begin
        if self.dtype.hasobject:
            return  # of unknown size, and refused anyway
        needed = self._header_bytes + math.prod(self.shape[:1]) * self._row_bytes
        if self._entry.file_size != needed:
            raise EOFError(f"{name} has {self._entry.file_size:,} bytes where its header says {needed:,}")
        if self._start + self._entry.compress_size > path.stat().st_size:
            raise EOFError(f"the file ends in the middle of {name}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` ... `stop` - 1 as a writable array."""
        shape, offset = (stop - start, *self.shape[1:]), self._header_bytes + start * self._row_bytes
        if self._entry.compress_type == zipfile.ZIP_STORED:
            # Mapped anew for every piece: the pages of a map that stays count as memory of this process.
            return np.array(np.memmap(self._path, self.dtype, mode="r", offset=self._start + offset, shape=shape))
        with self._lock:
            if self._stream is None:
                self._stream = zipfile.ZipFile(self._path).open(self._entry)  # noqa: SIM115 (stays open)
            self._stream.seek(offset)  # inflates what lies between; to go back it begins anew
            data = bytearray(self._stream.read((stop - start) * self._row_bytes))
            if stop == self.shape[0]:
                self._stream.read(1)  # finds the end, where zipfile compares the checksum
        return np.frombuffer(data, self.dtype).reshape(shape)


def _check_layout(path: Path, images: _Member) -> None:
    """Raise `UserError` unless images are numbers [N,H,W,3] in C order."""
    shape, dtype = images.shape, images.dtype
    found = f"arr_0 of '{path}' is {dtype} {list(shape)}"
    if dtype.hasobject:
        raise UserError(
            f"{found}, pickled Python objects, which are never loaded because they can run any program: write one "
            "uint8 array [N,H,W,3]"
        )
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise UserError(f"{found}, which are no pixels: write uint8 [N,H,W,3] with values of 0 to 255")
    if 0 in shape:
        raise UserError(f"{found} and so holds no image: make it again with at least one")
    if len(shape) == 4 and shape[3] == 3:
        if not images.is_fortran:
            return
        fix = "write numpy.ascontiguousarray(images)"
    elif len(shape) == 4 and shape[1] == 3:
        fix = "channels come last, so write images.transpose(0, 2, 3, 1)"
    elif len(shape) == 4 and shape[3] == 1:
        fix = "grey images need three equal channels, so write numpy.repeat(images, 3, axis=3)"
    elif len(shape) == 4 and shape[3] == 4:
        fix = "there is no room for an alpha channel, so write images[..., :3]"
    elif len(shape) == 3 and shape[2] == 3:
        fix = "a single image needs an axis in front, so write images[None]"
    elif len(shape) == 3:
        fix = "grey images need three equal channels, so write numpy.repeat(images[..., None], 3, axis=3)"
    else:
        fix = "write images as uint8 [N,H,W,3]"
    order = " in Fortran order" if images.is_fortran else ""
    raise UserError(f"{found}{order} where [N,H,W,3] in C order is needed: {fix}")


def _why_no_archive(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"'{path}' does not exist: make it first, or correct the path"
    if isinstance(error, OSError) and error.strerror:
        return f"'{path}' cannot be read ({error.strerror}): mend that, or name another file"
    with open(path, "rb") as file:
        first = file.read(6)
    if not first:
        return f"'{path}' is empty: make or fetch it again"
    if first.startswith(b"PK\3\4"):
        return f"'{path}' is cut off or damaged ({_reason(error)}): make or fetch it again"
    if first.startswith(b"\x93NUMPY"):
        return f"'{path}' is a .npy file where an .npz is needed: write numpy.savez(path, arr_0=images)"
    if first.startswith(b"\x80"):
        return (
            f"'{path}' is a Python pickle, which is never loaded because it can run any program: write "
            "numpy.savez(path, arr_0=images)"
        )
    if path.name.lower().endswith(ENDINGS):
        return f"'{path}' is a single image: name the folder of the images to measure"
    return f"'{path}' is neither a folder of images nor an .npz file: name one that is, or make this one again"


def _why_no_images(path: Path, names: set[str]) -> str:
    if any(name.lower().endswith(ENDINGS) for name in names):
        return f"'{path}' is a zip file of images: unpack it and name the folder"
    held = ", ".join(sorted(names)[:5]) + (" and more" if len(names) > 5 else "")
    return (
        f"'{path}' has no array arr_0, where ADM-style files keep their images (it holds {held or 'nothing'}): write "
        "numpy.savez(path, arr_0=images)"
    )


def _list_files(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths of all files under `folder`, links to folders followed, as `prefix` and what comes below."""
    here = os.path.realpath(folder)
    if here in above:
        raise UserError(f"'{folder}' is a link to a folder that it lies in: remove the link")
    try:
        with os.scandir(folder) as entries:
            visible = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"the folder '{folder}' cannot be listed ({error.strerror}): make it readable") from None
    for name, is_folder in visible:
        if is_folder:
            yield from _list_files(folder / name, f"{prefix}{name}/", (*above, here))
        else:
            yield prefix + name


def _natural(name: str) -> tuple[list[list[int | str]], str]:
    """Return a key that sorts numbers inside of names by their value; equal ones (1.png, 01.png) as text."""
    parts = (re.split(r"([0-9]+)", part) for part in name.split("/"))  # text, digits, text, ...
    return [[int(text) if i % 2 else text for i, text in enumerate(part)] for part in parts], name


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"'{path}' cannot be read as an image ({_reason(error)}): make it again")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
