"""Downloads: whole or absent, the same file every time, and one sentence for each way to fail."""

import builtins
import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub import errors

from mixflow.runtime import downloads
from mixflow.runtime.downloads import download, downloaded, downloaded_file
from mixflow.runtime.errors import UserError
from mixflow.stages import download as stage

BODY = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(BODY).hexdigest()
REPO = {"repo": "peer/model", "revision": "main", "files": ["weights.pt"]}


class Handler(http.server.BaseHTTPRequestHandler):
    """One file with an ETag and byte ranges; `cuts` breaks as many connections after a quarter of what is left."""

    body, etag, cuts, status, ranges, kind = BODY, '"1"', 0, 200, True, "application/octet-stream"
    seen: ClassVar[list] = []

    def do_GET(self):
        type(self).seen.append(self.headers.get("Range"))
        if self.status != 200:
            self.send_error(self.status)
            return
        start = 0
        asked = self.headers.get("Range")
        if asked and self.ranges and self.headers.get("If-Range") == self.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        else:
            self.send_response(200)
        rest = self.body[start:]
        if self.etag:
            self.send_header("ETag", self.etag)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Content-Type", self.kind)
        self.end_headers()
        if self.cuts:
            type(self).cuts -= 1
            rest = rest[: len(rest) // 4]
        self.wfile.write(rest)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    handler = type("OwnHandler", (Handler,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_port}/file.pth"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
        yield handler
        running.shutdown()


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Run `download` in a fresh folder; returns the record as a dict."""
    monkeypatch.chdir(tmp_path)

    def run(entry, name="it"):
        return json.loads(download(name, entry, out=Path(f"results/downloads/{name}.json")).read_text())

    return run


def url_entry(server, **more):
    return {"url": server.url, "files": ["sub/file.pth"], **more}


def files_under(folder):
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def test_a_url_is_fetched_once_and_recorded(server, fetch):
    entry = url_entry(server)
    record = fetch(entry)
    assert record == {
        "download": "it",
        "source": entry,
        "folder": "downloads/it",
        "files": {"sub/file.pth": {"path": "downloads/it/sub/file.pth", "sha256": SHA256, "bytes": len(BODY)}},
    }
    assert Path("downloads/it/sub/file.pth").read_bytes() == BODY
    assert files_under("downloads") == ["downloads/it/sub/file.pth"]
    assert fetch(entry) == record
    assert len(server.seen) == 1
    assert downloaded(Path("results/downloads/it.json")) == {"sub/file.pth": Path("downloads/it/sub/file.pth")}
    assert downloaded_file(Path("results/downloads/it.json")) == Path("downloads/it/sub/file.pth")


def test_a_broken_connection_is_taken_up_where_it_broke(server, fetch):
    server.cuts = 6  # more than the attempts in vain, but each brings something
    assert fetch(url_entry(server))["files"]["sub/file.pth"]["sha256"] == SHA256
    assert server.seen[0] is None
    assert server.seen[1] == f"bytes={len(BODY) // 4}-"
    assert len(server.seen) == 7


def test_a_killed_download_leaves_nothing_under_the_final_name_and_resumes(server, fetch, monkeypatch):
    server.cuts = 1

    def die(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads.time, "sleep", die)
    with pytest.raises(KeyboardInterrupt):
        fetch(url_entry(server))
    assert files_under(".") == ["downloads/it/sub/file.pth.part", "downloads/it/sub/file.pth.part.tag"]
    assert fetch(url_entry(server))["files"]["sub/file.pth"]["sha256"] == SHA256
    assert server.seen[1].startswith("bytes=")
    assert files_under("downloads") == ["downloads/it/sub/file.pth"]


@pytest.mark.parametrize(("etag", "ranges"), [("", True), ('W/"1"', True), ('"1"', False)])
def test_where_resuming_is_unsafe_it_starts_over(server, fetch, etag, ranges):
    server.cuts, server.etag, server.ranges = 1, etag, ranges
    assert fetch(url_entry(server))["files"]["sub/file.pth"]["sha256"] == SHA256


def test_a_file_that_changed_meanwhile_is_not_patched_together(server, fetch, monkeypatch):
    def change(seconds):
        server.body, server.etag = BODY[::-1], '"2"'

    server.cuts = 1
    monkeypatch.setattr(downloads.time, "sleep", change)
    assert fetch(url_entry(server))["files"]["sub/file.pth"]["sha256"] == hashlib.sha256(BODY[::-1]).hexdigest()


def test_a_body_that_is_always_cut_is_told(server, fetch):
    server.cuts, server.ranges = 100, False
    with pytest.raises(UserError, match=r"ended after 262,144 of 1,048,576 bytes.*copy at 'downloads/it/sub/file.pth'"):
        fetch(url_entry(server))
    assert "downloads/it/sub/file.pth" not in files_under(".")


@pytest.mark.parametrize(("status", "text"), [(404, "does not exist there"), (403, "is refused"), (500, "HTTP Error")])
def test_an_http_error_is_one_sentence(server, fetch, status, text):
    server.status = status
    with pytest.raises(UserError, match=rf"'sub/file.pth' of download 'it' from {server.url} .*{text}") as error:
        fetch(url_entry(server))
    assert "put a copy at 'downloads/it/sub/file.pth'" in str(error.value)


def test_a_login_page_is_not_taken_for_the_file(server, fetch):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="a web page in place of the file"):
        fetch(url_entry(server))
    assert files_under("downloads") == []


def test_no_server_at_all_is_one_sentence(fetch, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"could not be fetched .*check the network and run again, or put a copy at"):
        fetch({"url": "http://127.0.0.1:9/file", "files": ["file"]})


def test_a_full_disk_leaves_no_file(server, fetch, monkeypatch):
    def full(path, mode="r", *rest, **options):
        if str(path).endswith(".part") and "a" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return builtins.open(path, mode, *rest, **options)

    monkeypatch.setattr(downloads, "open", full, raising=False)
    with pytest.raises(UserError, match=r"could not be written under 'downloads/it' \(No space left"):
        fetch(url_entry(server))
    assert "downloads/it/sub/file.pth" not in files_under(".")


def test_a_disk_too_small_is_told_before_the_first_byte(server, fetch, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="1 MiB to come, 0 MiB free"):
        fetch(url_entry(server))


def test_the_entrys_hash_is_held(server, fetch):
    assert fetch(url_entry(server, sha256={"sub/file.pth": SHA256.upper()}))
    assert not Path("results/locks").exists()
    wrong = url_entry(server, sha256={"sub/file.pth": "0" * 64})
    with pytest.raises(UserError, match=rf"'downloads/it/sub/file.pth' .*has sha256 {SHA256} but the entry says 0000"):
        fetch(wrong)
    assert Path("downloads/it/sub/file.pth").exists()  # it was there before: never deleted
    with pytest.raises(UserError, match=r"just fetched from .*so it was removed"):
        fetch(wrong, name="other")
    assert files_under("downloads/other") == []


def test_without_a_hash_the_first_file_is_held(server, fetch):
    fetch(url_entry(server))
    lock = Path("results/locks/it.json")
    assert json.loads(lock.read_text()) == {
        "source": {"url": server.url},
        "files": {"sub/file.pth": {"sha256": SHA256, "bytes": len(BODY)}},
    }
    Path("downloads/it/sub/file.pth").write_bytes(b"another")
    with pytest.raises(UserError, match=r"is not the file that was first downloaded .*delete the lock 'results/locks"):
        fetch(url_entry(server))
    lock.unlink()
    assert fetch(url_entry(server))["files"]["sub/file.pth"]["bytes"] == 7


def test_a_file_of_another_source_is_not_taken_for_the_new_one(server, fetch):
    fetch(url_entry(server))
    with pytest.raises(UserError, match=rf"was first fetched from {server.url} but the entry now says .*moved"):
        fetch({**url_entry(server), "url": server.url + "?moved"})


def test_a_hand_placed_file_needs_no_network(fetch):
    Path("downloads/it").mkdir(parents=True)
    Path("downloads/it/weights.pt").write_bytes(b"by hand")
    record = fetch(REPO)
    assert record["files"]["weights.pt"]["sha256"] == hashlib.sha256(b"by hand").hexdigest()
    assert fetch({**REPO, "files": ["w*.pt"]}, name="it")["files"]["w*.pt"]["path"] == "downloads/it/weights.pt"


def test_a_folder_is_used_in_place(fetch, tmp_path):
    own = tmp_path / "mine"
    (own / "vae").mkdir(parents=True)
    (own / "vae/config.json").write_text("{}")
    (own / "ref.npz").write_bytes(b"r")
    record = fetch({"folder": str(own), "files": ["vae/config.json", "*.npz"]})
    assert record["folder"] == str(own)
    assert record["files"]["*.npz"]["path"] == str(own / "ref.npz")
    assert not Path("results/locks").exists()
    assert not Path("downloads").exists()
    with pytest.raises(UserError, match=r"'nose.npz' of download 'it' is not in folder .*ref.npz, vae/config.json"):
        fetch({"folder": str(own), "files": ["nose.npz"]})
    with pytest.raises(UserError, match="has sha256"):
        fetch({"folder": str(own), "files": ["ref.npz"], "sha256": {"ref.npz": "0" * 64}})
    (own / "ref2.npz").write_bytes(b"r")
    with pytest.raises(UserError, match=r"stands for 2 files in .*\(ref.npz, ref2.npz\): write the name of one"):
        fetch({"folder": str(own), "files": ["*.npz"]})
    with pytest.raises(UserError, match="holds no files"):
        fetch({"folder": str(tmp_path / "nowhere"), "files": ["a"]})


def hub(monkeypatch, names=("config.json", "a.pt", "sub/b.pt"), fails=None):
    """Put stand-ins in place of the hub's functions; returns what was asked for."""
    asked = []

    def hf_hub_download(repo_id, filename, *, revision, local_dir):
        asked.append((repo_id, filename, revision))
        if fails is not None:
            raise fails
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(filename.encode())
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo_id, revision: list(names))
    return asked


def test_a_repository_is_fetched_file_by_file(fetch, monkeypatch):
    asked = hub(monkeypatch)
    record = fetch({**REPO, "revision": "v1", "files": ["sub/b.pt", "*.pt"]})
    assert asked == [("peer/model", "sub/b.pt", "v1"), ("peer/model", "a.pt", "v1")]
    assert record["files"]["sub/b.pt"]["path"] == "downloads/it/sub/b.pt"
    assert record["files"]["*.pt"]["path"] == "downloads/it/a.pt"
    lock = json.loads(Path("results/locks/it.json").read_text())
    assert lock["source"] == {"repo": "peer/model", "revision": "v1"}
    fetch({**REPO, "revision": "v1", "files": ["sub/b.pt", "*.pt"]})
    assert len(asked) == 2


def test_a_pattern_that_fits_none_or_several_is_told(fetch, monkeypatch):
    hub(monkeypatch, names=("x1.pt", "x2.pt", "config.json"))
    with pytest.raises(UserError, match=r"'x\?.pt' of download 'it' stands for 2 files in Hugging Face .*x1.pt, x2.pt"):
        fetch({**REPO, "files": ["x?.pt"]})
    with pytest.raises(UserError, match=r"'\*.bin' .*is not in Hugging Face .*holds config.json, x1.pt, x2.pt"):
        fetch({**REPO, "files": ["*.bin"]})


def answer(status):
    """A response of the HTTP library that the hub's errors want."""
    library = sys.modules[errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0]]
    return library.Response(status, request=library.Request("GET", "https://huggingface.co/x"))


def hub_error(kind, status):
    return kind(f"{status} Client Error. (Request ID: 1)\n\nMore lines.", response=answer(status))


def behind(cause):
    """As the hub does when the file is not on disk either."""
    error = errors.LocalEntryNotFoundError("An error happened while trying to locate the file")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: hub_error(errors.GatedRepoError, 403),
            "accept them at https://huggingface.co/peer/model and set HF_TOKEN",
        ),
        (lambda: hub_error(errors.RepositoryNotFoundError, 401), "does not exist or is private"),
        (lambda: hub_error(errors.RevisionNotFoundError, 404), "no such revision"),
        (lambda: hub_error(errors.RemoteEntryNotFoundError, 404), "does not exist there: correct the name"),
        (lambda: hub_error(errors.HfHubHTTPError, 403), "is refused"),
        (lambda: behind(hub_error(errors.HfHubHTTPError, 403)), "is refused"),
        (
            lambda: behind(hub_error(errors.HfHubHTTPError, 503)),
            r"could not be fetched \(503 Client Error. \(Request ID: 1\)\): check",
        ),
        (lambda: behind(None), "could not be fetched"),
        (lambda: behind(errors.OfflineModeIsEnabled("offline mode is enabled")), "offline mode is enabled"),
        (lambda: TimeoutError("The read operation timed out"), r"\(The read operation timed out\)"),
        (lambda: RuntimeError("Data processing error: CAS service error"), "CAS service error"),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), "could not be written under 'downloads/it'"),
    ],
)
def test_each_way_the_hub_fails_is_one_sentence(fetch, monkeypatch, make, text):
    hub(monkeypatch, fails=make())
    with pytest.raises(UserError, match=text) as error:
        fetch(REPO)
    assert "'weights.pt' of download 'it'" in str(error.value)
    assert "\n" not in str(error.value)
    if "written" not in text:
        assert "Hugging Face repository 'peer/model' (revision main)" in str(error.value)
        assert "put a copy at 'downloads/it/weights.pt'" in str(error.value)


def test_a_wrong_file_of_a_repository_is_removed(fetch, monkeypatch):
    hub(monkeypatch)
    with pytest.raises(UserError, match="so it was removed"):
        fetch({**REPO, "files": ["a.pt"], "sha256": {"a.pt": "0" * 64}})
    assert files_under("downloads") == []


@pytest.mark.parametrize("name", ["weights.pt", "*.pt"])
def test_the_real_hub_client_without_a_hub(tmp_path, name):
    """HF_HUB_OFFLINE is read when the client is imported, hence another process."""
    code = (
        "import sys, pathlib; from mixflow.runtime.downloads import download; from mixflow.runtime.errors import *\n"
        f"try: download('it', {dict(REPO, files=[name])!r}, out=pathlib.Path('out.json'))\n"
        "except UserError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "could not be fetched" in done.stdout
    assert f"put a copy at 'downloads/it/{name}'" in done.stdout


def test_a_record_whose_file_is_gone_is_told(fetch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a").write_bytes(b"aaa")
    (tmp_path / "mine/b").write_bytes(b"b")
    fetch({"folder": str(tmp_path / "mine"), "files": ["a", "b"]})
    record = Path("results/downloads/it.json")
    with pytest.raises(UserError, match=r"holds 2 files \(a, b\) where one is expected"):
        downloaded_file(record)
    (tmp_path / "mine/a").write_bytes(b"aa")
    with pytest.raises(UserError, match=r"mine/a' of download 'it' has 2 bytes instead of 3: delete"):
        downloaded(record)
    (tmp_path / "mine/a").unlink()
    with pytest.raises(UserError, match="is gone: delete"):
        downloaded(record)
    Path("other.json").write_text("{}")
    with pytest.raises(UserError, match="is not a record of downloads"):
        downloaded(Path("other.json"))


def test_the_stage_writes_the_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/a").write_bytes(b"aaa")
    stage.run("it", {"folder": "mine", "files": ["a"]}, Path("results/downloads/it.json"))
    assert downloaded_file(Path("results/downloads/it.json")).read_bytes() == b"aaa"


def test_the_digits_in_a_files_name_are_those_of_its_hash(server, fetch):
    right, wrong = f"net-{SHA256[:8]}.pth", "net-0123abcd.pth"
    assert fetch({"url": server.url, "files": [right]})["files"][right]["sha256"] == SHA256
    with pytest.raises(UserError, match=r"not one that begins with 0123abcd as its name says"):
        fetch({"url": server.url, "files": [wrong]}, name="other")
    assert files_under("downloads/other") == ["downloads/other/net-0123abcd.pth.wrong"]
