"""Files from elsewhere: fetched once, whole or not at all, known by their hash. No torch.

A download entry is {"repo", "revision", "files"} (Hugging Face), {"url", "files"} (one file) or {"folder", "files"} (a
folder of one's own, used in place), each with an optional {"sha256": {file: digits}}. A file name with * or ? stands
for the one file of the source that matches; * does not reach across folders.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mixflow.runtime.errors import UserError
from mixflow.runtime.files import file_sha256, read_json, write_json
from mixflow.runtime.progress import log

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30.0
# A broken connection is taken up again as long as each attempt brings something, and otherwise this often.
_ATTEMPTS = 3
_LOG_EVERY_SECONDS = 15.0


def download(
    name: str,
    entry: dict[str, Any],
    *,
    out: Path,  # the record to write, results/downloads/{name}.json
    folder: Path = Path("downloads"),  # files lie in {folder}/{name}/, also those fetched by hand
    locks: Path = Path("results/locks"),  # {locks}/{name}.json keeps the hashes of what was fetched first
) -> Path:
    """Find or fetch the files of `entry`, check them, write the record `out` and return it.

    The record is {"download", "source", "folder", "files": {name in the entry: {"path", "sha256", "bytes"}}}. A file
    must have the entry's SHA-256 or, where the entry gives none and the source is not one's own folder, that of the
    first time, and one that begins as its name says (NAME-6726825d.pth, as torch.hub has it). Raises
    `UserError` for whatever keeps a file from being had, with the place for a copy fetched by hand.
    """
    target = Path(entry["folder"]).expanduser() if "folder" in entry else folder / name
    source = _Source(name, entry, target)
    lock = _Lock(locks / f"{name}.json", source) if "folder" not in entry else None
    files: dict[str, dict[str, Any]] = {}
    for wanted in entry["files"]:
        path, is_fresh = source.find_or_fetch(wanted)
        digits, asked = file_sha256(path), source.sha256(wanted)
        found = {"path": str(path), "sha256": digits, "bytes": path.stat().st_size}
        if asked is not None and digits != asked:
            if is_fresh:
                path.unlink()
            raise source.wrong_hash(path, digits, asked, is_fresh)
        if asked is None and lock is not None:
            source.require_digits_of_name(wanted, path, digits)
            lock.check(wanted, path, found)
        files[wanted] = found
    if lock is not None:
        lock.write({wanted: found for wanted, found in files.items() if source.sha256(wanted) is None})
    write_json(out, {"download": name, "source": entry, "folder": str(target), "files": files})
    return out


def downloaded(record: Path) -> dict[str, Path]:
    """Return the files of a record by their names in the entry. `UserError` if one is gone or has another size."""
    told = read_json(record)
    if not isinstance(told, dict) or not {"download", "files"} <= set(told):
        raise UserError(f"'{record}' is not a record of downloads: give the file that `mixflow download` wrote")
    files = {}
    for name, file in told["files"].items():
        path = Path(file["path"])
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            found = "is gone" if size is None else f"has {size:,} bytes instead of {file['bytes']:,}"
            raise UserError(
                f"'{path}' of download '{told['download']}' {found}: delete '{record}' and run the download again"
            )
        files[name] = path
    return files


def downloaded_file(record: Path) -> Path:
    """Return the only file of a record; raises `UserError` as `downloaded` does, and where it holds several."""
    files = downloaded(record)
    if len(files) != 1:
        raise UserError(
            f"'{record}' holds {len(files)} files ({', '.join(files)}) where one is expected: "
            "name a download of a single file"
        )
    return next(iter(files.values()))


class _Source:
    """Where the files of one entry come from, and what to say when they do not."""

    def __init__(self, name: str, entry: dict[str, Any], target: Path) -> None:
        self.name, self.entry, self.target = name, entry, target
        assert "url" not in entry or (len(entry["files"]) == 1 and not _is_glob(entry["files"][0]))

    @property
    def place(self) -> str:
        """The source in words."""
        if "repo" in self.entry:
            return f"Hugging Face repository '{self.entry['repo']}' (revision {self.entry['revision']})"
        return str(self.entry["url"]) if "url" in self.entry else f"folder '{self.target}'"

    def sha256(self, wanted: str) -> str | None:
        digits = (self.entry.get("sha256") or {}).get(wanted)
        return None if digits is None else digits.lower()

    def require_digits_of_name(self, wanted: str, path: Path, found: str) -> None:
        """Raise `UserError` for a file called NAME-0123abcd.pth whose SHA-256 does not begin so, and move it aside."""
        digits = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", wanted)
        if digits is not None and not found.startswith(digits[1]):
            path.rename(path.with_name(path.name + ".wrong"))
            raise UserError(
                f"'{path}' of download '{self.name}' has sha256 {found}, not one that begins with {digits[1]} as its "
                f"name says, and is now called {path.name}.wrong: run again to fetch it anew from {self.place}"
            )

    def find_or_fetch(self, wanted: str) -> tuple[Path, bool]:
        """Return the file, and whether it was fetched just now."""
        path = self._find(wanted)
        if path is not None:
            return path, False
        if "folder" in self.entry:
            raise self._no_such_file(wanted, _names_in(self.target))
        log.info("%s: fetching %s from %s", self.name, wanted, self.place)
        if "url" in self.entry:
            return self._fetch_url(wanted), True
        return self._fetch_from_hub(wanted), True

    def wrong_hash(self, path: Path, found: str, asked: str, is_fresh: bool) -> UserError:
        if is_fresh:
            return UserError(
                f"'{path.name}' of download '{self.name}', just fetched from {self.place}, has sha256 {found} but the "
                f"entry says {asked}, so it was removed: run again, or correct the entry if the file there has changed"
            )
        return UserError(
            f"'{path}' of download '{self.name}' has sha256 {found} but the entry says {asked}: put the right file "
            "there, or correct the entry"
        )

    def _find(self, wanted: str) -> Path | None:
        if not _is_glob(wanted):
            path = self.target / wanted
            return path if path.is_file() else None
        names = _matches(wanted, _names_in(self.target))
        if len(names) > 1:
            raise self._several(wanted, names, f"'{self.target}'")
        return self.target / names[0] if names else None

    # --- a single file by its address

    def _fetch_url(self, wanted: str) -> Path:
        path = self.target / wanted
        part = path.with_name(path.name + ".part")
        with self._local_errors(wanted), self._remote_errors(wanted):
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(self.entry["url"], part, f"{self.name}: {wanted}")
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            asked = self.sha256(wanted)
            if asked is not None and (found := file_sha256(part)) != asked:
                part.unlink()
                raise self.wrong_hash(path, found, asked, is_fresh=True)
            os.replace(part, path)
        return path

    # --- Hugging Face

    def _fetch_from_hub(self, wanted: str) -> Path:
        # Imported here, since it takes a while and a file found on disk does not need it.
        import huggingface_hub

        repo, revision = self.entry["repo"], self.entry["revision"]
        with self._local_errors(wanted), self._hub_errors(wanted):
            file = wanted
            if _is_glob(wanted):
                names = huggingface_hub.list_repo_files(repo, revision=revision)
                matching = _matches(wanted, names)
                if not matching:
                    raise self._no_such_file(wanted, names)
                if len(matching) > 1:
                    raise self._several(wanted, matching, self.place)
                file = matching[0]
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, local_dir=self.target))

    @contextlib.contextmanager
    def _hub_errors(self, wanted: str) -> Iterator[None]:
        from huggingface_hub import errors

        # The first base is that of the HTTP library underneath (requests, httpx, ...), whose own errors come through;
        # the Rust downloader of large files tells of a broken connection by a RuntimeError.
        http_error = errors.HfHubHTTPError.__bases__[0]
        failures: tuple[type[BaseException], ...] = (http_error, errors.EntryNotFoundError, OSError, RuntimeError)
        try:
            yield
        except failures as error:
            if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
                raise
            raise self._hub_error(wanted, error) from error

    def _hub_error(self, wanted: str, error: BaseException) -> UserError:
        from huggingface_hub import errors

        if isinstance(error, errors.LocalEntryNotFoundError):
            # "Not on disk either": what went wrong on the way to the hub is the cause.
            if error.__cause__ is None:
                return self._unreachable(wanted, error)
            error = error.__cause__
        if isinstance(error, errors.GatedRepoError):
            why = f"is behind conditions: accept them at {self._page} and set HF_TOKEN to a token of that account"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = (
                "cannot be fetched since the repository does not exist or is private: correct the entry (see "
                f"{self._page}), or set HF_TOKEN to a token that may read it"
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            why = f"cannot be fetched since there is no such revision: take one of {self._page}/refs"
        elif isinstance(error, errors.EntryNotFoundError):
            why = f"does not exist there: correct the name (the list is at {self._page}/tree/main)"
        elif getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            why = f"is refused: check that {self._page} is open to your account and set HF_TOKEN to its token"
        else:
            return self._unreachable(wanted, error)
        return self._unavailable(wanted, why)

    @property
    def _page(self) -> str:
        return f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{self.entry['repo']}"

    # --- sentences

    @contextlib.contextmanager
    def _remote_errors(self, wanted: str) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._unavailable(wanted, f"is refused (HTTP {error.code}): fetch it with a browser") from error
            if error.code in (404, 410):
                raise self._unavailable(
                    wanted, f"does not exist there (HTTP {error.code}): correct the entry"
                ) from error
            raise self._unreachable(wanted, error) from error
        except _WebPage as error:
            raise self._unavailable(
                wanted, "is answered by a web page in place of the file: fetch it with a browser"
            ) from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, _Broken) as error:
            raise self._unreachable(wanted, error) from error

    @contextlib.contextmanager
    def _local_errors(self, wanted: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _LOCAL_ERRORS:
                raise
            raise UserError(
                f"'{wanted}' of download '{self.name}' could not be written under '{self.target}' ({error.strerror}): "
                "make room or make the folder writable, and run again to go on where it stopped"
            ) from error

    def _unreachable(self, wanted: str, error: BaseException) -> UserError:
        # Errors of the hub run over several lines, of which the first says what happened.
        told = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
        lines = str(told).strip().splitlines() or [type(error).__name__]
        return self._unavailable(
            wanted, f"could not be fetched ({lines[0].rstrip('.')}): check the network and run again"
        )

    def _unavailable(self, wanted: str, why: str) -> UserError:
        return UserError(
            f"'{wanted}' of download '{self.name}' from {self.place} {why}, or put a copy at '{self.target / wanted}'"
        )

    def _no_such_file(self, wanted: str, names: Iterable[str]) -> UserError:
        there = sorted(names)
        listed = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
        return UserError(
            f"'{wanted}' of download '{self.name}' is not in {self.place}, which holds {listed or 'no files'}: correct "
            f"the name, or put the file at '{self.target / wanted}'"
        )

    def _several(self, wanted: str, names: list[str], where: str) -> UserError:
        return UserError(
            f"'{wanted}' of download '{self.name}' stands for {len(names)} files in {where} ({', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''}): write the name of one"
        )


class _Lock:
    """`results/locks/{name}.json`: source, hashes and sizes of the first time, {"source", "files": {name: {...}}}."""

    def __init__(self, path: Path, source: _Source) -> None:
        self.path, self.source = path, source
        self.origin = {key: source.entry[key] for key in ("repo", "revision", "url") if key in source.entry}
        self.known: dict[str, Any] = read_json(path) if path.exists() else {"source": self.origin, "files": {}}

    def check(self, wanted: str, path: Path, found: dict[str, Any]) -> None:
        """Raise `UserError` unless the file is that of the first time, and from the same source."""
        first = self.known["files"].get(wanted)
        if first is None:
            return
        if self.known["source"] != self.origin:
            old = ", ".join(map(str, self.known["source"].values()))
            raise UserError(
                f"'{path}' of download '{self.source.name}' was first fetched from {old} but the entry now says "
                f"{', '.join(map(str, self.origin.values()))}: if the change is meant, delete '{self.path}', and the "
                "file too unless it is the new one"
            )
        if first["sha256"] != found["sha256"]:
            raise UserError(
                f"'{path}' is not the file that was first downloaded as '{self.source.name}' (sha256 "
                f"{found['sha256']}, {found['bytes']:,} bytes, then {first['sha256']}, {first['bytes']:,} bytes): "
                f"delete the lock '{self.path}' if the change is meant, else the file"
            )

    def write(self, files: dict[str, dict[str, Any]]) -> None:
        """Remember the files that were not known yet."""
        new = {name: file for name, file in files.items() if name not in self.known["files"]}
        if new:
            kept = {name: {key: file[key] for key in ("sha256", "bytes")} for name, file in new.items()}
            source = self.known["source"] if self.known["files"] else self.origin
            write_json(self.path, {"source": source, "files": {**self.known["files"], **kept}})


_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class _Broken(Exception):
    """The connection ended before the file did."""


class _WebPage(Exception):
    """A page to log in, or to say that the file is gone, comes as a success."""


def _fetch(url: str, part: Path, title: str) -> None:
    """Bring `part` to the whole of `url`, going on where an earlier attempt left it."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part, title)
            return
        except (http.client.HTTPException, ConnectionError, TimeoutError, _Broken):
            gained = (part.stat().st_size if part.exists() else 0) > before
            failures = 1 if gained else failures + 1
            if failures >= _ATTEMPTS:
                raise
            log.info("%s: the connection broke, trying again", title)
            time.sleep(failures)


def _fetch_rest(url: str, part: Path, title: str) -> None:
    """Append what `part` lacks, or start over where the server cannot go on with the very same file."""
    tag = part.with_name(part.name + ".tag")
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "mixflow"})
    if have:
        # If-Range: the rest if the file is still the same one, else all of the new one.
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing lies beyond what we have
            raise
        part.unlink()
        raise _Broken("the partial file does not fit what the server has") from None
    with response:
        if response.headers.get_content_type() == "text/html" and not part.name.endswith(".html.part"):
            raise _WebPage
        if response.status != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if not have:
            part.unlink(missing_ok=True)
            tag.unlink(missing_ok=True)
            if validator and not validator.startswith("W/"):
                tag.write_text(validator)
        if total is not None and total - have > (free := shutil.disk_usage(part.parent).free):
            raise OSError(errno.ENOSPC, f"{(total - have) >> 20} MiB to come, {free >> 20} MiB free")
        last = time.monotonic()
        with open(part, "ab") as file:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                have += len(chunk)
                if time.monotonic() - last >= _LOG_EVERY_SECONDS:
                    last = time.monotonic()
                    log.info("%s: %d of %s MiB", title, have >> 20, "?" if total is None else total >> 20)
    if total is not None and have != total:
        raise _Broken(f"the connection ended after {have:,} of {total:,} bytes")
    tag.unlink(missing_ok=True)


def _is_glob(name: str) -> bool:
    return "*" in name or "?" in name


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that fit `pattern`, folder by folder; brackets are ordinary letters."""
    parts = [re.compile(fnmatch.translate(part.replace("[", "[[]"))) for part in pattern.split("/")]
    return sorted(
        name
        for name in names
        if len(sides := name.split("/")) == len(parts)
        and all(part.match(side) for part, side in zip(parts, sides, strict=True))
    )


def _names_in(folder: Path) -> list[str]:
    """Return the files under `folder`, without hidden ones (the hub's cache) and unfinished ones."""
    if not folder.is_dir():
        return []
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [
        name
        for name in names
        if not any(part.startswith(".") for part in name.split("/")) and not name.endswith((".part", ".part.tag"))
    ]
