"""`run.json`: how a result was made, beside the result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixflow.runtime.files import file_sha256, read_json, write_json

_PACKAGES = (
    *("mixflow", "torch", "timm", "accelerate", "torchdiffeq", "diffusers", "safetensors", "numpy", "pillow"),
    "torch-fidelity",
)


class RunRecord:
    """Collects what a reader needs to trust or repeat a result; `write` puts it beside the outputs."""

    def __init__(self, stage: str, settings: dict[str, Any], parents: Mapping[str, str | os.PathLike[str]]) -> None:
        """`settings` is the resolved slice of config; `parents` maps a role to the file used (hashed here)."""
        self.started = datetime.datetime.now(datetime.UTC)
        self._clock = time.perf_counter()
        self.stage = stage
        self.settings = settings
        self.parents = {role: {"file": str(path), "sha256": file_sha256(path)} for role, path in parents.items()}

    @property
    def parent_hashes(self) -> dict[str, str]:
        """SHA-256 of each parent file by role: with the settings they decide the result."""
        return {role: parent["sha256"] for role, parent in self.parents.items()}

    def already_made(self, path: str | os.PathLike[str]) -> bool:
        """Return whether the run.json at `path` tells of whole outputs made from these very settings and parents."""
        path = Path(path)
        if not path.exists():
            return False
        made = read_json(path)
        return (
            made.get("settings") == self.settings
            and {role: parent["sha256"] for role, parent in made.get("parents", {}).items()} == self.parent_hashes
            and all((path.parent / name).exists() for name in made.get("outputs", {}))
            and all(file_sha256(path.parent / name) == found for name, found in made["outputs"].items())
        )

    def write(self, path: str | os.PathLike[str], outputs: list[str | os.PathLike[str]], **measured: Any) -> None:
        """Write `run.json`; `measured` holds what the stage counted (images, seconds, attempts, ...)."""
        write_json(
            path,
            {
                "stage": self.stage,
                "settings": self.settings,
                "parents": self.parents,
                "outputs": {Path(output).name: file_sha256(output) for output in outputs},
                "measured": {
                    **measured,
                    "wall_seconds": round(time.perf_counter() - self._clock, 3),
                    "peak_memory_mib": peak_memory_mib(),
                },
                "started": self.started.isoformat(timespec="seconds"),
                "command": sys.argv,
                "code": code_version(),
                "machine": machine(),
            },
        )


def peak_memory_mib() -> dict[str, int]:
    """Largest resident memory of this process, and of each CUDA device where torch is in use, in MiB."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            peak[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index) >> 20
    return peak


def code_version() -> dict[str, Any]:
    """Commit, whether files differ from it, the image digest where there is one, and package versions.

    An image has no history: its build writes what `git describe --dirty` says into COMMIT beside the package.
    """
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    built_from = Path(__file__).parents[2] / "COMMIT"
    if built_from.exists():
        commit, _, changes = built_from.read_text(encoding="utf-8").strip().partition("-")
    return {
        "commit": commit,
        "dirty": bool(changes),
        "image": os.environ.get("MIXFLOW_IMAGE_DIGEST"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or installed outside a checkout
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Host, processor count and devices, as far as they can explain a difference in the last bit or in speed."""
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        facts["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu"]
    return facts
