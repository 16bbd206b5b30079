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
from mixflow.runtime.progress import KeptLog


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
        except BaseException as error:
            full = None if isinstance(error, OSError | UserError) else _no_more_room(temporary)
            temporary.unlink(missing_ok=True)
            if isinstance(error, Exception) and full is not None:
                raise full from error
            raise


def _no_more_room(path: Path) -> OSError | None:
    """Return why a file that was begun cannot grow: torch and safetensors say of a full disk what is no OSError."""
    if not path.exists():
        return None
    try:
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and a folder without write permission, while writing `path`, into a `UserError`."""
    try:
        yield
    except OSError as error:
        if (told := write_error(error, path)) is None:
            raise
        raise told from error


def write_error(error: OSError, path: Path) -> UserError | None:
    """Return what to tell the user of an error while writing `path`, None where it is not for the user to mend."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free_mib = free_bytes(path.parent) >> 20
        return UserError(
            f"'{path}' could not be written because the disk is full ({free_mib} MiB free): make room and run the same "
            "command again"
        )
    if error.errno == errno.EFBIG:
        return UserError(
            f"'{path}' could not be written because files may not be that large here: raise the limit (ulimit -f "
            "unlimited) and run the same command again"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(
            f"'{path}' could not be written ({error.strerror}): make '{path.parent}' writable and run the same command "
            "again"
        )
    return None


def disk_error(error: Exception) -> UserError | None:
    """Return what to tell of a full or read-only disk that was met where nothing looked out for it, None for others."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return write_error(error, Path(error.filename or "a file"))
    return None


def require_writable(folder: Path) -> None:
    """Raise `UserError` where nothing can be written in a folder, which need not exist yet: better before the work."""
    existing = _existing_folder(folder)
    with write_errors(folder / "run.json"):
        if os.statvfs(existing).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def free_bytes(folder: Path) -> int:
    """Return what may still be written below `folder`, which need not exist yet."""
    return shutil.disk_usage(_existing_folder(folder)).free


def _existing_folder(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


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
    the trainer it had started lives on. `log.txt` in it tells what every attempt logged. `remove()` on success.
    """

    def __init__(self, root: str | os.PathLike[str], stage: str, name: str, key: str) -> None:
        self.path = Path(root) / stage / name / key
        self._lock_path = self.path.with_name(key + ".lock")
        self._lock: IO[str] | None = None
        self._log: KeptLog | None = None

    def open(self) -> Path:
        """Create the folder, take its lock (waiting for a holder that is still alive), and return its path."""
        with write_errors(self.path):
            return self._open()

    def _open(self) -> Path:
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
        self._log = KeptLog(self.path / "log.txt")
        return self.path

    def close(self) -> None:
        """Give the lock back, keep the state. What is logged later, why work stopped, still goes to its log."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Remove the state after success, and the lock with it (by the process that opened it)."""
        if self._lock is None:
            return
        if self._log is not None:
            self._log.close()
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        self.close()
        for folder in (self.path.parent, self.path.parent.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only when empty
