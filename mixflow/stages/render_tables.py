"""Rows, figures and pages of a table: files in, files out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path, read_json, write_json
from mixflow.tables import Row, build_row, render_html, render_markdown


def make_row(settings: dict[str, Any], *, out: Path, root: Path = Path()) -> None:
    """Write a row's JSON from the metrics below `root`; `settings` is the slice `row` of the config.

    A cell whose metrics.json is not there is left empty, and the row says "not run".
    """
    write_json(out, build_row(settings, _reader(root)))


def render(
    settings: dict[str, Any],
    *,
    rows: list[Path],  # the rows' JSON files, in any order
    figures: Mapping[str, Path],  # name of the figure -> PNG
    markdown: Path,
    page: Path,
) -> None:
    """Write a table as Markdown (figures linked) and as one HTML page (figures inside); `settings`: slice `render`."""
    ordered = _in_order(settings, rows)
    shown = {name: figures[name] for name in settings["figures"] if name in figures}
    linked = {name: Path(os.path.relpath(path, markdown.parent)).as_posix() for name, path in shown.items()}
    embedded = {name: str(path) for name, path in shown.items()}
    _write(markdown, render_markdown(settings, ordered, linked))
    _write(page, render_html(settings, ordered, embedded))


def preview(settings: dict[str, Any], rows: list[dict[str, Any]], root: Path = Path()) -> str:
    """Return a table as Markdown from the metrics that there are below `root`; what is missing reads "not run yet".

    `settings` is the slice `render` of the config, `rows` its slices `row`. Nothing is written.
    """
    return render_markdown(settings, [build_row(row, _reader(root)) for row in rows], {})


def _reader(root: Path) -> Callable[[str], Any]:
    """Return a function from a path to the JSON there, None where there is none."""
    return lambda path: read_json(root / path) if (root / path).exists() else None


def _in_order(settings: dict[str, Any], files: list[Path]) -> list[Row]:
    rows = {row["row"]: row for row in map(read_json, files)}
    missing = [name for name in settings["rows"] if name not in rows]
    if missing:
        raise UserError(f"table '{settings['table']}' lacks its row '{missing[0]}': make that row first")
    return [rows[name] for name in settings["rows"]]


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
