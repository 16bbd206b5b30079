"""Run records as sources of the report's numbers: what made a result, when, from what, and how to make it again."""

from __future__ import annotations

import datetime
import shlex
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from mixflow import report as pages
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import read_json
from mixflow.runtime.progress import duration

SHORT = 12  # digits of a hash that are shown


class Records:
    """The run records below a folder, as sources of the page: each once, in the order in which they are asked for."""

    def __init__(self, root: Path, options: str) -> None:
        """`options`: Snakemake's flags in the commands that make a result again."""
        self.root, self.options = root, options
        self.read: Callable[[str], Any] = cache(self._read)
        self.found: dict[str, str] = {}  # path of the record -> key

    def _read(self, path: str) -> Any:
        return read_json(self.root / path) if (self.root / path).exists() else None

    def chain(self, file: str | None) -> tuple[str, ...]:
        """Return the keys of the records behind a result, from the nearest back to the trained weights."""
        keys, record = [], paths.record(file) if file else None
        while record is not None and (told := self.read(record)) is not None:
            keys.append(self._key(record))
            behind = (told.get("parents", {}).get(role, {}).get("file") for role in ("samples", "weights", "init"))
            record = next((paths.record(parent) for parent in behind if parent), None)
        return tuple(dict.fromkeys(keys))

    def _key(self, record: str) -> str:
        return self.found.setdefault(record, f"record-{len(self.found) + 1}")

    def told(self) -> list[dict[str, Any]]:
        """Return the records that the page names."""
        return [self.read(record) for record in self.found]

    def sources(self) -> list[pages.Source]:
        """Return all records that were asked for, and those of the files that they were made from."""
        sources, done = [], 0
        while done < len(self.found):  # parents are found on the way
            for record, key in list(self.found.items())[done:]:
                sources.append(self._source(record, key))
                done += 1
        return sources

    def _source(self, record: str, key: str) -> pages.Source:
        told = self.read(record)
        settings, code, machine = told.get("settings", {}), told.get("code", {}), told.get("machine", {})
        measured = told.get("measured", {})
        seed, started = seed_of(settings), told.get("started", "")
        commit = commit_text(code)
        facts = [
            ("entries", ", ".join(_entries(settings))),
            ("seed", "" if seed is None else str(seed)),
            ("settings", _settings_text(settings)),
            ("commit", commit),
            ("made", date_text(started)),
            ("on", ", ".join(dict.fromkeys(machine.get("devices") or ()))),
            ("took", duration(measured["wall_seconds"]) if "wall_seconds" in measured else ""),
            ("file", _output(record, told)),
        ]
        parents = []
        for role, parent in told.get("parents", {}).items():
            behind = paths.record(parent["file"])
            known = self._key(behind) if self.read(behind) is not None else None
            parents.append((role, parent["file"], parent["sha256"][:SHORT], known))
        brief = [", ".join(_names(settings)), f"seed {seed}" if seed is not None else "", commit and f"commit {commit}"]
        file = _output(record, told)
        again = f"snakemake {shlex.quote(file)}{self.options} --forcerun {shlex.quote(file)}"
        return pages.Source(
            key=key,
            title=f"{_STAGES.get(told.get('stage', ''), told.get('stage', ''))} {' / '.join(_names(settings))}".strip(),
            brief=" · ".join(part for part in (*brief, date_text(started)) if part),
            facts=[(term, text) for term, text in facts if text],
            parents=parents,
            command=again if file.startswith("results/") else None,
        )


_STAGES = {
    "evaluate": "Metrics of",
    "sample": "Samples of",
    "train": "Training of",
    "import-weights": "Weights of",
    "import_weights": "Weights of",
    "cache-latents": "Latents",
    "cache_latents": "Latents",
    "train-extractor": "Feature network",
    "train_extractor": "Feature network",
    "make-reference": "Reference",
    "make_reference": "Reference",
    "slow-flow": "Slow Flow of",
}
# Where a slice of the config says the name of an entry, and the section that the entry stands in.
_SECTIONS = {
    "checkpoint": "checkpoints",
    "sampler_name": "samplers",
    "reference_name": "references",
    "extractor_name": "extractors",
    "latents": "latents",
}


def _names(settings: dict[str, Any]) -> list[str]:
    """Return the names of the entries that a result is called after."""
    for keys in (("checkpoint", "sampler_name"), ("reference_name",), ("extractor_name",), ("latents",)):
        if names := [settings[key] for key in keys if isinstance(settings.get(key), str)]:
            return names
    return []


def _entries(settings: dict[str, Any]) -> list[str]:
    return [f"{section}.{settings[key]}" for key, section in _SECTIONS.items() if isinstance(settings.get(key), str)]


def seed_of(settings: dict[str, Any]) -> int | None:
    """Return the seed of a stage, which stands in the part of the config that the stage carries out."""
    parts = [settings.get(part) for part in ("sampler", "train", "extractor", "dataset")]
    return next((part["seed"] for part in parts if isinstance(part, dict) and "seed" in part), None)


_TOLD = (
    *("law", "gamma", "shift", "num_steps", "batch_size", "learning_rate", "solver", "num_images", "labels"),
    "precision",
)


def _settings_text(settings: dict[str, Any]) -> str:
    """Return the settings that tell one run from another."""
    part = settings.get("train") or settings.get("sampler") or {}
    texts = [f"{key} {part[key]}" for key in _TOLD if key in part]
    scale = part.get("guidance", {}).get("scale", 1)
    return ", ".join([*texts, *([f"guidance {scale:g}"] if scale != 1 else ())])


def commit_text(code: dict[str, Any]) -> str:
    """Return the commit of a record, and whether files differed from it."""
    commit = code.get("commit")
    return f"{commit[:8]}{' (with changes)' if code.get('dirty') else ''}" if commit else ""


def date_text(started: str) -> str:
    """Return a time of a record as people write it."""
    return f"{datetime.datetime.fromisoformat(started):%-d %B %Y, %H:%M} UTC" if started else ""


def _output(record: str, told: dict[str, Any]) -> str:
    """Return the first file that a record speaks of."""
    name = next(iter(told.get("outputs", {})), "run.json")
    return f"{record.rsplit('/', 1)[0]}/{name}"


def picture(file: str, caption: str, alt: str, root: Path, sources: tuple[str, ...] = ()) -> pages.Figure:
    """Return a figure as the page holds it. Raises `UserError` for a file that is no PNG."""
    path = root / file
    if not path.exists():
        return pages.Figure(caption, alt, file)
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise UserError(f"'{path}' is no PNG file: draw it again")
    width, height = struct.unpack(">II", content[16:24])  # of its first part, IHDR
    return pages.Figure(caption, alt, file, content, width, height, sources)
