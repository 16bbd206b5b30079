"""A table as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixflow.tables.differences import compare
from mixflow.tables.rows import Row
from mixflow.tables.words import (
    CAPTIONS,
    DIFFERENCES,
    WARNINGS,
    PairedCell,
    beside_text,
    best_text,
    difference_rows,
    errors_note,
    find_warnings,
    head_text,
    legend,
    paired_legend,
    paired_note,
    paired_rows,
    paired_verdicts,
    sections,
    shown_text,
    spread_text,
)


def render_markdown(table: dict[str, Any], rows: list[Row], figures: Mapping[str, str]) -> str:
    """Return the table as Markdown. `table`: slice `render`; `figures`: name -> path as seen from the page."""
    best = [best_text(rows, index, column["metric"]) for index, column in enumerate(table["columns"])]
    lines = [f"# {_md(table['title'])}", "", *_md_head(table)]
    for row in rows:
        texts = [_md_cell(cell, row, winner) for cell, winner in zip(row["cells"], best, strict=True)]
        lines.append(_md_row([_md(row["label"]), *texts]))
    if note := errors_note(rows):
        lines += ["", note]
    if paired := paired_rows(rows):
        lines += ["", f"## {DIFFERENCES}", "", paired_note(rows), "", *_md_head(table)]
        for label, control, of_row in paired:
            texts = [_md_paired(cell) for cell in of_row]
            lines.append(_md_row([f"{_md(label)}<br>({_md(control)})", *texts]))
        lines += ["", *_md_items(paired_verdicts(table, rows)), "", *_md_items(paired_legend(rows))]
    if comparisons := compare(rows):
        lines += ["", f"## {DIFFERENCES}", "", *_md_head(table)]
        for label, control, cells in difference_rows(table, comparisons):
            texts = [f"{number}{error}<br>({words})" if words else number for number, error, words, _ in cells]
            lines.append(_md_row([f"{_md(label)}<br>({_md(control)})", *texts]))
        lines += ["", *_md_items(legend(table, comparisons))]
    if warnings := find_warnings(table, rows):
        lines += ["", f"## {WARNINGS}", "", *_md_items(warnings)]
    for name, path in figures.items():
        lines += ["", f"![{CAPTIONS[name]}]({path})", "", f"*{CAPTIONS[name]}.*"]
    for title, items in sections(table, rows):
        lines += ["", f"## {title}", "", *_md_items(items)]
    return "\n".join(lines) + "\n"


def _md_paired(cell: PairedCell) -> str:
    verdict = f"**{cell.verdict}**" if cell.is_shown else cell.verdict
    return "<br>".join(part for part in (cell.number, cell.interval, cell.able, verdict) if part)


def _md_head(table: dict[str, Any]) -> list[str]:
    header = ["", *(f"{_md(column['label'])}<br>{_md(head_text(column))}" for column in table["columns"])]
    return [_md_row(header), _md_row(["---", *("---:" for _ in table["columns"])])]


def _md_items(items: list[tuple[str, str]]) -> list[str]:
    return [f"- **{_md(term)}**: {_md(text)}" if term else f"- {_md(text)}" for term, text in items]


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _md_row(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _md_cell(cell: Row, row: Row, best: str | None) -> str:
    number, beside = shown_text(cell, row), beside_text(cell, row)
    error = spread_text(cell)
    return (f"**{number}**" if number == best else number) + error + (f"<br>({beside})" if beside else "")
