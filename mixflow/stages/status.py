"""Say how far running and stopped work is, from its files in scratch/ alone. No torch.

No lock is taken and no process is asked, so that it tells the same from any machine that sees the folder.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mixflow.runtime.progress import PROGRESS_FILE, duration, last_sign

LOG = "log.txt"  # of all attempts, beside the resume state
_KEY = re.compile("[0-9a-f]{16}")
# A sign of life comes every few seconds, but not before a unit is done, and the first waits for the network to be
# loaded and compiled.
_SILENT_SECONDS, _SILENT_UNITS, _FIRST_SECONDS = 60.0, 5.0, 900.0


class Piece(NamedTuple):
    """One piece of work that is not finished."""

    stage: str
    name: str
    folder: Path
    state: str  # "running", "stopped" (it said so), "silent" (it ended or its machine is out of reach)
    age: float  # seconds since the last sign of life
    done: int = 0
    total: int = 0
    unit: str = ""
    seconds_per_unit: float | None = None
    images_per_second: float | None = None
    host: str | None = None
    slurm_job: str | None = None
    last_line: str | None = None  # of its log

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this attempt; None where that is not known yet."""
        return None if self.seconds_per_unit is None else (self.total - self.done) * self.seconds_per_unit


def pieces(scratch: Path, now: datetime.datetime | None = None) -> list[Piece]:
    """Return the unfinished work below `scratch`, by stage and name."""
    now = now or datetime.datetime.now(datetime.UTC)
    return sorted((_piece(scratch, folder, now) for folder in _folders(scratch)), key=lambda piece: piece[:3])


def _folders(scratch: Path) -> Iterator[Path]:
    for path in sorted(scratch.rglob("*")) if scratch.is_dir() else ():
        if _KEY.fullmatch(path.name) and path.is_dir():
            yield path


def _piece(scratch: Path, folder: Path, now: datetime.datetime) -> Piece:
    stage, *name = folder.relative_to(scratch).parts[:-1]
    last_line = _last_line(folder / LOG)
    sign = last_sign(folder)
    if sign is None:
        times = [path.stat().st_mtime for path in folder.iterdir() if path.exists()]
        age = max(0.0, now.timestamp() - max(times, default=folder.stat().st_mtime))
        state = "running" if age < _FIRST_SECONDS else "silent"
        return Piece(stage, "/".join(name), folder, state, age, last_line=last_line)
    age = max(0.0, (now - datetime.datetime.fromisoformat(sign["written"])).total_seconds())
    units = sign["done"] - sign["first"]
    each = sign["seconds"] / units if units > 0 else None
    patience = _FIRST_SECONDS if each is None else max(_SILENT_SECONDS, _SILENT_UNITS * each)
    state = "running" if age < patience else "silent"
    if sign["state"] == "closed":
        # With all units done the result is still hashed and written.
        state = "running" if sign["done"] >= sign["total"] and age < _FIRST_SECONDS else "stopped"
    return Piece(
        stage,
        sign["name"],
        folder,
        state,
        age,
        sign["done"],
        sign["total"],
        sign["unit"],
        each,
        sign["images_per_second"] or None,
        sign["host"],
        sign["slurm_job"],
        last_line,
    )


def _last_line(log: Path) -> str | None:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return lines[-1] if lines else None


def render(found: list[Piece], scratch: Path) -> str:
    """Return the state of the work for people."""
    if not found:
        return f"no unfinished work in '{scratch}'"
    lines = []
    for piece in found:
        lines.append(f"{piece.stage} {piece.name}: {_progress(piece)}")
        lines.append(f"  {_life(piece)}")
        if piece.state != "running" and piece.last_line:
            lines.append(f"  last in its log: {piece.last_line}")
    if any(piece.state != "running" for piece in found):
        lines.append("what stopped or is silent goes on from there when the same command is called again")
    return "\n".join(lines)


def _progress(piece: Piece) -> str:
    if not piece.total:
        return "nothing is done yet"
    parts = [f"{piece.unit} {piece.done:,}/{piece.total:,} ({piece.done / piece.total:.0%})"]
    if piece.images_per_second:
        parts.append(f"{piece.images_per_second:,.0f} images/s")
    left = piece.seconds_left
    if piece.done >= piece.total:
        parts.append("its result is being written")
    elif left is not None:
        parts.append(f"{duration(left)} left" if piece.state == "running" else f"{duration(left)} were left")
    return ", ".join(parts)


def _life(piece: Piece) -> str:
    where = f" on {piece.host}" if piece.host else ""
    job = f", Slurm job {piece.slurm_job}" if piece.slurm_job else ""
    ago = f"{duration(piece.age)} ago"
    if piece.state == "running":
        return f"running{where}{job}, last sign of life {ago}"
    if piece.state == "stopped":
        return f"stopped{where}{job} {ago}, saved"
    return f"silent{where}{job}, last sign of life {ago}: killed, or its machine or this disk is out of reach"


__all__ = ["LOG", "PROGRESS_FILE", "Piece", "pieces", "render"]
