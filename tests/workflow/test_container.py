"""Jobs in an image: what comes in, and the sentences about images that cannot do. The container is a stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.workflow.house import WEIGHTS, House, copy_of, environment

pytestmark = pytest.mark.slow

# The pipeline's image rules around two jobs that tell what they see.
PROBE = f"""
configfile: "{ROOT}/config.yaml"
include: "{ROOT}/workflow/rules/common.smk"
include: "{ROOT}/workflow/rules/container.smk"
rule all:
    input: "two", "here"
rule two:
    output: "two"
    threads: 2
    shell: "env > {{output}}"
rule here:
    output: "here"
    localrule: True
    shell: "env > {{output}}"
"""
PASSED = {
    "CUDA_VISIBLE_DEVICES": "5",
    "SLURM_JOB_ID": "77",
    "HF_TOKEN": "secret",
    "HF_ENDPOINT": "https://mirror",
    "https_proxy": "http://proxy:1",
}


def run(folder: Path, image: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Snakemake in a folder with profiles/apptainer and a stand-in for `apptainer` in front of the PATH."""
    programs = folder / "programs"
    if not programs.exists():
        programs.mkdir()
        stand_in = programs / "apptainer"
        stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/workflow/apptainer.py "$@"\n')
        stand_in.chmod(0o755)
    outer = environment()
    outer |= {"PATH": f"{programs}{os.pathsep}{outer['PATH']}", "OMP_NUM_THREADS": "7", **variables}
    command = [sys.executable, "-m", "snakemake", *arguments, "--cores", "2"]
    command += ["--profile", str(ROOT / "profiles/apptainer"), "--config", f"image={image}"]
    return subprocess.run(command, cwd=folder, env=outer, capture_output=True, text=True, timeout=900)


def test_what_a_job_sees_of_the_shell(tmp_path: Path) -> None:
    """Its own number of threads, the GPUs and the number that Slurm gave, what downloads need; nothing else."""
    (tmp_path / "Snakefile").write_text(PROBE)
    (tmp_path / "image.sif").touch()
    result = run(tmp_path, "image.sif", MIXFLOW_OTHER="1", **PASSED)
    assert result.returncode == 0, result.stderr[-3000:]
    for name, threads in {"two": "2", "here": "1"}.items():
        seen = dict(line.split("=", 1) for line in (tmp_path / name).read_text().splitlines())
        assert seen["OMP_NUM_THREADS"] == threads
        assert seen["MIXFLOW_IMAGE_DIGEST"] == "image.sif"
        assert {key: seen.get(key) for key in PASSED} == PASSED
        assert "MIXFLOW_OTHER" not in seen


def test_what_the_shell_lacks_a_job_lacks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty CUDA_VISIBLE_DEVICES would hide every GPU."""
    for key in PASSED:
        monkeypatch.delenv(key, raising=False)
    (tmp_path / "Snakefile").write_text(PROBE)
    (tmp_path / "image.sif").touch()
    assert run(tmp_path, "image.sif", "here").returncode == 0
    assert not set(PASSED) & {line.split("=", 1)[0] for line in (tmp_path / "here").read_text().splitlines()}


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("docker://localhost/mixflow:0.1.0", "image: 'docker://localhost/mixflow:0.1.0' has no digest: take a file"),
        ("missing.sif", "image: 'missing.sif' does not exist: convert one (docs/container.md), or correct the path"),
    ],
)
def test_images_that_are_refused_before_any_job(tmp_path: Path, image: str, told: str) -> None:
    (tmp_path / "Snakefile").write_text(PROBE)
    result = run(tmp_path, image)
    assert result.returncode != 0
    assert f"mixflow: {told}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "two").exists()


def test_an_image_without_our_package(house: House, tmp_path: Path) -> None:
    """A sentence, nothing lost, and with the right image the same bytes."""
    small = copy_of(house, tmp_path)
    shutil.rmtree((small.folder / WEIGHTS).parent)
    (small.folder / "bare.sif").touch()
    (small.folder / "image.sif").touch()
    configs = ["--configfile", "rehearsal.yaml", "small.yaml"]
    result = run(small.folder, "bare.sif", WEIGHTS, *configs)
    assert result.returncode != 0
    assert "mixflow: image: 'bare.sif' is not an image of mixflow: take one that 'make image' has" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (small.folder / WEIGHTS).exists()
    result = run(small.folder, "image.sif", WEIGHTS, *configs)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (small.folder / WEIGHTS).read_bytes() == (house.folder / WEIGHTS).read_bytes()
