"""How far rows lie from their controls and from the paper, and whether noise can make that."""

from __future__ import annotations

import math
from typing import NamedTuple

from mixflow.tables.metrics import FRECHET, RETRAINING_FLOOR
from mixflow.tables.rows import Row
from mixflow.tables.statistics import NOISE


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
    row: str  # its name
    control_row: str | None  # its name, None for the paper


def controls_of(row: Row) -> list[str]:
    """Return the rows that a row names as its controls."""
    against = row.get("against") or []
    return [against] if isinstance(against, str) else against


def compare(rows: list[Row]) -> list[Comparison]:
    """Return what is measured of the comparisons that rows ask for, then those with the paper whose noise is known."""
    by_name = {row["row"]: row for row in rows}
    with_controls, with_paper = [], []
    for row in rows:
        if "replicates" in row:
            continue  # its file compares it, replicate by replicate
        for control in [by_name[name] for name in controls_of(row) if name in by_name]:
            retrained = row["checkpoint"] != control["checkpoint"]
            pairs = zip(row["cells"], control["cells"], strict=True)
            differences = [difference(*pair, retrained=retrained) for pair in pairs]
            with_controls.append(
                Comparison(row["label"], control["label"], retrained, differences, row["row"], control["row"])
            )
        to_paper = [_to_paper(cell) for cell in row["cells"]]
        with_paper.append(Comparison(row["label"], PAPER, False, to_paper, row["row"], None))
    return [comparison for comparison in with_controls + with_paper if any(comparison.differences)]
