"""Shared by all tests."""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

# Before torch is imported, here and by all that is started from here: the number of threads decides the order of sums,
# and so the last bit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests import forked

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


class KeepTogether(LoadScopeScheduling):
    """A file goes to one process, and all files that share the session's `house` to the same one.

    Not by marks of xdist_group: xdist 3.8 writes groups into a private name of a test that pytest 9.2 no longer has,
    so that every test went alone, and fixtures that are whole pipelines were made by each process.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "house" if _shares_the_house(file) else file


@cache
def _shares_the_house(file: str) -> bool:
    return "(house: House" in (ROOT / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return KeepTogether(config, log)


def pytest_collection_modifyitems(items):
    """The long files first, so that none is left over for one process."""
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
