"""Shared by all tests."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

# Before torch is imported, here and by all that is started from here: the number of threads decides the order of sums,
# and so the last bit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests import forked

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep together, on several processes, what shares a fixture; the long files first, so that none is left over."""
    for item in items:
        group = "house" if "house" in item.fixturenames else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path.parent.name != "workflow")


@pytest.fixture
def mixflow(tmp_path):
    """Run `python -m mixflow ...` in a fresh folder, as a user would; returns the finished process."""
    return partial(forked.mixflow, cwd=tmp_path)


def run_snakemake(directory, *arguments):
    """Run `snakemake ...` on this repository's Snakefile with results under `directory`."""
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"),
        *("--directory", str(directory), "--workflow-profile", str(ROOT / "profiles/default")),
        *map(str, arguments),
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, env=environment)


@pytest.fixture
def snakemake():
    return run_snakemake
