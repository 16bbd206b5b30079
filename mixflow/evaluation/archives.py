"""Image arrays inside .npz files, read piece by piece: sample files and references are larger than memory."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from mixflow.runtime.errors import UserError

_LOCAL_HEADER = 30  # bytes, before name and extra field


class ImageArchive:
    """The images `arr_0`, uint8 [N,H,W,3], of an ADM-style .npz: memory-mapped if stored, else inflated on the way."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the headers alone. Raises `UserError` for a missing or cut file, or another kind of array."""
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._entry = archive.getinfo("arr_0.npy")
                with archive.open(self._entry) as member:
                    self.shape, is_fortran, dtype = _array_header(member)
                    self._offset = member.tell()
        except FileNotFoundError:
            raise UserError(f"'{path}' does not exist: make it first, or correct the path") from None
        except KeyError:
            raise UserError(f"'{path}' has no array arr_0: ADM-style files keep their images there") from None
        except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
            raise UserError(f"'{path}' is not a whole .npz file ({error}): make or fetch it again") from None
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or 0 in self.shape or is_fortran:
            raise UserError(
                f"arr_0 of '{path}' is {dtype} {list(self.shape)}{' in Fortran order' if is_fortran else ''}: it must "
                "be uint8 [N,H,W,3] in C order, with at least one image"
            )

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.shape[1], self.shape[2]

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """Yield all images in file order, `batch` at a time, as writable arrays."""
        if self._entry.compress_type == zipfile.ZIP_STORED:
            images = np.memmap(
                self.path, np.uint8, mode="r", offset=self._data_start() + self._offset, shape=self.shape
            )
            for start in range(0, len(self), batch):
                yield images[start : start + batch].copy()
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(self._entry) as member:
            member.read(self._offset)
            for start in range(0, len(self), batch):
                shape = (min(batch, len(self) - start), *self.shape[1:])
                data = member.read(int(np.prod(shape)))
                if len(data) != np.prod(shape):
                    raise UserError(f"'{self.path}' ends in the middle of arr_0: make or fetch it again")
                yield np.frombuffer(bytearray(data), np.uint8).reshape(shape)

    def _data_start(self) -> int:
        """Return where the member's bytes begin: its local header repeats the name, with an extra field of its own."""
        with open(self.path, "rb") as file:
            file.seek(self._entry.header_offset)
            name_length, extra_length = struct.unpack_from("<HH", file.read(_LOCAL_HEADER), 26)
        return self._entry.header_offset + _LOCAL_HEADER + name_length + extra_length


def read_statistics(path: str | os.PathLike[str], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the float64 arrays `names` of an .npz. Raises `UserError` for a missing one or one of Python objects."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name].astype(np.float64) for name in names}
    except KeyError as error:
        raise UserError(
            f"'{path}' lacks {error.args[0]}, so it is no ADM reference ({', '.join(names)} and arr_0): "
            "give VIRTUAL_imagenet256_labeled.npz or its like"
        ) from None
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"the statistics in '{path}' cannot be read ({error}): fetch the file again") from None


def _array_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)
