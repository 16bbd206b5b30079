"""Files that are either whole or absent: atomic writes, hashes and work folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mixflow.runtime.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, else remove it.

    Readers therefore see the old file or the whole new one, also after a kill or a power cut.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # some writers (safetensors) leave files that only their owner can read
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _fsync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and a folder without write permission, while writing `path`, into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_mib = shutil.disk_usage(path.parent).free >> 20
            raise UserError(
                f"'{path}' could not be written because the disk is full ({free_mib} MiB free): make room and run "
                "the same command again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                f"'{path}' could not be written ({error.strerror}): make '{path.parent}' writable and run the same "
                "command again"
            ) from error
        raise


def free_bytes(folder: Path) -> int:
    """Return what may still be written below `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _umask() -> int:
    """Return the umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as readable JSON, atomically. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a missing or broken one is a `UserError`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist: make it first, or correct the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not valid JSON ({error}): delete it and make it again") from None


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class WorkFolder:
    """Resume state of one piece of work: `scratch/{stage}/{name}/{key}/`, never a declared output.

    `key` hashes everything that decides the result, so that state of other settings is never picked up. The folder is
    locked while in use: a second process with the same work waits, for instance when the head process was killed but
    the trainer it had started lives on. `remove()` on success.
    """

    def __init__(self, root: str | os.PathLike[str], stage: str, name: str, key: str) -> None:
        self.path = Path(root) / stage / name / key
        self._lock_path = self.path.with_name(key + ".lock")
        self._lock: IO[str] | None = None

    def open(self) -> Path:
        """Create the folder, take its lock (waiting for a holder that is still alive), and return its path."""
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock = open(self._lock_path, "a+")  # noqa: SIM115 (held until close)
            except FileNotFoundError:
                continue  # a former holder just removed the empty folder
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    # File systems without locks (some network mounts): one process at a time is the user's care.
                    print(f"mixflow: no file locks under '{self.path.parent}' ({error.strerror})", file=sys.stderr)
                else:
                    lock.seek(0)
                    holder = lock.read().strip() or "unknown"
                    print(f"mixflow: waiting for process {holder}, which is at work in {self.path}", file=sys.stderr)
                    fcntl.flock(lock, fcntl.LOCK_EX)
            if self._lock_path.exists() and os.fstat(lock.fileno()).st_ino == self._lock_path.stat().st_ino:
                break
            lock.close()  # the former holder finished and removed the lock while we waited: take the new one
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        self.path.mkdir(exist_ok=True)
        return self.path

    def close(self) -> None:
        """Give the lock back, keep the state."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Remove the state after success, and the lock with it (by the process that opened it)."""
        if self._lock is None:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        self.close()
        for folder in (self.path.parent, self.path.parent.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only when empty
