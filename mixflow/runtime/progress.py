"""Log lines and progress: a bar on a terminal, plain lines in a log, and a small file that other machines can read."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("mixflow")

PROGRESS_FILE = "progress.json"  # in a work folder
SIGN_SECONDS = 5.0  # at least, between two writings of it


def start_logging(file: str | None, quiet: bool = False) -> None:
    """Send log lines to stderr and, if `file` is given, to that file too (the rules of the pipeline do)."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, must not bury what is told
    if not quiet:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(logging.Formatter("mixflow: %(message)s"))
        log.addHandler(terminal)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        _add(logging.FileHandler(file, mode="a", encoding="utf-8"))


class KeptLog(logging.FileHandler):
    """Log lines that outlive the attempt which wrote them, in a file beside the resume state.

    Snakemake deletes the log of an attempt before the next: an empty one begins with what earlier attempts wrote here.
    """

    def __init__(self, file: Path) -> None:
        """Append to `file` from now on, in place of that of work which stopped in this process before."""
        for earlier in [handler for handler in log.handlers if isinstance(handler, KeptLog)]:
            earlier.close()
        if file.exists():
            for handler in log.handlers:
                if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).stat().st_size == 0:
                    with open(handler.baseFilename, "a", encoding="utf-8") as begun:
                        begun.write(file.read_text(encoding="utf-8"))
        super().__init__(file, mode="a", encoding="utf-8")
        _add(self)

    def close(self) -> None:
        log.removeHandler(self)
        super().close()


def _add(handler: logging.FileHandler) -> None:
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)


def duration(seconds: float) -> str:
    """Return a duration as people say it: '8 s', '3 min 20 s', '5 h 07 min', '2 d 03 h'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"


def last_sign(folder: Path) -> dict[str, Any] | None:
    """Return the last progress that was written in a work folder, None where there is none that can be read."""
    try:
        told = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


class Progress:
    """Progress of `total` units of work, of which `done` were finished by an earlier attempt.

    On a terminal it is a bar. Elsewhere, or when a log file is kept (several jobs may share the terminal), it is a line
    every `every_seconds`. With `folder`, the work folder, which the main process alone gives, `progress.json` there
    tells `mixflow status` how far the work is.
    """

    def __init__(
        self, name: str, total: int, unit: str, done: int = 0, every_seconds: float = 15.0, folder: Path | None = None
    ) -> None:
        self.name, self.total, self.unit, self.done, self.every_seconds = name, total, unit, done, every_seconds
        self._first, self._start, self._last = done, time.perf_counter(), time.perf_counter()
        self._images = 0
        self._file, self._signed = None if folder is None else folder / PROGRESS_FILE, 0.0
        self._sign("running")
        logs_to_file = any(type(handler) is logging.FileHandler for handler in log.handlers)  # not the kept log alone
        self._bar = None
        if sys.stderr.isatty() and not logs_to_file and log.handlers:
            self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True)

    def advance(self, units: int, images: int, note: str = "") -> None:
        """Report `units` more units done, which processed `images` images."""
        units = min(units, self.total - self.done)  # processes that share the last round may have less than they say
        self.done += units
        self._images += images
        if time.perf_counter() - self._signed >= SIGN_SECONDS:
            self._sign("running")
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.images_per_second:,.0f} images/s {note}", refresh=False)
            self._bar.update(units)
            return
        now = time.perf_counter()
        if now - self._last >= self.every_seconds:
            self._last = now
            left = (self.total - self.done) * (now - self._start) / max(self.done - self._first, 1)
            log.info(
                "%s: %s %d/%d, %s images/s, %s left%s",
                self.name, self.unit, self.done, self.total, f"{self.images_per_second:,.0f}", duration(left),
                f", {note}" if note else "",
            )  # fmt: skip

    @property
    def images_per_second(self) -> float:
        """Images processed per second by this attempt."""
        return self._images / max(time.perf_counter() - self._start, 1e-9)

    def close(self) -> None:
        self._sign("closed")
        if self._bar is not None:
            self._bar.close()

    def _sign(self, state: str) -> None:
        """Write a sign of life, whole or not at all. Where it cannot be written the work goes on without it."""
        if self._file is None:
            return
        self._signed = time.perf_counter()
        seconds = self._signed - self._start
        told: dict[str, Any] = {
            "name": self.name,
            "state": state,
            "unit": self.unit,
            "done": self.done,
            "total": self.total,
            "seconds": round(seconds, 3),  # of this attempt, which found `first` units done
            "first": self._first,
            "images_per_second": round(self.images_per_second, 3),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        temporary = self._file.with_name(f".{PROGRESS_FILE}.{os.getpid()}.tmp")
        # Without fsync: it is for people, and slow disks must not hold up the work.
        try:
            temporary.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self._file)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
