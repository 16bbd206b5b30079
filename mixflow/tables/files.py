"""Which files a table is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mixflow.config import Config
from mixflow.runtime import paths


class Cell(NamedTuple):
    """One number of a table: where it comes from."""

    row: str
    checkpoint: str
    sampler: str
    metric: str
    file: str


def cells(config: Config, table: str) -> list[Cell]:
    """Return the measured cells of a table, row by row; with replicates each of theirs, replicate by replicate."""
    rows = [row for row in config.get("tables", table).rows if row.checkpoint]
    settings = [config.slice("row", table, row.key) for row in rows]
    return [
        Cell(row["row"], checkpoint, samplers[column["sampler"]], column["metric"], file)
        for row in settings
        for (checkpoint, samplers), files in zip(makers(row), replicate_files(row), strict=True)
        for column, file in zip(row["columns"], files, strict=True)
    ]


def metric_files(settings: dict[str, Any]) -> list[str]:
    """Return every metrics.json behind a row, each once: `settings` is the slice `row` of the config.

    A replicated row is compared with its controls in its own file, so that theirs are among them.
    """
    if settings["quoted"]:
        return []
    parts = (settings, *settings.get("controls", ()))
    return list(dict.fromkeys(file for part in parts for files in replicate_files(part) for file in files))


def makers(row: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Return (checkpoint, sampler of a column -> the one in its place) of each replicate of a row or control."""
    if "replicates" in row:
        return [(made["checkpoint"], made["samplers"]) for made in row["replicates"]]
    return [(row["checkpoint"], {column["sampler"]: column["sampler"] for column in row["columns"]})]


def replicate_files(row: dict[str, Any]) -> list[list[str]]:
    """Return the metrics.json of each column, for each replicate of a row or control."""
    return [
        [paths.metrics(checkpoint, samplers[column["sampler"]], column.get("reference")) for column in row["columns"]]
        for checkpoint, samplers in makers(row)
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
        "gamma": lambda arm: paths.row(settings["table"], arm["row"]),
        "variance": lambda arm: paths.row(settings["table"], arm["row"]),
    }
    return [file_of[settings["figure"]](arm) for arm in settings["arms"]]
