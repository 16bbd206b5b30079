"""A copy of what a clone holds, to run Snakemake in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.conftest import ROOT

# Two arms and two samplers on digits: every rule but those for downloads.
SMALL: dict[str, Any] = {
    "tables": {
        "digits": {
            "columns": [{"sampler": "euler5", "metric": "fd"}, {"sampler": "euler10", "metric": "fd"}],
            "rows": [
                {"checkpoint": "digits-base", "label": "base"},
                {"checkpoint": "digits-mixflow-g0.8", "label": "MixFlow 0.8"},
            ],
        }
    }
}
WEIGHTS = "results/checkpoints/digits-base/model.safetensors"
SAMPLES = "results/samples/digits-base/euler5/samples.npz"


class House(NamedTuple):
    """A copy of what a clone holds: the pipeline, its code, and results."""

    folder: Path

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(*self.command(*arguments))

    def command(self, *arguments: str) -> list[str]:
        """Return the command, for tests that start it themselves."""
        configs = ["--configfile", "rehearsal.yaml", "small.yaml"]
        return [sys.executable, "-m", "snakemake", *configs, "--cores", "2", *arguments]

    def mixflow(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        configs = ["--config", "config.yaml", "rehearsal.yaml", "small.yaml"]
        return self.run(sys.executable, "-m", "mixflow", *arguments, *configs, **options)

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=900, **options
        )

    def left(self, *arguments: str) -> dict[str, int]:
        """Return the jobs of a dry run by rule."""
        result = self.snakemake("--dry-run", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return job_counts(result.stdout + result.stderr)


def environment() -> dict[str, str]:
    """Return that of the commands: this interpreter's programs first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def job_counts(text: str) -> dict[str, int]:
    """Return the number of jobs of each rule, from what a dry run prints."""
    if "Job stats:" not in text:
        assert "Nothing to be done" in text
        return {}
    lines = text.split("Job stats:")[1].splitlines()[3:]
    counts = {line.split()[0]: int(line.split()[1]) for line in lines[: lines.index("")]}
    del counts["total"]
    return counts


def build(folder: Path) -> House:
    """Copy the pipeline and its code."""
    folder.mkdir(parents=True)
    for name in ("Snakefile", "config.yaml", "rehearsal.yaml"):
        shutil.copy2(ROOT / name, folder)
    for name in ("workflow", "profiles", "mixflow"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return House(folder)


def copy_of(house: House, folder: Path) -> House:
    """Return a copy, file times and all, so that the order of the tests plays no part."""
    shutil.copytree(house.folder, folder / "clone", symlinks=True)
    return House(folder / "clone")
