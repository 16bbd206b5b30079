"""What a row says: its JSON file, from the metrics behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.tables.files import replicate_files
from mixflow.tables.metrics import METRICS, decimals_of_paper, interval_text, number_text, signed_text
from mixflow.tables.statistics import NOISE, Summary, detectable, differs, error_of_mean, sampling_error, summary

Row = dict[str, Any]  # the content of a row's JSON file, made by `build_row`
ReadJson = Callable[[str], Any]  # path -> content, None where there is no such file


def build_row(settings: dict[str, Any], read_json: ReadJson) -> Row:
    """Return what a row says, from the slice `row` of the config and the metrics it names.

    Keys: table, row, label, status ("measured", "not run" or "quoted"), checkpoint, against, made_by, note, tolerance,
    paper_labels, cells. A cell has metric, sampler, value, standard_error (of sampling), paper, difference (value -
    paper), within_tolerance, within_noise, labels, num_images, warnings, and the file, its SHA-256 parents and the
    commit behind it; what is unknown is None.

    With replicates: value is their mean, not known before all are; standard_error is that of sampling in it; the cell
    also has standard_deviation, interval (95%, of the mean), replicates (each with training and sampling seed, value,
    standard_error, file, parents, commit, dirty) and paired: for each control its row and label, covers (what was
    drawn again), detectable, differences, mean, standard_deviation, interval, p_value, sampling_error, verdict,
    sentence (see `mixflow.tables.statistics`).
    """
    paper = settings.get("paper", [None] * len(settings["columns"]))
    build = _build_replicated_cell if "replicates" in settings else _build_cell
    built = [build(settings, index, number, read_json) for index, number in enumerate(paper)]
    if settings["quoted"]:
        status = "quoted"
    else:
        status = "not run" if any(cell["value"] is None for cell in built) else "measured"
    kept = (
        "table", "row", "label", "checkpoint", "against", "made_by", "sampled_by", "note", "tolerance", "paper_labels"
    )  # fmt: skip
    replicated = {"replicates": settings["replicates"]} if "replicates" in settings else {}
    return {**{key: settings.get(key) for key in kept}, "status": status, **replicated, "cells": built}


def _build_cell(settings: dict[str, Any], index: int, paper: float | None, read_json: ReadJson) -> Row:
    column = settings["columns"][index]
    unknown = ("value", "standard_error", "difference", "within_tolerance", "within_noise")
    cell = {**column, "paper": paper, **dict.fromkeys(unknown)}
    if settings["quoted"]:
        return cell
    found = _read_cell(replicate_files(settings)[0][index], column["metric"], read_json)
    if found is None:
        return cell
    del found["group_influences"]
    difference, error = None if paper is None else found["value"] - paper, found["standard_error"]
    return {
        **cell,
        **found,
        "difference": difference,
        "within_tolerance": _within_tolerance(difference, paper, settings.get("tolerance")),
        "within_noise": None if error is None else _within_noise(difference, NOISE * error, column["metric"]),
    }


def _read_cell(file: str, metric: str, read_json: ReadJson) -> Row | None:
    """Return what a metrics.json says of one metric; None where there is no such file yet."""
    found = read_json(file)
    if found is None:
        return None
    if metric not in found.get("metrics", {}):
        raise UserError(f"'{file}' holds no metric '{metric}': delete it and evaluate again")
    record = read_json(paths.record(file)) or {}
    return {
        "value": found["metrics"][metric],
        "standard_error": found.get("standard_errors", {}).get(metric),
        "group_influences": found.get("group_influences", {}).get(metric),  # files of before have none
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


def _within_noise(difference: float | None, noise: float, metric: str) -> bool | None:
    """Is the difference to the paper's number what our noise and its rounding can make?"""
    if difference is None:
        return None
    rounding = 0.5 * 10.0 ** -decimals_of_paper(metric) / METRICS[metric].factor
    return abs(difference) <= noise + rounding


# --- replicates


def _build_replicated_cell(settings: dict[str, Any], index: int, paper: float | None, read_json: ReadJson) -> Row:
    column = settings["columns"][index]
    metric = column["metric"]
    found = [_read_cell(files[index], metric, read_json) for files in replicate_files(settings)]
    known = [one for one in found if one is not None]
    unknown = ("value", "standard_error", "difference", "within_tolerance", "within_noise")
    cell = {**column, "paper": paper, **dict.fromkeys(unknown)}
    if len(known) == len(found):
        whole = summary([one["value"] for one in known])
        difference = None if paper is None else whole.mean - paper
        noise = None if whole.interval is None else whole.interval[1] - whole.mean
        first = known[0]
        cell |= {
            "value": whole.mean,
            "standard_error": error_of_mean([one["standard_error"] for one in known]),
            "standard_deviation": whole.standard_deviation,
            "interval": whole.interval,
            "difference": difference,
            "within_tolerance": _within_tolerance(difference, paper, settings.get("tolerance")),
            "within_noise": None if noise is None else _within_noise(difference, noise, metric),
            **{key: first[key] for key in ("labels", "num_images", "commit", "dirty")},
            "warnings": list(dict.fromkeys(warning for one in known for warning in one["warnings"])),
        }
    kept = ("value", "standard_error", "file", "parents", "commit", "dirty")
    cell["replicates"] = [
        {"training": made["training"], "sampling": made["sampling"], **{key: (one or {}).get(key) for key in kept}}
        for made, one in zip(settings["replicates"], found, strict=True)
    ]
    cell["paired"] = [_pair(settings, control, index, found, read_json) for control in settings.get("controls", ())]
    return cell


def _pair(
    settings: dict[str, Any], control: dict[str, Any], index: int, own: list[Row | None], read_json: ReadJson
) -> Row:
    """Return how a replicated cell compares with that of a control, replicate by replicate."""
    metric = settings["columns"][index]["metric"]
    theirs = [_read_cell(files[index], metric, read_json) for files in replicate_files(control)]
    trained = [made["training"] is not None for part in (settings, control) for made in part["replicates"]]
    pair: Row = {
        "row": control["row"],
        "label": control["label"],
        "covers": "training and sampling" if any(trained) else "sampling",
    }
    pairs = [(a, b) for a, b in zip(own, theirs, strict=True) if a is not None and b is not None]
    if len(pairs) < len(own):
        names = ("detectable", "differences", "mean", "standard_deviation", "interval", "p_value", "sampling_error")
        return {**pair, **dict.fromkeys(names), "verdict": "not run", "sentence": "Not run yet."}
    differences = [a["value"] - b["value"] for a, b in pairs]
    errors = [
        sampling_error(a["group_influences"], b["group_influences"], (a["standard_error"], b["standard_error"]))
        for a, b in pairs
    ]
    found, error = summary(differences), error_of_mean(errors)
    verdict = _verdict(differs(found, error), found.mean, metric)
    able = None
    if found.standard_deviation is not None:
        # Replicates that agree by luck do not make the test more able than sampling lets it be.
        able = detectable(max(found.standard_deviation, (error or 0.0) * math.sqrt(len(pairs))), len(pairs))
    return {
        **pair,
        "detectable": able,
        "differences": differences,
        **{key: getattr(found, key) for key in ("mean", "standard_deviation", "interval", "p_value")},
        "sampling_error": error,
        "verdict": verdict,
        "sentence": _sentence(settings["label"], control["label"], metric, found, able, verdict, len(pairs)),
    }


def _verdict(shown: bool | None, mean: float, metric: str) -> str:
    """Return better, worse, lower, higher (where neither end is good), not decided, or equal."""
    if shown is None:
        return "equal"
    if not shown:
        return "not decided"
    smaller, larger = {"lower": ("better", "worse"), "higher": ("worse", "better"), None: ("lower", "higher")}[
        METRICS[metric].better
    ]
    return smaller if mean < 0 else larger


def _sentence(label: str, control: str, metric: str, found: Summary, able: float | None, verdict: str, n: int) -> str:
    """Return the one sentence that follows from the numbers of a comparison."""
    name, times = METRICS[metric].name, f"{n} replicate{'s' if n > 1 else ''}"
    if verdict == "equal":
        return f"{label} and {control} have the same {name} in {times}."
    mean = signed_text(found.mean, metric)
    if found.interval is None or able is None:
        return f"Not decided: {label} less {control} is {mean} in {name}, but one replicate has no spread."
    numbers = f"{mean} {interval_text(found.interval, metric)} over {times}"
    if verdict != "not decided":
        return f"{label} is {verdict} than {control} in {name}: {numbers}."
    why = f"which could have shown {number_text(able, metric)} or more"
    if not found.interval[0] <= 0 <= found.interval[1]:
        why = f"which is inside the noise of sampling; {number_text(able, metric)} or more could have been seen"
    return f"Not decided: {label} less {control} is {numbers} in {name}, {why}."
