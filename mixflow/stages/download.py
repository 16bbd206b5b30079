"""Bring files from elsewhere onto this machine and write down what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixflow.runtime.downloads import download, downloaded
from mixflow.runtime.progress import log


def run(name: str, entry: dict[str, Any], out: Path) -> None:
    """Find or fetch the files of a resolved `downloads` entry and write their record to `out`."""
    files = downloaded(download(name, entry, out=out))
    log.info("%s: %s", name, ", ".join(f"{path} ({path.stat().st_size >> 20} MiB)" for path in files.values()))
