"""The log of an attempt is kept beside the resume state, and the next attempt's log begins with it."""

import logging

from mixflow.runtime.files import WorkFolder
from mixflow.runtime.progress import log, start_logging


def attempt(tmp_path, line, done=False):
    """Log a line as an attempt of a job does, from an empty log: Snakemake deletes that of the attempt before."""
    declared = tmp_path / "train.log"
    declared.unlink(missing_ok=True)
    start_logging(str(declared), quiet=True)
    work = WorkFolder(tmp_path / "scratch", "train", "tiny", "key")
    folder = work.open()
    log.info("%s", line)
    kept = (folder / "log.txt").read_text()
    if done:
        work.remove()
    work.close()
    log.info("after the end")
    return declared.read_text(), kept


def test_each_attempt_begins_with_what_earlier_ones_logged(tmp_path):
    attempt(tmp_path, "first")
    attempt(tmp_path, "second")
    declared, kept = attempt(tmp_path, "third", done=True)
    told = [line.partition(" ")[2].partition(" ")[2] for line in declared.splitlines()]
    assert told == ["first", "after the end", "second", "after the end", "third", "after the end"]
    assert kept.splitlines() == declared.splitlines()[:-1]
    assert not (tmp_path / "scratch/train").exists()
    assert not any(type(handler) is not logging.FileHandler for handler in log.handlers)


def test_a_log_that_was_not_deleted_is_not_told_twice(tmp_path):
    for line in ("first", "second"):
        start_logging(str(tmp_path / "train.log"), quiet=True)
        work = WorkFolder(tmp_path / "scratch", "train", "tiny", "key")
        work.open()
        log.info("%s", line)
        work.close()
    assert (tmp_path / "train.log").read_text().count("first") == 1
