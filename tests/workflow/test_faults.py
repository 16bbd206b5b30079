"""Faults of disks, locks and devices: the sentence that the user sees, and nothing lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.workflow.house import SMALL, House, copy_of, environment

pytestmark = pytest.mark.slow

NAME = "digits-mixflow-g0.8"
WEIGHTS = f"results/checkpoints/{NAME}/model.safetensors"
SAMPLES = f"results/samples/{NAME}/euler5/samples.npz"
METRICS = f"results/metrics/{NAME}/euler5/metrics.json"
TRAIN = ("train", NAME, "--save-every", "0")
SAMPLE = ("sample", NAME, "euler5")
EVALUATE = ("evaluate", SAMPLES)
PAGE = 4096


def sentence(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of ours that a user sees last."""
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    return [line for line in result.stderr.splitlines() if line.startswith("mixflow: ")][-1]


@pytest.fixture
def mounts() -> Iterator[Callable[..., None]]:
    """Mount for the time of a test; skip it where that is not allowed."""
    mounted: list[str] = []

    def mount(*arguments: str) -> None:
        result = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"mount is not allowed here ({result.stderr.strip()})")
        if "remount" not in " ".join(arguments):
            mounted.append(arguments[-1])

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "made", "room"),
    [(TRAIN, WEIGHTS, 100 * PAGE), (SAMPLE, SAMPLES, 40 * PAGE), (EVALUATE, METRICS, 0)],
    ids=["train", "sample", "evaluate"],
)
def test_a_full_disk(house: House, tmp_path: Path, mounts, command: tuple[str, ...], made: str, room: int) -> None:
    """A sentence, and the same bytes once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounts("-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk))
    small = copy_of(house, disk)
    shutil.rmtree((small.folder / made).parent)
    used = shutil.disk_usage(disk).used
    mounts("-o", f"remount,size={used + room}", str(disk))
    result = small.mixflow(*command)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "could not be written because the disk is full (0 MiB free): make room and run the same command again" in (
        sentence(result)
    )
    assert not (small.folder / made).exists()
    mounts("-o", "remount,size=100m", str(disk))
    result = small.snakemake(made)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (small.folder / made).read_bytes() == (house.folder / made).read_bytes()


def test_a_limit_on_the_size_of_files(house: House, tmp_path: Path) -> None:
    """As `ulimit -f` sets it."""
    small = copy_of(house, tmp_path)
    shutil.rmtree((small.folder / WEIGHTS).parent)
    limit = 100_000, resource.RLIM_INFINITY

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    result = small.mixflow(*TRAIN, preexec_fn=lower)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "resume.pt' could not be written because files may not be that large here: raise the limit (ulimit -f" in (
        sentence(result)
    )
    assert small.mixflow(*TRAIN).returncode == 0
    assert (small.folder / WEIGHTS).read_bytes() == (house.folder / WEIGHTS).read_bytes()


# --- folders that cannot be written ----------------------------------------------------------------------------------


def test_a_read_only_results_folder(house: House, tmp_path: Path, mounts) -> None:
    """Told before the work starts, by the command and by Snakemake; dry runs, plans and pages still work."""
    small = copy_of(house, tmp_path)
    shutil.rmtree((small.folder / WEIGHTS).parent)
    results = str(small.folder / "results")
    mounts("--bind", results, results)
    mounts("-o", "remount,ro,bind", results)
    for command in (TRAIN, ("sample", "digits-base", "euler5")):
        result = small.mixflow(*command)
        assert result.returncode == 2
        assert "could not be written (Read-only file system): make 'results/" in sentence(result)
        assert "writable and run the same command again" in sentence(result)
    assert not (small.folder / "scratch/train").exists(), "nothing was begun"
    assert small.left() == {}
    result = small.snakemake(WEIGHTS)
    assert result.returncode != 0
    assert "Failed to create output directory" in result.stderr
    assert "Read-only file system" in result.stderr
    assert "Traceback" not in result.stderr
    mounts("-o", "remount,rw,bind", results)
    assert small.snakemake(WEIGHTS, METRICS).returncode == 0
    for made in (WEIGHTS, METRICS):
        assert (small.folder / made).read_bytes() == (house.folder / made).read_bytes()


# --- locks and dead processes ----------------------------------------------------------------------------------------


def start(house: House, *arguments: str) -> subprocess.Popen[bytes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        house.command(*arguments), cwd=house.folder, env=environment(), start_new_session=True, **quiet
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def clear_stale_lock(house: House) -> subprocess.CompletedProcess[str]:
    return house.run(str(house.folder / "workflow/clear_stale_lock.sh"))


def test_a_killed_head_process_and_its_stale_lock(house: House, tmp_path: Path) -> None:
    """SIGKILL of Snakemake alone: the trainer lives on, a new run waits for it, and what it made is taken."""
    small = copy_of(house, tmp_path)
    shutil.rmtree((small.folder / WEIGHTS).parent)
    scratch = small.folder / "scratch/train" / NAME
    head = start(small, WEIGHTS)
    wait_for(lambda: any(scratch.glob("*.lock")), head)
    assert clear_stale_lock(small).returncode == 1, "a live Snakemake keeps its lock"
    (trainer,) = {int(lock.read_text()) for lock in scratch.glob("*.lock") if lock.read_text()}
    os.kill(head.pid, signal.SIGKILL)
    head.wait()
    locked = small.snakemake(WEIGHTS)
    assert locked.returncode != 0
    assert "cannot be locked" in locked.stderr
    assert "--unlock" in locked.stderr
    cleared = clear_stale_lock(small)
    assert cleared.returncode == 0, cleared.stderr
    alive = Path(f"/proc/{trainer}").exists()
    result = small.snakemake(WEIGHTS, METRICS)
    assert result.returncode == 0, result.stderr[-3000:]
    if alive:
        assert not Path(f"/proc/{trainer}").exists(), "the new run waited for it"
    for made in (WEIGHTS, METRICS):
        assert (small.folder / made).read_bytes() == (house.folder / made).read_bytes()
    assert not list((small.folder / "scratch").rglob("*.lock"))


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="this machine has GPUs")
@pytest.mark.parametrize("gpus", [1, 2])
def test_gpus_that_are_not_there(house: House, tmp_path: Path, gpus: int) -> None:
    """One GPU is a process, two are torchrun's: asked for on a node without any."""
    small = copy_of(house, tmp_path)
    result = small.snakemake(WEIGHTS, "--forcerun", WEIGHTS, "--set-resources", f"train:gpu={gpus}")
    assert result.returncode != 0
    told = f"{gpus} GPU(s) were asked for but 0 are visible: check the allocation, the driver and, in a container"
    assert told in result.stderr
    assert told in (small.folder / f"logs/train/{NAME}.log").read_text()
    assert small.snakemake(WEIGHTS, METRICS).returncode == 0
    for made in (WEIGHTS, METRICS):
        assert (small.folder / made).read_bytes() == (house.folder / made).read_bytes()


# --- what is seen of it ----------------------------------------------------------------------------------------------


def test_status_and_where_tell_of_killed_work(house: House, tmp_path: Path) -> None:
    small = copy_of(house, tmp_path)
    long = {**SMALL, "checkpoints": {NAME: {"train": {"num_steps": 1_000_000}}}}
    (small.folder / "small.yaml").write_text(yaml.safe_dump(long))
    head = start(small, WEIGHTS)
    wait_for(lambda: any((small.folder / "scratch/train").rglob("progress.json")), head)
    running = small.run(sys.executable, "-m", "mixflow", "status")
    where = small.mixflow("where", "digits", NAME)
    os.killpg(head.pid, signal.SIGKILL)
    head.wait()
    assert f"train {NAME}: step " in running.stdout
    assert "running on " in running.stdout
    assert f"weights  {WEIGHTS}  running: step " in where.stdout
