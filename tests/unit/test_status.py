"""The progress of work as its files tell it."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixflow.runtime.progress import PROGRESS_FILE, Progress, last_sign
from mixflow.stages.status import pieces, render

KEY = "0123456789abcdef"
NOW = datetime.datetime(2026, 1, 2, 12, 0, 0, tzinfo=datetime.UTC)


def work(scratch: Path, *names: str, age: float, **told) -> Path:
    """Leave a work folder as a run on another machine would have left it `age` seconds ago."""
    folder = scratch.joinpath(*names) / KEY
    folder.mkdir(parents=True)
    sign = {
        "name": "/".join(names[1:]), "state": "running", "unit": "step", "done": 300, "total": 1000, "first": 100,
        "seconds": 50.0, "images_per_second": 800.0, "host": "node7", "process": 1, "slurm_job": "42",
        "written": (NOW - datetime.timedelta(seconds=age)).isoformat(),
    }  # fmt: skip
    (folder / PROGRESS_FILE).write_text(json.dumps({**sign, **told}))
    return folder


def test_running_work_and_its_time_left(tmp_path: Path) -> None:
    work(tmp_path, "train", "sit-xl2-256-mixflow", age=4)
    (piece,) = pieces(tmp_path, NOW)
    assert (piece.stage, piece.name, piece.state) == ("train", "sit-xl2-256-mixflow", "running")
    assert piece.seconds_left == 700 * 50 / 200
    text = render([piece], tmp_path)
    assert "train sit-xl2-256-mixflow: step 300/1,000 (30%), 800 images/s, 2 min 55 s left" in text
    assert "running on node7, Slurm job 42, last sign of life 4 s ago" in text
    assert "same command" not in text


@pytest.mark.parametrize(
    ("age", "told", "state", "words"),
    [
        (59, {}, "running", "running on node7"),
        (7200, {}, "silent", "last sign of life 2 h 00 min ago: killed, or its machine or this disk is out of reach"),
        (200, {"seconds": 20_000.0}, "running", "running"),  # a unit takes 100 s
        (600, {"done": 100}, "running", "running"),  # nothing yet: the network is loaded and compiled
        (1000, {"done": 100}, "silent", "silent"),
        (30, {"state": "closed"}, "stopped", "stopped on node7, Slurm job 42 30 s ago, saved"),
        (30, {"state": "closed", "done": 1000}, "running", "its result is being written"),
        (-20, {}, "running", "last sign of life 0 s ago"),  # the clock of another machine is ahead
    ],
)
def test_states(tmp_path: Path, age: float, told: dict, state: str, words: str) -> None:
    work(tmp_path, "train", "x", age=age, **told)
    found = pieces(tmp_path, NOW)
    assert [piece.state for piece in found] == [state]
    text = render(found, tmp_path)
    assert words in text
    assert ("goes on from there when the same command is called again" in text) == (state != "running")


def test_what_stopped_shows_the_last_line_of_its_log(tmp_path: Path) -> None:
    folder = work(tmp_path, "sample", "x", "heun50", age=9000)
    (folder / "log.txt").write_text("first\n2026-01-02 x/heun50: the disk is full\n")
    assert "last in its log: 2026-01-02 x/heun50: the disk is full" in render(pieces(tmp_path, NOW), tmp_path)


def test_work_that_told_nothing_yet_and_broken_files(tmp_path: Path) -> None:
    (tmp_path / "train" / "new" / KEY).mkdir(parents=True)
    broken = work(tmp_path, "train", "cut", age=1)
    (broken / PROGRESS_FILE).write_text("{")
    old = broken.parent.parent / "old" / KEY
    old.mkdir(parents=True)
    os.utime(old, (1.0, 1.0))
    found = pieces(tmp_path)
    assert [(piece.name, piece.state) for piece in found] == [("cut", "running"), ("new", "running"), ("old", "silent")]
    assert "train new: nothing is done yet" in render(found, tmp_path)


def test_nothing_to_tell(tmp_path: Path, mixflow) -> None:
    result = mixflow("status")
    assert result.returncode == 0
    assert result.stdout == "no unfinished work in 'scratch'\n"


def test_signs_of_life(tmp_path: Path) -> None:
    progress = Progress("x", 10, "batch", done=2, folder=tmp_path)
    sign = last_sign(tmp_path)
    assert (sign["done"], sign["total"], sign["first"], sign["state"]) == (2, 10, 2, "running")
    for _ in range(5):
        progress.advance(1, 50)
    assert last_sign(tmp_path)["done"] == 2, "at most every few seconds"
    progress.advance(8, 400)  # several processes shared the last round
    progress.close()
    sign = last_sign(tmp_path)
    assert (sign["done"], sign["state"]) == (10, "closed")
    assert sign["images_per_second"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_FILE]


def test_signs_that_cannot_be_written_stop_no_work(tmp_path: Path) -> None:
    progress = Progress("x", 10, "batch", folder=tmp_path / "gone")
    progress.advance(1, 50)
    progress.close()
    assert last_sign(tmp_path / "gone") is None


def test_a_second_process_is_quiet_for_a_while(tmp_path: Path) -> None:
    """The first process says what is wrong; the launcher ends the others before they repeat it."""
    command = [sys.executable, "-m", "mixflow", "train", "x", "--settings", "{"]
    environment = {**os.environ, "RANK": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "--settings is not valid JSON" in result.stderr  # nobody ended it, so that it is said
