"""What a page says, apart from its markup."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mixflow.tables.differences import PAPER, Comparison, Difference
from mixflow.tables.metrics import (
    FRECHET,
    METRICS,
    RETRAINING_FLOOR,
    error_text,
    interval_text,
    number_text,
    paper_text,
    signed_text,
)
from mixflow.tables.rows import Row
from mixflow.tables.statistics import LEVEL, detectable, holm

_STATUS = {
    "measured": "measured",
    "not run": "not run yet",
    "quoted": "the paper's number, quoted; not reproduced here",
}


def shown_value(cell: Row, row: Row) -> float | None:
    return cell["paper"] if row["status"] == "quoted" else cell["value"]


def shown_text(cell: Row, row: Row) -> str:
    shown = paper_text if row["status"] == "quoted" else number_text
    return shown(shown_value(cell, row), cell["metric"])


def best_text(rows: list[Row], index: int, metric: str) -> str | None:
    """Return the best number of a column as it is shown: among measured rows, or among quoted ones if none is."""
    better = METRICS[metric].better
    measured = [row for row in rows if row["status"] != "quoted" and row["cells"][index]["value"] is not None]
    shown = [(shown_value(row["cells"][index], row), shown_text(row["cells"][index], row)) for row in measured or rows]
    known = [(number, text) for number, text in shown if number is not None and math.isfinite(number)]
    if better is None or len(known) < 2:
        return None
    return (min(known) if better == "lower" else max(known))[1]


def head_text(column: dict[str, Any]) -> str:
    return METRICS[column["metric"]].name + arrow(column["metric"])


def arrow(metric: str) -> str:
    return {"lower": " ↓", "higher": " ↑", None: ""}[METRICS[metric].better]


def spread_text(cell: Row) -> str:
    """Return " ± " and the standard deviation over replicates, or where there are none the noise of sampling."""
    spread = "standard_deviation" if "replicates" in cell else "standard_error"
    return error_text(cell.get(spread), cell["metric"])


def beside_text(cell: Row, row: Row) -> str:
    """Return what stands beside our number: its interval; the paper's number, the difference, the verdict."""
    parts = []
    if cell.get("interval"):
        low, high = (number_text(end, cell["metric"]) for end in cell["interval"])
        parts.append(f"{low} to {high}")
    if cell["paper"] is not None and row["status"] != "quoted":
        parts.append(f"paper {paper_text(cell['paper'], cell['metric'])}")
        if cell["value"] is not None:
            verdict = {None: "", True: "within tolerance", False: "outside tolerance"}[cell["within_tolerance"]]
            parts += [part for part in (signed_text(cell["difference"], cell["metric"]), verdict) if part]
    return ", ".join(parts)


def _made_by(row: Row) -> str:
    """Say in words what made a row."""
    if row["status"] == "quoted":
        return _STATUS["quoted"]
    made = row["made_by"]
    if "exact" in made:
        field, kernel = made["exact"], ""
        if "bandwidth" in field:
            kernel = f", bandwidth {field['bandwidth']:g}"
        text = (
            f"exact field ({field['kind']}{kernel}) of {field['latents']}, law {field['law']}, gamma {field['gamma']:g}"
        )
    elif "file" in made:
        text = f"weights from {made['file']}"
    else:
        start = "from scratch" if made["init"] == "scratch" else f"from {made['init']}"
        shift = "" if made["shift"] == 1 else f", shift {made['shift']:g}"
        text = (
            f"{start}, {made['num_steps']:,} steps of {made['batch_size']:,} at learning rate "
            f"{made['learning_rate']:g}, law {made['law']}, gamma {made['gamma']:g}{shift}{_arm(made)}, {_seeds(row)}"
        )
    commits = {f"{cell['commit'][:8]}{' (with changes)' if cell['dirty'] else ''}" for cell in _measured(row)}
    behind = f"; evaluated at commit {', '.join(sorted(commits))}" if commits else ""
    status = "" if row["status"] == "measured" else f"; {_STATUS[row['status']]}"
    return text + behind + status


def _arm(made: dict[str, Any]) -> str:
    """Say in words what a training run has besides its law."""
    parts = []
    if "input_perturbation" in made:
        parts.append(f", input perturbation {made['input_perturbation']:g}")
    if (rollout := made.get("self_rollout")) is not None:
        parts.append(f", self-rollout of {rollout['step_size']:g} with weight {rollout['weight']:g}")
    if "endpoint_target" in made:
        parts.append(", target from the input to the data")
    return "".join(parts)


def _seeds(row: Row) -> str:
    """Return with which seeds a trained row was made."""
    made = row.get("replicates")
    if made is None or made[0]["training"] is None:
        return f"seed {row['made_by']['seed']}"
    return f"seeds {', '.join(str(one['training']) for one in made)}"


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


def sections(table: dict[str, Any], rows: list[Row]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what stands at the end of the page: (title, [(term, sentence)])."""
    sections = [
        ("How to read this", [("", note) for note in table.get("notes", [])]),
        ("Metrics", _definitions(table)),
        ("Samples", _protocols(table)),
        ("What made each row", _remarks(rows)),
    ]
    return [(title, items) for title, items in sections if items]


ERRORS = (
    "± is sampling noise only (one standard error, by a jackknife): it does not hold retraining. The best "
    "number of a column is marked also where others lie inside its noise."
)


def errors_note(rows: list[Row]) -> str | None:
    """Return what ± means in the main table, None where there is none."""
    if replicated := [row for row in rows if "replicates" in row]:
        count = len(replicated[0]["replicates"])
        if count < 2:
            return "One replicate has no spread: nothing can be decided from it."
        return (
            f"Mean ± standard deviation over {count} replicates, and below it the {LEVEL:.0%} t-interval of the mean. "
            "Intervals of two rows overlap although their difference is sure, since the replicates of rows are paired: "
            "compare rows by the differences alone."
        )
    return ERRORS if has_errors(rows) else None


def has_errors(rows: list[Row]) -> bool:
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


def difference_rows(
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
            error = error_text(found.standard_error, metric)
            shown = "" if found.verdict in _SHOWN else "faint"
            cells.append((signed_text(found.value, metric), error, _words(found, metric), shown))
        yield comparison.label, f"against {comparison.control}", cells


def legend(table: dict[str, Any], comparisons: list[Comparison]) -> list[tuple[str, str]]:
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


# --- what paired replicates say


class PairedCell(NamedTuple):
    """A difference to a control over replicates, in words."""

    number: str
    interval: str
    able: str  # the smallest effect that could have been seen
    verdict: str
    sentence: str
    is_shown: bool


def paired_rows(rows: list[Row]) -> list[tuple[str, str, list[PairedCell]]]:
    """Return (row, "against ...", cells) of all comparisons of replicated rows."""
    sure = _sure_in_all(rows)
    found = []
    for row in rows:
        for number, control in enumerate(row["cells"][0].get("paired", ())):
            pairs = [(cell["metric"], cell["paired"][number]) for cell in row["cells"]]
            cells = [_paired_cell(pair, metric, id(pair) in sure) for metric, pair in pairs]
            found.append((row["label"], f"against {control['label']}", cells))
    return found


def _paired_cell(pair: Row, metric: str, in_all: bool) -> PairedCell:
    if pair["mean"] is None:
        return PairedCell("–", "", "", pair["verdict"], pair["sentence"], False)
    able = "" if pair["detectable"] is None else f"could show {number_text(pair['detectable'], metric)}"
    interval = "" if pair["interval"] is None else interval_text(pair["interval"], metric)
    is_shown = pair["verdict"] not in ("not decided", "equal")
    verdict = f"{pair['verdict']} (Holm)" if in_all and is_shown else pair["verdict"]
    if pair["verdict"] == "not decided" and pair["interval"] and not pair["interval"][0] <= 0 <= pair["interval"][1]:
        verdict = "in sampling noise"
    return PairedCell(signed_text(pair["mean"], metric), interval, able, verdict, pair["sentence"], is_shown)


def _tested(rows: list[Row]) -> list[Row]:
    """Return the comparisons of a table with a p-value."""
    pairs = [pair for row in rows for cell in row["cells"] for pair in cell.get("paired", ())]
    return [pair for pair in pairs if pair["p_value"] is not None]


def _sure_in_all(rows: list[Row]) -> set[int]:
    """Return the ids of comparisons that Holm's correction over the whole table leaves significant."""
    tested = _tested(rows)
    adjusted = holm([pair["p_value"] for pair in tested])
    return {id(pair) for pair, p_value in zip(tested, adjusted, strict=True) if p_value < 1 - LEVEL}


def paired_verdicts(table: dict[str, Any], rows: list[Row]) -> list[tuple[str, str]]:
    """Return (comparison, sentence) of each comparison: where it is better, worse, not decided."""
    items = []
    for label, control, cells in paired_rows(rows):
        if len(cells) == 1:
            items.append((f"{label} {control}", cells[0].sentence))
            continue
        places: dict[str, list[str]] = {}
        for column, cell in zip(table["columns"], cells, strict=True):
            where = f"{METRICS[column['metric']].name} ({column['label']})"
            places.setdefault(cell.verdict.removesuffix(" (Holm)"), []).append(where)
        text = "; ".join(f"{verdict} in {', '.join(names)}" for verdict, names in places.items())
        items.append((f"{label} {control}", f"{text[0].upper()}{text[1:]}."))
    return items


def paired_note(rows: list[Row]) -> str:
    """Return what is to be known before the differences are read: how small an effect could have been seen."""
    count = len(next(row["replicates"] for row in rows if "replicates" in row))
    if count < 2:
        return "One replicate: differences have no spread, and none is decided."
    return (
        f"With {count} paired replicates a true difference is found in four cases of five where it is at least "
        f"{detectable(1.0, count):.2f} standard deviations of the differences (or of their sampling noise, if that is "
        'more): what that is in each cell stands there as "could show". A smaller effect may be there and not be seen.'
    )


def paired_legend(rows: list[Row]) -> list[tuple[str, str]]:
    """Return (words, meaning) of the verdicts on paired differences, and how many are tested."""
    pairs = [pair for row in rows for cell in row["cells"] for pair in cell.get("paired", ())]
    tested = _tested(rows)
    by_interval = sum(pair["verdict"] not in ("not decided", "equal") for pair in tested)
    items = [
        (
            "better, worse, lower, higher",
            f"the {LEVEL:.0%} t-interval of the mean paired difference, in brackets, leaves 0 out, and the mean is "
            "beyond twice what drawing other samples alone would do, where that is known",
        ),
        (
            "not decided, in sampling noise",
            "the replicates do not tell, or agree better than sampling lets them: this is no evidence of equality",
        ),
    ]
    if tested:
        items.append(
            (
                "several at once",
                f"{len(tested)} differences are tested here and {by_interval} of them called; if nothing differed, "
                f"about {(1 - LEVEL) * len(tested):.1f} would be called by chance. (Holm): still called when the "
                f"chance of even one false call in the table is held at {1 - LEVEL:.0%}",
            )
        )
    kinds = {pair["covers"] for pair in pairs}
    if "training and sampling" in kinds:
        items.append(
            (
                "what intervals cover",
                "the seeds of post-training (data order, noise, labels dropped) and of sampling, drawn anew together; "
                "the checkpoint that rows start from, the data, the extractor and the reference are the same in all",
            )
        )
    if "sampling" in kinds:
        items.append(("rows that are not trained", "their differences to each other cover other samples alone"))
    return items


# --- warnings


def find_warnings(table: dict[str, Any], rows: list[Row]) -> list[tuple[str, str]]:
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
            if shown_value(cell, row) is not None and (kind := kind_of(cell, row)) is not None
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


CAPTIONS = {
    "samples": "The same noise and labels for every row of the table, one column per class",
    "steps": "Distance to the training images against the number of sampling steps",
    "losses": "Training loss, smoothed; losses of different time laws are not comparable with each other",
    "gamma": "Distance to the training images against gamma; bars are 95% t-intervals over replicates",
    "variance": "Pixel variance over that of the training images against the number of sampling steps; 1 is right",
}
