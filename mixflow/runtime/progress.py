"""Log lines and progress: a bar on a terminal, plain lines in a log, with images per second and time left."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("mixflow")


def start_logging(file: str | None, quiet: bool = False) -> None:
    """Send log lines to stderr and, if `file` is given, to that file too (the rules of the pipeline do)."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO)
    if not quiet:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(logging.Formatter("mixflow: %(message)s"))
        log.addHandler(terminal)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, mode="a", encoding="utf-8")
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


class Progress:
    """Progress of `total` units of work, of which `done` were finished by an earlier attempt.

    On a terminal it is a bar. Elsewhere, or when a log file is kept (several jobs may share the terminal), it is a line
    every `every_seconds`.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0, every_seconds: float = 15.0) -> None:
        self.name, self.total, self.unit, self.done, self.every_seconds = name, total, unit, done, every_seconds
        self._first, self._start, self._last = done, time.perf_counter(), time.perf_counter()
        self._images = 0
        logs_to_file = any(isinstance(handler, logging.FileHandler) for handler in log.handlers)
        self._bar = None
        if sys.stderr.isatty() and not logs_to_file and log.handlers:
            self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True)

    def advance(self, units: int, images: int, note: str = "") -> None:
        """Report `units` more units done, which processed `images` images."""
        self.done += units
        self._images += images
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
        if self._bar is not None:
            self._bar.close()
