"""What this machine can run: versions, processors, devices, memory, disk, and which code is in use."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import mixflow
from mixflow.runtime.provenance import code_version

_PARTS = (
    "torch", "torchvision", "timm", "accelerate", "torchdiffeq", "diffusers", "transformers", "torch-fidelity",
    "snakemake",
)  # fmt: skip
_MIN_SHM_MIB = 256  # below this, loader workers and NCCL die with "Bus error"
_MIN_FREE_GIB = 1.0


def examine() -> dict[str, Any]:
    """Return facts about this machine and a list of problems, each one sentence with its fix."""
    import torch

    problems = []
    shm = shutil.disk_usage("/dev/shm").total >> 20 if Path("/dev/shm").exists() else None
    disk = shutil.disk_usage(".").free / 2**30
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        problems.append(f"Python {sys.version.split()[0]} is not supported: use 3.11 or 3.12")
    missing = [name for name in _PARTS if _installed(name) is None]
    if missing:
        problems.append(f"not installed: {', '.join(missing)}: run `make setup`, or use the container image")
    if not os.access(".", os.W_OK):
        problems.append(f"'{Path.cwd()}' is not writable: results/, scratch/ and logs/ need a writable folder")
    if disk < _MIN_FREE_GIB:
        problems.append(f"only {disk:.1f} GiB are free on this disk: make room")
    if shm is not None and shm < _MIN_SHM_MIB and torch.cuda.is_available():
        problems.append(f"/dev/shm has {shm} MiB: in a container add --ipc=host or --shm-size=1g")
    devices = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
            "bf16": torch.cuda.is_bf16_supported(),
        }
        for index in range(torch.cuda.device_count())
    ]
    return {
        "mixflow": {"version": mixflow.__version__, "folder": str(Path(mixflow.__file__).parent), **code_version()},
        "parts": {name: _installed(name) for name in _PARTS},
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "shared_memory_mib": shm,
        "free_disk_gib": round(disk, 1),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpus": devices,
        "can_run": _can_run(devices),
        "problems": problems,
    }


def _installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _can_run(gpus: list[dict[str, Any]]) -> list[str]:
    """Return what the devices are enough for; bf16 and memory figures of large models are not judged here."""
    able = ["the digits demo (`make demo`)", "the rehearsal of the ImageNet tables (`make rehearsal`)"]
    if gpus:
        able.append(f"training and sampling on {len(gpus)} GPU(s)")
    return able


def render(findings: dict[str, Any]) -> str:
    """Return the findings as text for a terminal."""
    code = findings["mixflow"]
    commit = (code["commit"] or "no git checkout")[:12] + (" with local changes" if code["dirty"] else "")
    lines = [
        f"mixflow {code['version']} ({commit}) from {code['folder']}, Python {code['python']}",
        "  " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in findings["parts"].items()),
        f"  {findings['cpus']} CPU cores, {findings['memory_gib']} GiB memory, "
        f"{findings['free_disk_gib']} GiB free disk",
    ]
    if findings["gpus"]:
        for index, gpu in enumerate(findings["gpus"]):
            bf16 = "bf16" if gpu["bf16"] else "no bf16"
            lines.append(f"  GPU {index}: {gpu['name']}, {gpu['memory_gib']} GiB, {bf16}, CUDA {findings['cuda']}")
    else:
        lines.append("  no GPU visible: the demo, the rehearsal and the tests run on the CPU")
    lines += [f"can run: {item}" for item in findings["can_run"]]
    lines += [f"PROBLEM: {problem}" for problem in findings["problems"]] or ["no problems found"]
    return "\n".join(lines)
