"""An ADM-style `.npz` written where it will stay: by rows, by several processes, resumable, never held in memory."""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mixflow.runtime.files import atomic_path, write_errors

ALIGNMENT = 64  # bytes; where values start in the archive, so that a memory map of a member is aligned
READ_BYTES = 1 << 24

# Little-endian records of the ZIP format (PKWARE APPNOTE 6.3). Sizes are always those of Zip64, small files included,
# so that there is one layout; the date is fixed (1980-01-01), so that equal contents give equal bytes.
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
_ZIP64_END = struct.Struct("<4sQ2H2I4Q")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_ZIP64_VERSION, _STORED, _DATE, _IN_ZIP64 = 45, 0, (1 << 5) | 1, 0xFFFFFFFF
_ZIP64_EXTRA, _PADDING_EXTRA = 0x0001, 0xD935  # the second is what Android's zipalign uses


class _Member:
    """Where one array lies: local header at `start`, `.npy` header at `npy`, values from `values` to `end`."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, start: int) -> None:
        self.name, self.shape, self.dtype, self.start = f"{name}.npy".encode("ascii"), shape, dtype, start
        header = io.BytesIO()
        description = np.lib.format.header_data_from_array_1_0(np.empty((0, *shape[1:]), dtype))
        np.lib.format.write_array_header_1_0(header, {**description, "shape": shape})
        self.header = header.getvalue()  # its length is a multiple of 64
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        unpadded = start + _LOCAL_HEADER.size + len(self.name) + 20 + 4
        self.padding = -unpadded % ALIGNMENT
        self.npy = unpadded + self.padding
        self.values = self.npy + len(self.header)
        self.end = self.values + shape[0] * self.row_bytes

    @property
    def size(self) -> int:
        return self.end - self.npy

    def local_header(self, crc: int) -> bytes:
        extra = struct.pack("<2H2Q", _ZIP64_EXTRA, 16, self.size, self.size)
        extra += struct.pack("<2H", _PADDING_EXTRA, self.padding) + bytes(self.padding)
        sizes = (crc, _IN_ZIP64, _IN_ZIP64, len(self.name), len(extra))
        return _LOCAL_HEADER.pack(b"PK\3\4", _ZIP64_VERSION, 0, _STORED, 0, _DATE, *sizes) + self.name + extra

    def central_header(self, crc: int) -> bytes:
        extra = struct.pack("<2H3Q", _ZIP64_EXTRA, 24, self.size, self.size, self.start)
        sizes = (crc, _IN_ZIP64, _IN_ZIP64, len(self.name), len(extra), 0, 0, 0, 0, _IN_ZIP64)
        versions = (_ZIP64_VERSION, _ZIP64_VERSION, 0, _STORED, 0, _DATE)
        return _CENTRAL_HEADER.pack(b"PK\1\2", *versions, *sizes) + self.name + extra


class NpzWriter:
    """Arrays of known shapes and equal length, written in place into one uncompressed archive.

    One process calls `create`; then any process calls `write`, in any order; when `done` is all true, one process calls
    `finish`. In `folder` lie `samples.npz`, which has no headers before `finish`, and `done.npy`, one flag per row, set
    only after the row itself is on disk. Readers of the finished file can memory-map its members in place.
    """

    def __init__(self, folder: Path, members: Mapping[str, tuple[tuple[int, ...], type[np.generic]]]) -> None:
        """`members` maps a name such as arr_0 to (shape [N, ...], dtype)."""
        self.path, self._done_path = folder / "samples.npz", folder / "done.npy"
        self._members: dict[str, _Member] = {}
        position = 0
        for name, (shape, dtype) in members.items():
            self._members[name] = _Member(name, shape, np.dtype(dtype), position)
            position = self._members[name].end
        self._end = position
        (self._num_rows,) = {shape[0] for shape, _ in members.values()}

    def create(self) -> None:
        """Reserve the disk space, or keep what an earlier attempt left. Raises `UserError` when the disk is full.

        Reserved at once, so that a disk too small is found out before the work and not by its last row.
        """
        if self._done_path.exists() and self.path.exists() and self.path.stat().st_size >= self._end:
            return
        self._done_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)  # never overwritten: a result may be another name of the same file
        with write_errors(self.path), open(self.path, "w+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._end)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve
                    self.path.unlink()
                    raise
                os.ftruncate(file.fileno(), self._end)
        with atomic_path(self._done_path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.zeros(self._num_rows, dtype=bool))

    @property
    def done(self) -> np.ndarray:
        """Which rows are on disk, bool [N], read anew at each call."""
        return np.load(self._done_path)

    def write(self, first: int, **arrays: np.ndarray) -> None:
        """Write rows `first`, `first` + 1, ... of every member, and mark them once they are on disk.

        By system calls, not through a memory map: a full disk is then an error (`UserError`) and not the end of the
        process, and writers on other nodes may share a page.
        """
        assert arrays.keys() == self._members.keys()
        (num_rows,) = {len(array) for array in arrays.values()}
        assert first + num_rows <= self._num_rows
        with write_errors(self.path), open(self.path, "r+b", buffering=0) as file:
            for name, array in arrays.items():
                member = self._members[name]
                assert (array.dtype, array.shape[1:]) == (member.dtype, member.shape[1:])
                _write_at(file.fileno(), np.ascontiguousarray(array), member.values + first * member.row_bytes)
            os.fdatasync(file.fileno())
            with open(self._done_path, "r+b", buffering=0) as done:
                flags_start = os.fstat(done.fileno()).st_size - self._num_rows
                _write_at(done.fileno(), np.ones(num_rows, dtype=bool), flags_start + first)
                os.fdatasync(done.fileno())

    def finish(self, path: Path) -> None:
        """Write headers, checksums and directory, and put the archive at `path`, atomically.

        The work folder keeps its name for the same file (a hard link; a copy where `path` is on another file system),
        so that after a kill between this and the next step of the caller, `finish` can be called again.
        """
        assert self.done.all(), "rows are missing"
        with write_errors(self.path), open(self.path, "r+b", buffering=0) as file:
            directory = b""
            for member in self._members.values():
                crc = zlib.crc32(member.header)
                crc = _crc_of_rest(file.fileno(), member.values, member.end, crc)
                header = np.frombuffer(member.local_header(crc) + member.header, dtype=np.uint8)
                _write_at(file.fileno(), header, member.start)
                directory += member.central_header(crc)
            count, end = len(self._members), self._end + len(directory)
            tail = directory
            tail += _ZIP64_END.pack(
                b"PK\6\6", _ZIP64_END.size - 12, _ZIP64_VERSION, _ZIP64_VERSION, 0, 0, count, count, len(directory),
                self._end,
            )  # fmt: skip
            tail += _ZIP64_LOCATOR.pack(b"PK\6\7", 0, end, 1)
            tail += _END.pack(b"PK\5\6", 0, 0, count, count, len(directory), _IN_ZIP64, 0)
            _write_at(file.fileno(), np.frombuffer(tail, dtype=np.uint8), self._end)
            os.ftruncate(file.fileno(), self._end + len(tail))
            os.fsync(file.fileno())
        with atomic_path(path) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.path, temporary)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(self.path, temporary)


def _write_at(descriptor: int, array: np.ndarray, position: int) -> None:
    left = array.data.cast("B")
    while left:
        written = os.pwrite(descriptor, left, position)  # at most 2 GiB at a time
        left, position = left[written:], position + written


def _crc_of_rest(descriptor: int, position: int, end: int, crc: int) -> int:
    while position < end:
        block = os.pread(descriptor, min(READ_BYTES, end - position), position)
        assert block, "the archive is shorter than its layout"
        crc, position = zlib.crc32(block, crc), position + len(block)
    return crc
