"""Nothing half-written is ever taken for a result."""

import multiprocessing
import os
import time

import pytest

from mixflow.runtime.errors import UserError
from mixflow.runtime.files import WorkFolder, atomic_path, read_json, write_json


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write_half():
        with atomic_path(target) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_whole_write_follows_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "sub" / "a.bin") as temporary:
            temporary.write_bytes(b"x")
            temporary.chmod(0o600)  # as safetensors does
    finally:
        os.umask(old)
    assert (tmp_path / "sub" / "a.bin").stat().st_mode & 0o777 == 0o644


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_broken_json_is_told_in_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "b.json")


def _hold(root, seconds, ready):
    work = WorkFolder(root, "train", "x", "k")
    work.open()
    ready.set()
    time.sleep(seconds)
    work.remove()


def test_a_second_process_waits_for_the_first(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, 1.0, ready))
    holder.start()
    ready.wait(10)
    start = time.monotonic()
    work = WorkFolder(tmp_path, "train", "x", "k")
    folder = work.open()
    assert time.monotonic() - start > 0.5
    assert folder.is_dir()
    holder.join()
    assert (folder.with_name("k.lock")).exists(), "the first holder must not have removed the lock of the second"
    work.remove()
    assert not (tmp_path / "train").exists()


def test_a_killed_holder_leaves_no_stale_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, 60.0, ready))
    holder.start()
    ready.wait(10)
    holder.kill()
    holder.join()
    start = time.monotonic()
    WorkFolder(tmp_path, "train", "x", "k").open()
    assert time.monotonic() - start < 5
