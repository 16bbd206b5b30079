"""Tables: which files a table is made of, what a row says, and the page that people read. No torch.

A table is columns (sampler and metric) and rows (checkpoints); a cell is (checkpoint, sampler, metric), so that tables
share the sample sets they have in common.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Iterator, Mapping
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
    paper_decimals: int | None = None  # of papers, where they print fewer
    factor: float = 1  # what is shown over what is stored, in metrics.json as in `paper:`


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
        "precision", "precision as in OpenAI's evaluator", 3, "higher",
        "fraction of samples inside the ball of a real image, which reaches to its 3rd nearest other one (k = 3); "
        "distances in half precision",
        paper_decimals=2,
    ),
    "recall": Metric(
        "recall", "recall as in OpenAI's evaluator", 3, "higher",
        "fraction of real images inside the ball of a sample (k = 3); distances in half precision",
        paper_decimals=2,
    ),
    "precision_exact": Metric(
        "precision (exact)", "precision", 3, "higher",
        "the same fraction (k = 3) with exact distances; half precision reads a little higher",
        paper_decimals=2,
    ),
    "recall_exact": Metric(
        "recall (exact)", "recall", 3, "higher",
        "the same fraction (k = 3) with exact distances; half precision reads a little higher",
        paper_decimals=2,
    ),
    "kid": Metric(
        "KID ×1000", "kernel Inception distance", 2, "lower",
        "unbiased squared MMD with a cubic kernel between Inception features of samples and real images, mean over 100 "
        "subsets of 1,000; shown times 1,000, as papers do; chance can take it a little below 0",
        factor=1000,
    ),
    "density": Metric(
        "density", "density", 3, "higher",
        "how many real images' balls a sample lies in, over k = 5; exact distances; about 1 where samples lie as real "
        "images do, more where they crowd together",
    ),
    "coverage": Metric(
        "coverage", "coverage", 3, "higher",
        "fraction of real images with a sample inside their ball (k = 5); exact distances",
    ),
    "fd_dinov2": Metric(
        "FD-DINOv2", "Fréchet distance in DINOv2's features", 2, "lower",
        "between Gaussians fitted to the class tokens of DINOv2 ViT-L/14 for the samples and for the training images",
    ),
}  # fmt: skip

NOISE = 2  # standard errors: a difference that chance exceeds in one case of twenty
# The FID Lottery (arXiv 2606.20536): SiTs on ImageNet 256 that differ in the training seed alone; gaps below it are
# inconclusive. Nobody has measured it for the other Fréchet distances, nor for post-training from one checkpoint.
RETRAINING_FLOOR = 0.013
FRECHET = ("fd", "fd_held_out", "fid", "sfid", "fd_dinov2")

# --- files -----------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One number of a table: where it comes from."""

    row: str
    checkpoint: str
    sampler: str
    metric: str
    file: str


def cells(config: Config, table: str) -> list[Cell]:
    """Return the measured cells of a table, row by row."""
    rows = [row for row in config.get("tables", table).rows if row.checkpoint]
    settings = [config.slice("row", table, row.key) for row in rows]
    return [
        Cell(row["row"], row["checkpoint"], column["sampler"], column["metric"], _file(row, column))
        for row in settings
        for column in row["columns"]
    ]


def metric_files(settings: dict[str, Any]) -> list[str]:
    """Return every metrics.json behind a row, each once: `settings` is the slice `row` of the config."""
    if settings["quoted"]:
        return []
    return list(dict.fromkeys(_file(settings, column) for column in settings["columns"]))


def _file(row: dict[str, Any], column: dict[str, Any]) -> str:
    """Return the metrics.json behind a cell of the slice `row`."""
    return paths.metrics(row["checkpoint"], column["sampler"], column.get("reference"))


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

    Keys: table, row, label, status ("measured", "not run" or "quoted"), checkpoint, against, made_by, note, tolerance,
    paper_labels, cells. A cell has metric, sampler, value, standard_error (of sampling), paper, difference (value -
    paper), within_tolerance, within_noise, labels, num_images, warnings, and the file, its SHA-256 parents and the
    commit behind it; what is unknown is None.
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
    kept = (
        "table", "row", "label", "checkpoint", "against", "made_by", "sampled_by", "note", "tolerance", "paper_labels"
    )  # fmt: skip
    return {**{key: settings.get(key) for key in kept}, "status": status, "cells": built}


def _build_cell(settings: dict[str, Any], column: dict[str, Any], paper: float | None, read_json: ReadJson) -> Row:
    unknown = ("value", "standard_error", "difference", "within_tolerance", "within_noise")
    cell = {**column, "paper": paper, **dict.fromkeys(unknown)}
    if settings["quoted"]:
        return cell
    file = _file(settings, column)
    found = read_json(file)
    if found is None:
        return cell
    metric = column["metric"]
    if metric not in found.get("metrics", {}):
        raise UserError(f"'{file}' holds no metric '{metric}': delete it and evaluate again")
    value, error = found["metrics"][metric], found.get("standard_errors", {}).get(metric)
    record = read_json(paths.record(file)) or {}
    difference = None if paper is None else value - paper
    return {
        **cell,
        "value": value,
        "standard_error": error,
        "difference": difference,
        "within_tolerance": _within_tolerance(difference, paper, settings.get("tolerance")),
        "within_noise": _within_noise(difference, error, metric),
        # Before metrics.json said it, the sampler behind it did.
        "labels": found.get("labels") or found.get("protocol", {}).get("sampler", {}).get("labels"),
        "num_images": found.get("num_images"),
        "warnings": found.get("warnings", []),
        "file": file,
        "parents": found.get("parents", {}),
        "commit": record.get("code", {}).get("commit"),
        "dirty": record.get("code", {}).get("dirty"),
    }


def _within_tolerance(difference: float | None, paper: float | None, tolerance: dict[str, Any] | None) -> bool | None:
    if difference is None or paper is None or tolerance is None:
        return None
    return abs(difference) <= tolerance["relative"] * abs(paper)


def _within_noise(difference: float | None, error: float | None, metric: str) -> bool | None:
    """Is the difference to the paper's number what our sampling noise and its rounding can make?"""
    if difference is None or error is None:
        return None
    rounding = 0.5 * 10.0 ** -_paper_decimals(metric) / METRICS[metric].factor
    return abs(difference) <= NOISE * error + rounding


def _paper_decimals(metric: str) -> int:
    shown = METRICS[metric]
    return shown.decimals if shown.paper_decimals is None else shown.paper_decimals


# --- differences -----------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A measured number less that of its control, or the paper's."""

    value: float
    standard_error: float | None  # as if the two sets of samples had nothing in common
    verdict: str  # a key of _VERDICTS


def difference(cell: Row, control: Row, *, retrained: bool) -> Difference | None:
    """Return how far a cell is from that of its control, None where either is not measured.

    `retrained`: the two come from separately trained checkpoints. Sampling noise is 2 sqrt(se1^2 + se2^2).
    """
    if cell["value"] is None or control["value"] is None:
        return None
    value = cell["value"] - control["value"]
    own, other = cell.get("standard_error"), control.get("standard_error")
    error = None if own is None or other is None else math.hypot(own, other)
    comparable = retrained and cell["metric"] in FRECHET
    if error is not None and abs(value) <= NOISE * error:
        verdict = "in noise"
    elif comparable and abs(value) <= RETRAINING_FLOOR * abs(control["value"]):
        verdict = "inconclusive"
    elif error is None:
        verdict = "noise unknown"
    else:
        verdict = "in this run" if retrained and not comparable else "beyond"
    return Difference(value, error, verdict)


def _to_paper(cell: Row) -> Difference | None:
    within = cell.get("within_noise")
    if within is None:
        return None
    return Difference(cell["difference"], cell["standard_error"], "in noise" if within else "beyond noise")


PAPER = "the paper"


class Comparison(NamedTuple):
    """A row beside the row that it names as its control, or beside the paper's numbers."""

    label: str
    control: str  # its label, or PAPER
    retrained: bool  # the two come from separately trained checkpoints
    differences: list[Difference | None]  # one per column


def compare(rows: list[Row]) -> list[Comparison]:
    """Return what is measured of the comparisons that rows ask for, then those with the paper whose noise is known."""
    by_name = {row["row"]: row for row in rows}
    with_controls, with_paper = [], []
    for row in rows:
        if control := by_name.get(row.get("against")):
            retrained = row["checkpoint"] != control["checkpoint"]
            pairs = zip(row["cells"], control["cells"], strict=True)
            differences = [difference(*pair, retrained=retrained) for pair in pairs]
            with_controls.append(Comparison(row["label"], control["label"], retrained, differences))
        with_paper.append(Comparison(row["label"], PAPER, False, [_to_paper(cell) for cell in row["cells"]]))
    return [comparison for comparison in with_controls + with_paper if any(comparison.differences)]


# --- what a page says, apart from its markup -------------------------------------------------------------------------

_STATUS = {
    "measured": "measured",
    "not run": "not run yet",
    "quoted": "the paper's number, quoted; not reproduced here",
}


def _number(value: float | None, metric: str, decimals: int | None = None) -> str:
    if value is None:
        return "–"
    shown = METRICS[metric]
    return f"{shown.factor * value:z.{shown.decimals if decimals is None else decimals}f}".replace("-", "−")


def _paper_number(value: float | None, metric: str) -> str:
    return _number(value, metric, _paper_decimals(metric))


def _error(error: float | None, metric: str) -> str:
    """Return " ± 0.05"; with more decimals than the number where there would be nothing but zeros."""
    if error is None:
        return ""
    text = _number(error, metric)
    return f" ± {f'{METRICS[metric].factor * error:.1g}' if error > 0 and float(text) == 0 else text}"


def _signed(value: float, metric: str) -> str:
    text = _number(abs(value), metric)
    return ("−" if value < 0 and float(text) != 0 else "+") + text


def _shown(cell: Row, row: Row) -> float | None:
    return cell["paper"] if row["status"] == "quoted" else cell["value"]


def _shown_text(cell: Row, row: Row) -> str:
    shown = _paper_number if row["status"] == "quoted" else _number
    return shown(_shown(cell, row), cell["metric"])


def _best(rows: list[Row], index: int, metric: str) -> str | None:
    """Return the best number of a column as it is shown: among measured rows, or among quoted ones if none is."""
    better = METRICS[metric].better
    measured = [row for row in rows if row["status"] != "quoted" and row["cells"][index]["value"] is not None]
    shown = [(_shown(row["cells"][index], row), _shown_text(row["cells"][index], row)) for row in measured or rows]
    known = [(number, text) for number, text in shown if number is not None and math.isfinite(number)]
    if better is None or len(known) < 2:
        return None
    return (min(known) if better == "lower" else max(known))[1]


def _arrow(metric: str) -> str:
    return {"lower": " ↓", "higher": " ↑", None: ""}[METRICS[metric].better]


def _beside(cell: Row, row: Row) -> str:
    """Return what stands beside our number: the paper's, the difference, the verdict."""
    if cell["paper"] is None or row["status"] == "quoted":
        return ""
    text = f"paper {_paper_number(cell['paper'], cell['metric'])}"
    if cell["value"] is None:
        return text
    verdict = {None: "", True: ", within tolerance", False: ", outside tolerance"}[cell["within_tolerance"]]
    return f"{text}, {_signed(cell['difference'], cell['metric'])}{verdict}"


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
        if row.get("paper_labels"):
            parts.append(f"the paper's labels: {row['paper_labels']}")
        if row["tolerance"]:
            parts.append(f"tolerance {100 * row['tolerance']['relative']:g}%: {row['tolerance']['reason']}")
        if parts:
            remarks.append((row["label"], "; ".join(parts)))
    return remarks


def _definitions(table: dict[str, Any]) -> list[tuple[str, str]]:
    shown = dict.fromkeys(column["metric"] for column in table["columns"])
    metrics = [METRICS[name] for name in shown]
    return [
        (
            ", ".join(dict.fromkeys((metric.name, metric.long_name))),
            metric.definition + (f"; {metric.better} is better" if metric.better else ""),
        )
        for metric in metrics
    ]


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
    """Return what stands at the end of the page: (title, [(term, sentence)])."""
    sections = [
        ("How to read this", [("", note) for note in table.get("notes", [])]),
        ("Metrics", _definitions(table)),
        ("Samples", _protocols(table)),
        ("What made each row", _remarks(rows)),
    ]
    return [(title, items) for title, items in sections if items]


_ERRORS = (
    "± is sampling noise only (one standard error, by a jackknife): it does not hold retraining. The best "
    "number of a column is marked also where others lie inside its noise."
)


def _has_errors(rows: list[Row]) -> bool:
    return any(cell.get("standard_error") is not None for row in rows for cell in row["cells"])


DIFFERENCES, WARNINGS = "Differences", "Before you compare"  # titles

_FLOOR = f"{100 * RETRAINING_FLOOR:g}%"
_VERDICTS = {
    "beyond": "beyond sampling noise (twice the standard error){floor}",
    "in this run": "beyond sampling noise, but how far retraining alone moves this metric is not known",
    "inconclusive": f"inside the {_FLOOR} by which retraining alone moves FID, so that it may be chance",
    "in noise": "inside sampling noise (twice the standard error): no difference shown",
    "beyond noise": "beyond our sampling noise and the rounding of the paper's number",
    "noise unknown": "no standard error was measured",
}
_SHOWN = ("beyond", "in this run", "beyond noise")  # the verdicts of differences that are there


def _words(difference: Difference, metric: str) -> str:
    """Return what stands under a difference."""
    if difference.verdict not in ("beyond", "in this run"):
        return difference.verdict
    smaller, larger = {"lower": ("better", "worse"), "higher": ("worse", "better"), None: ("lower", "higher")}[
        METRICS[metric].better
    ]
    suffix = " in this run" if difference.verdict == "in this run" else ""
    return (smaller if difference.value < 0 else larger) + suffix


def _difference_rows(
    table: dict[str, Any], comparisons: list[Comparison]
) -> Iterator[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Yield (row, "against ...", [(difference, error, words, "faint" if it shows nothing else "")])."""
    for comparison in comparisons:
        cells = []
        for column, found in zip(table["columns"], comparison.differences, strict=True):
            if found is None:
                cells.append(("–", "", "", ""))
                continue
            metric = column["metric"]
            error = _error(found.standard_error, metric)
            shown = "" if found.verdict in _SHOWN else "faint"
            cells.append((_signed(found.value, metric), error, _words(found, metric), shown))
        yield comparison.label, f"against {comparison.control}", cells


def _legend(table: dict[str, Any], comparisons: list[Comparison]) -> list[tuple[str, str]]:
    """Return (words, meaning) of the verdicts that are there, and what the differences rest on."""
    terms: dict[str, dict[str, None]] = {verdict: {} for verdict in _VERDICTS}
    floor = False
    for comparison in comparisons:
        for column, found in zip(table["columns"], comparison.differences, strict=True):
            if found:
                terms[found.verdict][_words(found, column["metric"])] = None
                floor |= comparison.retrained and column["metric"] in FRECHET
    beyond = f" and, for Fréchet distances, beyond the {_FLOOR} retraining floor" if floor else ""
    items = [
        (", ".join(sorted(words)), _VERDICTS[verdict].format(floor=beyond)) for verdict, words in terms.items() if words
    ]
    if floor:
        items.append(
            (
                "retraining floor",
                f"{_FLOOR} of the control's distance, by which training anew alone moves FID: the FID Lottery (arXiv "
                "2606.20536) saw it in several hundred SiTs on ImageNet 256 and calls smaller gaps inconclusive. For "
                "other distances, networks and data it stands in for a floor that nobody measured",
            )
        )
    with_errors = {
        pair.control == PAPER
        for pair in comparisons
        for found in pair.differences
        if found and found.standard_error is not None
    }
    if False in with_errors:
        items.append(
            (
                "± of a difference",
                "both standard errors together, as if the two sets of samples had nothing in common. Where they share "
                "seed and labels they move together, so that this is too large rather than too small",
            )
        )
    if True in with_errors:
        items.append(
            (
                "against the paper",
                "± is that of our number alone, and noise holds the rounding of the paper's too. How far sampling and "
                "training anew would move the paper's number is not known",
            )
        )
    return items


def _warnings(table: dict[str, Any], rows: list[Row]) -> list[tuple[str, str]]:
    """Return (place, sentence): numbers side by side that were made differently, and what metrics.json warns of."""
    labels = _mixture(table, rows, _labels_of)
    items = [(place, "; ".join(f"{kind} labels: {names}" for kind, names in kinds)) for place, kinds in labels]
    pairs: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for cell in row["cells"]:
            ours, paper = _labels_of(cell, row), row.get("paper_labels")
            if cell["value"] is not None and cell["paper"] is not None and paper and ours and ours != paper:
                pairs.setdefault((ours, paper), {})[row["label"]] = None
    items += [
        ("; ".join(names), f"our labels are {ours}, those of the paper's numbers {paper}")
        for (ours, paper), names in pairs.items()
    ]
    if items:
        items.append(("", "Balanced labels read about 0.1 lower FID on ImageNet than random ones (RAE's README)."))
    for place, kinds in _mixture(table, rows, lambda cell, row: cell.get("num_images")):
        counts = "; ".join(f"{count:,} images: {names}" for count, names in kinds)
        items.append((place, f"{counts}; a Fréchet distance falls as images are added"))
    return items + _own_warnings(table, rows)


def _labels_of(cell: Row, row: Row) -> str | None:
    labels = row.get("paper_labels") if row["status"] == "quoted" else cell.get("labels")
    return labels if labels in ("balanced", "random") else None


def _mixture(
    table: dict[str, Any], rows: list[Row], kind_of: Callable[[Row, Row], Any]
) -> list[tuple[str, list[tuple[Any, str]]]]:
    """Return [(columns, [(kind, rows)])] if any column holds numbers of several kinds, else []."""
    mixed: list[str] = []
    places: set[tuple[Any, int]] = set()  # kind, row
    for index, column in enumerate(table["columns"]):
        here = {
            (kind, number)
            for number, (row, cell) in enumerate((row, row["cells"][index]) for row in rows)
            if _shown(cell, row) is not None and (kind := kind_of(cell, row)) is not None
        }
        if len({kind for kind, _ in here}) > 1:
            mixed.append(f"{column['label']}, {METRICS[column['metric']].name}")
            places |= here
    if not mixed:
        return []
    place = "All columns" if len(mixed) == len(table["columns"]) else "; ".join(mixed)
    together: dict[Any, list[str]] = {}
    for kind, number in sorted(places):
        together.setdefault(kind, []).append(rows[number]["label"])
    return [(place, [(kind, ", ".join(names)) for kind, names in together.items()])]


def _own_warnings(table: dict[str, Any], rows: list[Row]) -> list[tuple[str, str]]:
    """Return (rows and columns, warning) of the files behind the cells, equal warnings together."""
    places: dict[str, dict[str, dict[str, None]]] = {}  # warning -> row -> columns
    measured: dict[str, dict[str, None]] = {}
    for row in rows:
        for column, cell in zip(table["columns"], row["cells"], strict=True):
            if cell["value"] is not None:
                measured.setdefault(row["label"], {})[column["label"]] = None
            for warning in cell.get("warnings", ()):
                places.setdefault(warning, {}).setdefault(row["label"], {})[column["label"]] = None
    items = []
    for warning, found in places.items():
        names = [name if found[name] == measured[name] else f"{name} ({', '.join(found[name])})" for name in found]
        items.append(("All rows" if found == measured else "; ".join(names), warning))
    return items


_CAPTIONS = {
    "samples": "The same noise and labels for every row of the table, one column per class",
    "steps": "Distance to the training images against the number of sampling steps",
    "losses": "Training loss, smoothed; losses of different time laws are not comparable with each other",
}

# --- Markdown --------------------------------------------------------------------------------------------------------


def render_markdown(table: dict[str, Any], rows: list[Row], figures: Mapping[str, str]) -> str:
    """Return the table as Markdown. `table`: slice `render`; `figures`: name -> path as seen from the page."""
    best = [_best(rows, index, column["metric"]) for index, column in enumerate(table["columns"])]
    lines = [f"# {_md(table['title'])}", "", *_md_head(table)]
    for row in rows:
        texts = [_md_cell(cell, row, winner) for cell, winner in zip(row["cells"], best, strict=True)]
        lines.append(_md_row([_md(row["label"]), *texts]))
    if _has_errors(rows):
        lines += ["", _ERRORS]
    if comparisons := compare(rows):
        lines += ["", f"## {DIFFERENCES}", "", *_md_head(table)]
        for label, control, cells in _difference_rows(table, comparisons):
            texts = [f"{number}{error}<br>({words})" if words else number for number, error, words, _ in cells]
            lines.append(_md_row([f"{_md(label)}<br>({_md(control)})", *texts]))
        lines += ["", *_md_items(_legend(table, comparisons))]
    if warnings := _warnings(table, rows):
        lines += ["", f"## {WARNINGS}", "", *_md_items(warnings)]
    for name, path in figures.items():
        lines += ["", f"![{_CAPTIONS[name]}]({path})", "", f"*{_CAPTIONS[name]}.*"]
    for title, items in _sections(table, rows):
        lines += ["", f"## {title}", "", *_md_items(items)]
    return "\n".join(lines) + "\n"


def _md_head(table: dict[str, Any]) -> list[str]:
    header = ["", *(f"{_md(column['label'])}<br>{_md(_head(column))}" for column in table["columns"])]
    return [_md_row(header), _md_row(["---", *("---:" for _ in table["columns"])])]


def _md_items(items: list[tuple[str, str]]) -> list[str]:
    return [f"- **{_md(term)}**: {_md(text)}" if term else f"- {_md(text)}" for term, text in items]


def _head(column: dict[str, Any]) -> str:
    return METRICS[column["metric"]].name + _arrow(column["metric"])


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _md_row(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _md_cell(cell: Row, row: Row, best: str | None) -> str:
    number, beside = _shown_text(cell, row), _beside(cell, row)
    error = _error(cell.get("standard_error"), cell["metric"])
    return (f"**{number}**" if number == best else number) + error + (f"<br>({beside})" if beside else "")


# --- HTML ------------------------------------------------------------------------------------------------------------

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
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--page); text-align: left; }
td.best { font-weight: 700; background: var(--best); }
figure { margin: 2rem 0; } figcaption { color: var(--soft); font-size: .9rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
li { overflow-wrap: anywhere; }
"""


def render_html(table: dict[str, Any], rows: list[Row], figures: Mapping[str, str]) -> str:
    """Return the table as one page that needs no network. `table`: slice `render`; `figures`: name -> PNG to embed."""
    title = html.escape(table["title"])
    best = [_best(rows, index, column["metric"]) for index, column in enumerate(table["columns"])]
    comparisons, warnings = compare(rows), _warnings(table, rows)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        _html_table(table, [_html_row(row, best) for row in rows]),
        *([f"<p>{_ERRORS}</p>"] if _has_errors(rows) else ()),
        *(_html_differences(table, comparisons) if comparisons else ()),
        *([_html_section(WARNINGS, warnings)] if warnings else ()),
        *(_html_figure(name, path) for name, path in figures.items()),
        *(_html_section(title, items) for title, items in _sections(table, rows)),
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
    return html.escape(_head(column)).replace(" ↓", "&nbsp;↓").replace(" ↑", "&nbsp;↑")


def _html_differences(table: dict[str, Any], comparisons: list[Comparison]) -> list[str]:
    body = []
    for label, control, cells in _difference_rows(table, comparisons):
        texts = "".join(_html_number(*cell) for cell in cells)
        body.append(f'<tr><th scope="row">{html.escape(label)}{_html_small(control)}</th>{texts}</tr>')
    return [f"<h2>{DIFFERENCES}</h2>", _html_table(table, body), _html_items(_legend(table, comparisons))]


def _html_row(row: Row, best: list[str | None]) -> str:
    status = "" if row["status"] == "measured" else f"<span>{row['status']}</span>"  # explained under the table
    texts = "".join(_html_cell(cell, row, winner) for cell, winner in zip(row["cells"], best, strict=True))
    return f'<tr><th scope="row">{html.escape(row["label"])}{status}</th>{texts}</tr>'


def _html_cell(cell: Row, row: Row, best: str | None) -> str:
    number = _shown_text(cell, row)
    name = "best" if number == best else ""
    return _html_number(number, _error(cell.get("standard_error"), cell["metric"]), _beside(cell, row), name)


def _html_number(number: str, error: str, beside: str, name: str) -> str:
    """Return a cell: the number, its error and what stands beside it below each other."""
    tag = f'<td class="{name}">' if name else "<td>"
    return f"{tag}{number}{_html_small(error.strip())}{_html_small(beside)}</td>"


def _html_small(text: str) -> str:
    return f"<span>{html.escape(text)}</span>" if text else ""


def _html_figure(name: str, path: str) -> str:
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    caption = _CAPTIONS[name]
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
