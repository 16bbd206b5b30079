"""The sample archive: numpy and zipfile read what was written, whoever wrote it and however often it was cut."""

import errno
import io
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from mixflow.runtime.errors import UserError
from mixflow.runtime.npz import NpzWriter

SHAPE = (20, 6, 5, 3)


def contents(num=SHAPE[0], shape=SHAPE[1:]):
    images = np.random.default_rng(0).integers(0, 256, (num, *shape), dtype=np.uint8)
    return images, np.random.default_rng(1).integers(0, 1000, num)


def writer(folder, shape=SHAPE):
    folder.mkdir(exist_ok=True)
    return NpzWriter(folder, {"arr_0": (shape, np.uint8), "arr_1": (shape[:1], np.int64)})


def write_all(archive, starts=(0, 7, 14), size=7):
    images, labels = contents()
    for start in starts:
        archive.write(start, arr_0=images[start : start + size], arr_1=labels[start : start + size])


def value_offset(path, member):
    """Where the values of a stored member start, told by the archive alone."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        file.seek(archive.getinfo(member).header_offset + 26)
        name_length, extra_length = (int.from_bytes(file.read(2), "little") for _ in range(2))
        file.seek(name_length + extra_length, os.SEEK_CUR)
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()


def test_it_holds_what_savez_would_have_stored(tmp_path):
    images, labels = contents()
    archive = writer(tmp_path / "work")
    archive.create()
    write_all(archive)
    archive.finish(tmp_path / "out" / "samples.npz")
    np.savez(tmp_path / "oracle.npz", images, labels)
    with zipfile.ZipFile(tmp_path / "out" / "samples.npz") as ours, zipfile.ZipFile(tmp_path / "oracle.npz") as oracle:
        assert ours.testzip() is None
        assert ours.namelist() == oracle.namelist() == ["arr_0.npy", "arr_1.npy"]
        for mine, theirs in zip(ours.infolist(), oracle.infolist(), strict=True):
            assert (mine.CRC, mine.file_size) == (theirs.CRC, theirs.file_size)
            assert mine.compress_type == zipfile.ZIP_STORED
            assert ours.read(mine) == oracle.read(theirs)
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as loaded:
        assert np.array_equal(loaded["arr_0"], images)
        assert np.array_equal(loaded["arr_1"], labels)


def test_members_can_be_mapped_in_place(tmp_path):
    images, labels = contents()
    archive, path = writer(tmp_path / "work"), tmp_path / "samples.npz"
    archive.create()
    write_all(archive)
    archive.finish(path)
    for member, array in (("arr_0.npy", images), ("arr_1.npy", labels)):
        offset = value_offset(path, member)
        assert offset % 64 == 0
        assert np.array_equal(np.memmap(path, array.dtype, "r", offset, array.shape), array)


def test_equal_contents_give_equal_bytes_in_any_order_of_writing(tmp_path):
    for name, starts in (("a", (0, 7, 14)), ("b", (14, 0, 7))):
        archive = writer(tmp_path / name)
        archive.create()
        write_all(archive, starts)
        archive.finish(tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_new_attempt_keeps_what_is_done_and_finishes_twice(tmp_path):
    """Also when the first attempt was killed after `finish`, before it could record its success."""
    archive = writer(tmp_path / "work")
    archive.create()
    write_all(archive, (7,))
    again = writer(tmp_path / "work")
    again.create()
    assert again.done.tolist() == [False] * 7 + [True] * 7 + [False] * 6
    write_all(again, (0, 14))
    again.finish(tmp_path / "samples.npz")
    whole = (tmp_path / "samples.npz").read_bytes()
    third = writer(tmp_path / "work")
    third.create()
    assert third.done.all()
    third.finish(tmp_path / "samples.npz")
    assert (tmp_path / "samples.npz").read_bytes() == whole


def test_losing_the_flags_loses_the_rows_but_no_result(tmp_path):
    archive = writer(tmp_path / "work")
    archive.create()
    write_all(archive)
    archive.finish(tmp_path / "samples.npz")
    (tmp_path / "work" / "done.npy").unlink()
    again = writer(tmp_path / "work")
    again.create()
    assert not again.done.any()
    with np.load(tmp_path / "samples.npz") as loaded:
        assert np.array_equal(loaded["arr_0"], contents()[0])


def test_processes_write_side_by_side(tmp_path):
    archive = writer(tmp_path / "work")
    archive.create()
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from tests.unit.test_npz import write_all, writer\n"
        "write_all(writer(Path(sys.argv[2])), map(int, sys.argv[3:]))"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, root, str(tmp_path / "work"), *starts])
        for starts in (["0", "14"], ["7"])
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    archive.finish(tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as loaded:
        assert np.array_equal(loaded["arr_0"], contents()[0])


def test_missing_rows_are_never_finished(tmp_path):
    archive = writer(tmp_path / "work")
    archive.create()
    write_all(archive, (0, 7))
    with pytest.raises(AssertionError, match="rows are missing"):
        archive.finish(tmp_path / "samples.npz")
    assert not (tmp_path / "samples.npz").exists()


def test_another_file_system_gets_a_copy(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    archive = writer(tmp_path / "work")
    archive.create()
    write_all(archive)
    archive.finish(tmp_path / "samples.npz")
    assert os.stat(tmp_path / "samples.npz").st_nlink == 1
    assert (tmp_path / "samples.npz").read_bytes() == archive.path.read_bytes()


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"samples.npz' could not be written because the disk is full"):
        writer(tmp_path / "work").create()
    assert os.listdir(tmp_path / "work") == []


def test_a_file_system_that_cannot_reserve_is_used_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    archive = writer(tmp_path / "work")
    archive.create()
    write_all(archive)
    archive.finish(tmp_path / "samples.npz")
    with zipfile.ZipFile(tmp_path / "samples.npz") as whole:
        assert whole.testzip() is None


@pytest.mark.slow
def test_more_than_four_gib(tmp_path, monkeypatch):
    """5 GiB of (sparse) zeros, and labels at an offset that needs Zip64."""
    monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, start, size: os.ftruncate(descriptor, size))
    num = 5 * 1024 // 3
    archive = writer(tmp_path / "work", (num, 1024, 1024, 3))
    archive.create()
    last = np.full((1, 1024, 1024, 3), 7, dtype=np.uint8)
    archive.write(num - 1, arr_0=last, arr_1=np.array([999]))
    done = io.BytesIO()
    np.save(done, np.ones(num, dtype=bool))
    (tmp_path / "work" / "done.npy").write_bytes(done.getvalue())
    path = tmp_path / "samples.npz"
    archive.finish(path)
    assert path.stat().st_size > 1 << 32
    with np.load(path) as loaded:
        assert loaded["arr_1"][-1] == 999  # behind the 4 GiB, and its checksum is right
    images = np.memmap(path, np.uint8, "r", value_offset(path, "arr_0.npy"), (num, 1024, 1024, 3))
    assert np.array_equal(images[-1], last[0])
    assert not images[-2].any()
