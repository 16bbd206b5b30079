"""Tables: which files a table is made of, what a row says, and the page that people read. No torch.

A table is columns (sampler and metric) and rows (checkpoints); a cell is (checkpoint, sampler, metric), so that tables
share the sample sets they have in common.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mixflow.config import Config
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError

Row = dict[str, Any]  # the content of a row's JSON file, made by `build_row`
ReadJson = Callable[[str], Any]  # path -> content, None where there is no such file


@dataclass(frozen=True)
class Metric:
    """How a number is shown and read."""

    name: str  # in headers
    long_name: str
    decimals: int
    better: str | None  # "lower", "higher", or None where neither end is good
    definition: str


METRICS = {
    "fd": Metric(
        "FD", "Fréchet distance", 2, "lower",
        "between Gaussians fitted to the classifier's features of the samples and of the training images",
    ),
    "fd_held_out": Metric(
        "FD held-out", "Fréchet distance to held-out images", 2, "lower",
        "the same distance to real images that no model was trained on",
    ),
    "accuracy": Metric(
        "accuracy", "class accuracy", 3, "higher",
        "fraction of samples that the classifier assigns to the class they were made for",
    ),
    "variance_ratio": Metric(
        "variance ratio", "variance ratio", 3, None,
        "pixel variance of the samples over that of the training images; 1 is right, less means lost variety",
    ),
    "nearest_train": Metric(
        "nearest train", "distance to the nearest training image", 3, None,
        "mean over the samples, among as many training images as there are held-out ones",
    ),
    "nearest_held_out": Metric(
        "nearest held-out", "distance to the nearest held-out image", 3, None,
        "mean over the samples; when it is larger than the distance to training images, training images were memorised",
    ),
    "fid": Metric(
        "gFID", "Fréchet Inception distance", 2, "lower",
        "between Gaussians fitted to Inception features of the samples and of the training images",
    ),
    "sfid": Metric(
        "sFID", "spatial Fréchet Inception distance", 2, "lower",
        "the same distance on features that keep the spatial layout",
    ),
    "is": Metric(
        "IS", "Inception score", 1, "higher",
        "how surely Inception names a class for each sample, and how evenly the classes are met",
    ),
    "precision": Metric(
        "precision", "precision", 2, "higher", "fraction of samples that fall among real images in feature space"
    ),
    "recall": Metric(
        "recall", "recall", 2, "higher", "fraction of real images that fall among samples in feature space"
    ),
}  # fmt: skip

# --- files -----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One number of a table: where it comes from."""

    row: str
    checkpoint: str
    sampler: str
    metric: str
    file: str


def metric_path(checkpoint: str, sampler: str) -> str:
    """Return the metrics.json that holds every metric of a sample set."""
    return paths.metrics(checkpoint, sampler)


def cells(config: Config, table: str) -> list[Cell]:
    """Return the measured cells of a table, row by row."""
    entry = config.get("tables", table)
    return [
        Cell(row.key, row.checkpoint, sampler, column.metric, metric_path(row.checkpoint, sampler))
        for row in entry.rows
        if row.checkpoint
        for column in entry.columns
        for sampler in [row.sampler_of(column)]
    ]


def figure_paths(config: Config, table: str) -> list[str]:
    """Return the figures of a table, as they are declared."""
    return [paths.figure(table, figure) for figure in config.get("tables", table).figures]


def figure_files(settings: dict[str, Any]) -> list[str]:
    """Return what a figure is drawn from, one file per arm: `settings` is the slice `figure` of the config."""
    file_of: dict[str, Callable[[dict[str, Any]], str]] = {
        "samples": lambda arm: paths.samples(arm["checkpoint"], arm["sampler"]),
        "steps": lambda arm: paths.row(settings["table"], arm["row"]),
        "losses": lambda arm: paths.losses(arm["checkpoint"]),
    }
    return [file_of[settings["figure"]](arm) for arm in settings["arms"]]


# --- rows ------------------------------------------------------------------------------------------------------------


def build_row(settings: dict[str, Any], read_json: ReadJson) -> Row:
    """Return what a row says, from the slice `row` of the config and the metrics it names.

    Keys: table, row, label, status ("measured", "not run" or "quoted"), checkpoint, made_by, note, tolerance, cells.
    A cell has metric, sampler, value, paper, difference (value - paper), within_tolerance, and the file, its SHA-256
    parents and the commit behind it; what is unknown is None.
    """
    paper = settings.get("paper", [None] * len(settings["columns"]))
    built = [
        _build_cell(settings, column, number, read_json)
        for column, number in zip(settings["columns"], paper, strict=True)
    ]
    if settings["quoted"]:
        status = "quoted"
    else:
        status = "not run" if any(cell["value"] is None for cell in built) else "measured"
    kept = ("table", "row", "label", "checkpoint", "made_by", "sampled_by", "note", "tolerance")
    return {**{key: settings.get(key) for key in kept}, "status": status, "cells": built}


def _build_cell(settings: dict[str, Any], column: dict[str, Any], paper: float | None, read_json: ReadJson) -> Row:
    cell = {**column, "value": None, "paper": paper, "difference": None, "within_tolerance": None}
    if settings["quoted"]:
        return cell
    file = metric_path(settings["checkpoint"], column["sampler"])
    found = read_json(file)
    if found is None:
        return cell
    if column["metric"] not in found.get("metrics", {}):
        raise UserError(f"'{file}' holds no metric '{column['metric']}': delete it and evaluate again")
    value = found["metrics"][column["metric"]]
    record = read_json(paths.record(file)) or {}
    difference = None if paper is None else value - paper
    tolerance = settings.get("tolerance")
    return {
        **cell,
        "value": value,
        "difference": difference,
        "within_tolerance": _within(difference, paper, tolerance),
        "file": file,
        "parents": found.get("parents", {}),
        "commit": record.get("code", {}).get("commit"),
        "dirty": record.get("code", {}).get("dirty"),
    }


def _within(difference: float | None, paper: float | None, tolerance: dict[str, Any] | None) -> bool | None:
    if difference is None or paper is None or tolerance is None:
        return None
    return abs(difference) <= tolerance["relative"] * abs(paper)


# --- what a page says, apart from its markup -------------------------------------------------------------------------

_STATUS = {
    "measured": "measured",
    "not run": "not run yet",
    "quoted": "the paper's number, quoted; not reproduced here",
}


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{value:.{METRICS[metric].decimals}f}"


def _shown(cell: Row, row: Row) -> float | None:
    return cell["paper"] if row["status"] == "quoted" else cell["value"]


def _best(rows: list[Row], index: int, metric: str) -> str | None:
    """Return the best number of a column as it is shown: among measured rows, or among quoted ones if none is."""
    better = METRICS[metric].better
    measured = [row for row in rows if row["status"] != "quoted" and row["cells"][index]["value"] is not None]
    numbers = [_shown(row["cells"][index], row) for row in measured or rows]
    known = [number for number in numbers if number is not None and math.isfinite(number)]
    if better is None or len(known) < 2:
        return None
    return _number(min(known) if better == "lower" else max(known), metric)


def _arrow(metric: str) -> str:
    return {"lower": " ↓", "higher": " ↑", None: ""}[METRICS[metric].better]


def _beside(cell: Row) -> str:
    """Return what stands beside our number: the paper's, the difference, the verdict."""
    if cell["value"] is None or cell["paper"] is None:
        return "" if cell["paper"] is None else f"paper {_number(cell['paper'], cell['metric'])}"
    sign = "+" if cell["difference"] >= 0 else "−"
    text = f"paper {_number(cell['paper'], cell['metric'])}, {sign}{_number(abs(cell['difference']), cell['metric'])}"
    verdict = {None: "", True: ", within tolerance", False: ", outside tolerance"}[cell["within_tolerance"]]
    return text + verdict


def _made_by(row: Row) -> str:
    """Say in words what made a row."""
    if row["status"] == "quoted":
        return _STATUS["quoted"]
    made = row["made_by"]
    if "file" in made:
        text = f"weights from {made['file']}"
    else:
        start = "from scratch" if made["init"] == "scratch" else f"from {made['init']}"
        shift = "" if made["shift"] == 1 else f", shift {made['shift']:g}"
        text = (
            f"{start}, {made['num_steps']:,} steps of {made['batch_size']:,} at learning rate "
            f"{made['learning_rate']:g}, law {made['law']}, gamma {made['gamma']:g}{shift}, seed {made['seed']}"
        )
    commits = {f"{cell['commit'][:8]}{' (with changes)' if cell['dirty'] else ''}" for cell in _measured(row)}
    behind = f"; evaluated at commit {', '.join(sorted(commits))}" if commits else ""
    status = "" if row["status"] == "measured" else f"; {_STATUS[row['status']]}"
    return text + behind + status


def _measured(row: Row) -> list[Row]:
    return [cell for cell in row["cells"] if cell.get("commit")]


def _remarks(rows: list[Row]) -> list[tuple[str, str]]:
    """Return (label, sentence) for each row: what made it, its note, its tolerance."""
    all_quoted = all(row["status"] == "quoted" for row in rows)
    remarks = [("All rows", _STATUS["quoted"])] if all_quoted else []
    for row in rows:
        parts = [] if all_quoted else [_made_by(row)]
        if row.get("sampled_by"):
            parts.append(f"sampled by {', '.join(row['sampled_by'])}")
        if row["note"]:
            parts.append(row["note"])
        if row["tolerance"]:
            parts.append(f"tolerance {100 * row['tolerance']['relative']:g}%: {row['tolerance']['reason']}")
        if parts:
            remarks.append((row["label"], "; ".join(parts)))
    return remarks


def _definitions(table: dict[str, Any]) -> list[tuple[str, str]]:
    shown = dict.fromkeys(column["metric"] for column in table["columns"])
    metrics = [METRICS[name] for name in shown]
    return [(", ".join(dict.fromkeys((metric.name, metric.long_name))), metric.definition) for metric in metrics]


def _protocols(table: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (samplers, protocol): what the headers have no room for."""
    grouped: dict[str, list[str]] = {}
    for column in table["columns"]:
        if "protocol" in column and column["label"] not in grouped.setdefault(column["protocol"], []):
            grouped[column["protocol"]].append(column["label"])
    if len(grouped) == 1:
        return [("All columns", protocol) for protocol in grouped]
    return [("; ".join(labels), protocol) for protocol, labels in grouped.items()]


def _sections(table: dict[str, Any], rows: list[Row]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what stands under the table: (title, [(term, sentence)])."""
    sections = [
        ("How to read this", [("", note) for note in table.get("notes", [])]),
        ("Metrics", _definitions(table)),
        ("Samples", _protocols(table)),
        ("What made each row", _remarks(rows)),
    ]
    return [(title, items) for title, items in sections if items]


_CAPTIONS = {
    "samples": "The same noise and labels for every row of the table, one column per class",
    "steps": "Distance to the training images against the number of sampling steps",
    "losses": "Training loss, smoothed; losses of different time laws are not comparable with each other",
}

# --- Markdown --------------------------------------------------------------------------------------------------------


def render_markdown(table: dict[str, Any], rows: list[Row], figures: Mapping[str, str]) -> str:
    """Return the table as Markdown. `table`: slice `render`; `figures`: name -> path as seen from the page."""
    header = ["", *(f"{_md(column['label'])}<br>{_md(_head(column))}" for column in table["columns"])]
    lines = [f"# {_md(table['title'])}", "", _md_row(header), _md_row(["---", *("---:" for _ in table["columns"])])]
    best = [_best(rows, index, column["metric"]) for index, column in enumerate(table["columns"])]
    for row in rows:
        texts = [_md_cell(cell, row, winner) for cell, winner in zip(row["cells"], best, strict=True)]
        lines.append(_md_row([_md(row["label"]), *texts]))
    for name, path in figures.items():
        lines += ["", f"![{_CAPTIONS[name]}]({path})", "", f"*{_CAPTIONS[name]}.*"]
    for title, items in _sections(table, rows):
        lines += ["", f"## {title}", ""]
        lines += [f"- **{_md(term)}**: {_md(text)}" if term else f"- {_md(text)}" for term, text in items]
    return "\n".join(lines) + "\n"


def _head(column: dict[str, Any]) -> str:
    return METRICS[column["metric"]].name + _arrow(column["metric"])


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _md_row(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _md_cell(cell: Row, row: Row, best: str | None) -> str:
    number = _number(_shown(cell, row), cell["metric"])
    beside = "" if row["status"] == "quoted" else _beside(cell)
    return (f"**{number}**" if number == best else number) + (f"<br>({beside})" if beside else "")


# --- HTML ------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #5b6570; --page: #ffffff; --text: #16191d; --best: #e8f1fb; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4149; --soft: #a3adb8; --page: #15181c; --text: #e7eaee; --best: #1d3247; }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 75rem;
       background: var(--page); color: var(--text); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; min-width: 5rem; }
th span, td span { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--page); text-align: left; }
td.best { font-weight: 700; background: var(--best); }
figure { margin: 2rem 0; } figcaption { color: var(--soft); font-size: .9rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
li { overflow-wrap: anywhere; }
"""


def render_html(table: dict[str, Any], rows: list[Row], figures: Mapping[str, str]) -> str:
    """Return the table as one page that needs no network. `table`: slice `render`; `figures`: name -> PNG to embed."""
    title = html.escape(table["title"])
    heads = "".join(
        f'<th scope="col"><span>{html.escape(column["label"])}</span>{html.escape(_head(column))}</th>'
        for column in table["columns"]
    )
    best = [_best(rows, index, column["metric"]) for index, column in enumerate(table["columns"])]
    body = "\n".join(_html_row(row, best) for row in rows)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>',
        f"<tbody>\n{body}\n</tbody></table></div>",
        *(_html_figure(name, path) for name, path in figures.items()),
        *(_html_section(title, items) for title, items in _sections(table, rows)),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _html_row(row: Row, best: list[str | None]) -> str:
    status = "" if row["status"] == "measured" else f"<span>{row['status']}</span>"  # explained under the table
    texts = "".join(_html_cell(cell, row, winner) for cell, winner in zip(row["cells"], best, strict=True))
    return f'<tr><th scope="row">{html.escape(row["label"])}{status}</th>{texts}</tr>'


def _html_cell(cell: Row, row: Row, best: str | None) -> str:
    number = _number(_shown(cell, row), cell["metric"])
    beside = "" if row["status"] == "quoted" else _beside(cell)
    name = ' class="best"' if number == best else ""
    return f"<td{name}>{number}{f'<span>{html.escape(beside)}</span>' if beside else ''}</td>"


def _html_figure(name: str, path: str) -> str:
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    caption = _CAPTIONS[name]
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}.</figcaption></figure>'
    )


def _html_section(title: str, items: list[tuple[str, str]]) -> str:
    lines = "\n".join(
        f"<li>{f'<b>{html.escape(term)}</b>: ' if term else ''}{html.escape(text)}</li>" for term, text in items
    )
    return f"<h2>{title}</h2>\n<ul>\n{lines}\n</ul>"
