"""A table as one HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixflow.tables.differences import Comparison, compare
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

_STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #5b6570; --page: #ffffff; --text: #16191d; --best: #e8f1fb; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4149; --soft: #a3adb8; --page: #15181c; --text: #e7eaee; --best: #1d3247; }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 80rem;
       background: var(--page); color: var(--text); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; min-width: 5rem; }
th span, td span { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
tbody th { min-width: 7.5rem; } td.faint { color: var(--soft); }
td b { color: var(--text); } td.pair span { white-space: nowrap; }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--page); text-align: left; }
td.best { font-weight: 700; background: var(--best); }
figure { margin: 2rem 0; } figcaption { color: var(--soft); font-size: .9rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
li { overflow-wrap: anywhere; }
"""


def render_html(table: dict[str, Any], rows: list[Row], figures: Mapping[str, str]) -> str:
    """Return the table as one page that needs no network. `table`: slice `render`; `figures`: name -> PNG to embed."""
    title = html.escape(table["title"])
    best = [best_text(rows, index, column["metric"]) for index, column in enumerate(table["columns"])]
    comparisons, warnings = compare(rows), find_warnings(table, rows)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        _html_table(table, [_html_row(row, best) for row in rows]),
        *([f"<p>{html.escape(note)}</p>"] if (note := errors_note(rows)) else ()),
        *_html_paired(table, rows),
        *(_html_differences(table, comparisons) if comparisons else ()),
        *([_html_section(WARNINGS, warnings)] if warnings else ()),
        *(_html_figure(name, path) for name, path in figures.items()),
        *(_html_section(title, items) for title, items in sections(table, rows)),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _html_table(table: dict[str, Any], body: list[str]) -> str:
    heads = "".join(
        f'<th scope="col"><span>{html.escape(column["label"])}</span>{_html_head(column)}</th>'
        for column in table["columns"]
    )
    lines = "\n".join(body)
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )


def _html_head(column: dict[str, Any]) -> str:
    return html.escape(head_text(column)).replace(" ↓", "&nbsp;↓").replace(" ↑", "&nbsp;↑")


def _html_differences(table: dict[str, Any], comparisons: list[Comparison]) -> list[str]:
    body = []
    for label, control, cells in difference_rows(table, comparisons):
        texts = "".join(_html_number(*cell) for cell in cells)
        body.append(f'<tr><th scope="row">{html.escape(label)}{_html_small(control)}</th>{texts}</tr>')
    return [f"<h2>{DIFFERENCES}</h2>", _html_table(table, body), _html_items(legend(table, comparisons))]


def _html_paired(table: dict[str, Any], rows: list[Row]) -> list[str]:
    """Return the differences over replicates: what could have been seen first, each verdict a sentence on hovering."""
    paired = paired_rows(rows)
    if not paired:
        return []
    body = []
    for label, control, cells in paired:
        texts = "".join(_html_paired_cell(cell) for cell in cells)
        body.append(f'<tr><th scope="row">{html.escape(label)}{_html_small(control)}</th>{texts}</tr>')
    return [
        f"<h2>{DIFFERENCES}</h2>",
        f"<p>{html.escape(paired_note(rows))}</p>",
        _html_table(table, body),
        _html_items(paired_verdicts(table, rows)),
        _html_items(paired_legend(rows)),
    ]


def _html_paired_cell(cell: PairedCell) -> str:
    small = "".join(_html_small(text) for text in (cell.interval, cell.able))
    verdict = f"<b>{html.escape(cell.verdict)}</b>" if cell.is_shown else html.escape(cell.verdict)
    name = "pair" if cell.is_shown else "pair faint"
    return f'<td class="{name}" title="{html.escape(cell.sentence)}">{cell.number}{small}<span>{verdict}</span></td>'


def _html_row(row: Row, best: list[str | None]) -> str:
    status = "" if row["status"] == "measured" else f"<span>{row['status']}</span>"  # explained under the table
    texts = "".join(_html_cell(cell, row, winner) for cell, winner in zip(row["cells"], best, strict=True))
    return f'<tr><th scope="row">{html.escape(row["label"])}{status}</th>{texts}</tr>'


def _html_cell(cell: Row, row: Row, best: str | None) -> str:
    number = shown_text(cell, row)
    name = "best" if number == best else ""
    return _html_number(number, spread_text(cell), beside_text(cell, row), name)


def _html_number(number: str, error: str, beside: str, name: str) -> str:
    """Return a cell: the number, its error and what stands beside it below each other."""
    tag = f'<td class="{name}">' if name else "<td>"
    return f"{tag}{number}{_html_small(error.strip())}{_html_small(beside)}</td>"


def _html_small(text: str) -> str:
    return f"<span>{html.escape(text)}</span>" if text else ""


def _html_figure(name: str, path: str) -> str:
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    caption = CAPTIONS[name]
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}.</figcaption></figure>'
    )


def _html_section(title: str, items: list[tuple[str, str]]) -> str:
    return f"<h2>{title}</h2>\n{_html_items(items)}"


def _html_items(items: list[tuple[str, str]]) -> str:
    lines = "\n".join(
        f"<li>{f'<b>{html.escape(term)}</b>: ' if term else ''}{html.escape(text)}</li>" for term, text in items
    )
    return f"<ul>\n{lines}\n</ul>"
