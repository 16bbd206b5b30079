"""The figures of a table: sample sheets, distance and variance against steps, distance against gamma, losses."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path, read_json
from mixflow.tables import METRICS

CLASSES_SHOWN = 10
IMAGES_PER_CLASS = 4
LABELS_SEARCHED = 10_000  # labels looked through for the classes shown
STEP_METRICS = ("fd", "fid")  # what `draw_steps` plots, whichever a row has

End = tuple[tuple[float, float], str, str]  # last point of a line, its label, its colour

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that vanishes on white.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.6,
}


def draw(settings: dict[str, Any], files: list[Path], out: Path) -> None:
    """Draw the figure of the slice `figure` from its files, in the order of `mixflow.tables.figure_files`."""
    labelled = {arm["label"]: file for arm, file in zip(settings["arms"], files, strict=True)}
    if settings["figure"] == "samples":
        draw_samples(labelled, out, title=settings["title"])
    elif settings["figure"] in FIGURES_OF_ROWS:
        FIGURES_OF_ROWS[settings["figure"]]([read_json(file) for file in files], out)
    else:
        draw_losses(labelled, out)


# --- samples ---------------------------------------------------------------------------------------------------------


def draw_samples(sample_files: Mapping[str, Path], out: Path, *, title: str = "") -> None:
    """Draw a sheet of samples per arm: one column per class, the same sample indices for all arms.

    `sample_files` maps an arm's label to its samples.npz (arr_0 uint8 [N,H,W,3], arr_1 int64 labels [N] if known).
    """
    indices = _indices_by_class(next(iter(sample_files.values())))  # [rows, classes]
    sheets = {label: _sheet(_images(path, indices)) for label, path in sample_files.items()}
    num_columns = min(2, len(sheets))
    num_rows = math.ceil(len(sheets) / num_columns)
    height, width = next(iter(sheets.values())).shape[:2]
    panel_width = 4.6
    panel_height = panel_width * height / width + 0.3
    with matplotlib.rc_context(STYLE):
        size = (num_columns * panel_width, num_rows * panel_height + (0.35 if title else 0))
        figure = Figure(figsize=size, layout="constrained")
        panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
        for panel in panels:
            panel.axis("off")
        for panel, (label, sheet) in zip(panels, sheets.items(), strict=False):
            panel.imshow(sheet, interpolation="nearest")
            panel.set_title(label, loc="left")
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        save(figure, out)


def _indices_by_class(path: Path) -> np.ndarray:
    """Return sample indices int64 [rows, classes]: the first of each class, or simply the first where labels lack."""
    labels = _read_member(path, "arr_1", LABELS_SEARCHED)
    if labels is None:
        count = min(CLASSES_SHOWN * IMAGES_PER_CLASS, len(_whole(path, CLASSES_SHOWN * IMAGES_PER_CLASS)))
        columns = min(CLASSES_SHOWN, count)
        return np.arange(count // columns * columns).reshape(-1, columns)
    per_class = [np.flatnonzero(labels == name)[:IMAGES_PER_CLASS] for name in np.unique(labels)[:CLASSES_SHOWN]]
    rows = min(len(chosen) for chosen in per_class)
    return np.stack([chosen[:rows] for chosen in per_class], axis=1)


def _images(path: Path, indices: np.ndarray) -> np.ndarray:
    """Return images uint8 [rows, classes, H, W, 3], reading no more of the file than needed."""
    images = _whole(path, int(indices.max()) + 1)
    if len(images) <= indices.max():
        raise UserError(f"'{path}' holds {len(images)} images, fewer than the other arms: sample it again")
    return images[indices]


def _whole(path: Path, count: int) -> np.ndarray:
    images = _read_member(path, "arr_0", count)
    if images is None:
        raise UserError(f"'{path}' holds no images 'arr_0': sample it again")
    return images


def _read_member(path: Path, name: str, count: int) -> np.ndarray | None:
    """Return the first `count` rows of an array in an .npz (which can be many gigabytes), None if it is not there."""
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        with archive.open(f"{name}.npy") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            shape = (min(count, shape[0]), *shape[1:])
            return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _sheet(images: np.ndarray) -> np.ndarray:
    """Lay images [rows, classes, H, W, 3] out as one [rows*(H+gap), classes*(W+gap), 3], with white gaps."""
    gap = max(1, images.shape[2] // 16)
    padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    rows, classes, height, width, channels = padded.shape
    sheet = padded.transpose(0, 2, 1, 3, 4).reshape(rows * height, classes * width, channels)
    return sheet[:-gap, :-gap]


# --- steps -----------------------------------------------------------------------------------------------------------


_SOLVERS = {"euler": "Euler", "heun": "Heun", "euler_maruyama": "SDE"}  # in the order of their panels


class Point(NamedTuple):
    """A measured cell in a plot."""

    x: float
    value: float
    interval: tuple[float, float] | None  # over replicates


def draw_steps(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw Fréchet distance against the number of steps: one line per row, a panel per solver and guidance.

    `rows` are row files of a table (see `mixflow.tables.build_row`); bars are intervals over replicates.
    """
    metric = next(
        (name for name in STEP_METRICS if any(cell["metric"] == name for row in rows for cell in row["cells"])), None
    )
    if metric is None:
        raise UserError(f"the figure 'steps' needs a column of {' or '.join(STEP_METRICS)}: add one, or leave it out")
    _draw_against_steps(rows, metric, out)


def draw_variance(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw the variance ratio as `draw_steps` draws the distance, with a line at 1."""
    _draw_against_steps(rows, "variance_ratio", out, level=1.0)


def _draw_against_steps(rows: list[dict[str, Any]], metric: str, out: Path, *, level: float | None = None) -> None:
    """One panel for each solver and guidance of which `metric` is known, all with one vertical axis."""
    kinds = dict.fromkeys(
        (cell["guidance"] != 1, cell.get("solver", ""))
        for row in rows
        for cell in row["cells"]
        if cell["metric"] == metric and "num_steps" in cell
    )
    ordered = sorted(kinds, key=lambda kind: (kind[0], [*_SOLVERS, kind[1]].index(kind[1])))
    panels = {_panel_title(*kind): [_points(row, metric, kind) for row in rows] for kind in ordered}
    panels = {title: lines for title, lines in panels.items() if any(lines)}
    if not panels:
        raise UserError(f"the figure 'steps' finds no {METRICS[metric].name} yet: make the rows first")
    # Of all panels, for they share the axis, and it is scaled by hand once zero is its lower end.
    ends_of = [
        end for lines in panels.values() for points in lines for point in points
        for end in (point.value, *(point.interval or ()))
    ]  # fmt: skip
    low, high = (0.0, max(ends_of)) if level is None else (min(*ends_of, level), max(*ends_of, level))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
        subplots = figure.subplots(1, len(panels), squeeze=False, sharey=True).flat
        for axes, (title, lines) in zip(subplots, panels.items(), strict=True):
            ends: list[End] = []
            for index, (row, points) in enumerate(zip(rows, lines, strict=True)):
                if points:
                    colour = _draw_line(axes, points, index)
                    ends.append(((points[-1].x, points[-1].value), row["label"], colour))
            _log_steps(axes, sorted({int(point.x) for points in lines for point in points}))
            axes.set_title(title, loc="left")
            axes.set_xlabel("sampling steps")
            axes.set_ylim(low - (0 if level is None else 0.06 * (high - low)), high + 0.06 * (high - low))
            if level is not None:
                axes.axhline(level, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
            _label_ends(axes, ends)
        figure.axes[0].set_ylabel(METRICS[metric].long_name)
        save(figure, out)


def _panel_title(guided: bool, solver: str) -> str:
    guidance = "with guidance" if guided else "without guidance"
    return f"{_SOLVERS.get(solver, solver)}, {guidance}" if solver else guidance


def _draw_line(axes: Any, points: list[Point], index: int) -> str:
    """Draw a line with its intervals; return its colour."""
    colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]
    axes.plot([point.x for point in points], [point.value for point in points], color=colour, marker=marker, ms=5)
    for point in points:
        if point.interval is not None:
            # Not below zero, where the axis ends and no distance is.
            axes.vlines(point.x, max(point.interval[0], 0.0), point.interval[1], color=colour, linewidth=1)
    return colour


def _points(row: dict[str, Any], metric: str, kind: tuple[bool, str]) -> list[Point]:
    """Return the measured cells of a row with that (guidance, solver), by ascending steps."""
    return sorted(
        Point(cell["num_steps"], cell["value"], _interval(cell))
        for cell in row["cells"]
        if cell["metric"] == metric and cell["value"] is not None and "num_steps" in cell
        and (cell["guidance"] != 1, cell.get("solver", "")) == kind
    )  # fmt: skip


def _interval(cell: dict[str, Any]) -> tuple[float, float] | None:
    found = cell.get("interval")
    return None if found is None else (found[0], found[1])


# --- gamma -----------------------------------------------------------------------------------------------------------


def draw_gamma(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw what a table's first metric does as gamma grows: a line for each of its samplers.

    gamma is that of each row's training; rows without one, such as weights from a file, are left out.
    """
    trained = [row for row in rows if "gamma" in (row["made_by"] or {})]
    first = rows[0]["cells"][0]["metric"]
    lines: dict[str, list[Point]] = {}
    for row in trained:
        for cell in row["cells"]:
            if cell["metric"] == first and cell["value"] is not None:
                point = Point(row["made_by"]["gamma"], cell["value"], _interval(cell))
                steps = f"{cell['num_steps']} steps" if "num_steps" in cell else cell["sampler"]
                lines.setdefault(steps, []).append(point)
    if not lines:
        raise UserError(f"the figure 'gamma' finds no {METRICS[first].name} of a trained row yet: make the rows first")
    highest = max(point.interval[1] if point.interval else point.value for points in lines.values() for point in points)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")
        axes, ends = figure.subplots(), []
        for index, (steps, points) in enumerate(lines.items()):
            ordered = sorted(points)
            colour = _draw_line(axes, ordered, index)
            ends.append(((ordered[-1].x, ordered[-1].value), steps, colour))
        axes.set_xlabel("gamma")
        axes.set_ylabel(METRICS[first].long_name)
        axes.set_ylim(0, 1.06 * highest)
        _label_ends(axes, ends)
        save(figure, out)


FIGURES_OF_ROWS: dict[str, Callable[[list[dict[str, Any]], Path], None]] = {
    "steps": draw_steps,
    "gamma": draw_gamma,
    "variance": draw_variance,
}


# --- axes of steps ---------------------------------------------------------------------------------------------------


def _log_steps(axes: Any, steps: list[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


# --- losses ----------------------------------------------------------------------------------------------------------


def draw_losses(loss_files: Mapping[str, Path], out: Path) -> None:
    """Draw smoothed training losses, one curve per training; those of another length get their own panel.

    `loss_files` maps an arm's label to its losses.json, {"step": [...], "loss": [...]}. Arms that share one differ in
    their sampler alone: the curve is the first one's. A panel of very unlike losses is logarithmic.
    """
    labels_of: dict[Path, list[str]] = {}
    for label, path in loss_files.items():
        labels_of.setdefault(path, []).append(label)
    curves = {labels[0]: read_json(path) for path, labels in labels_of.items()}
    groups: dict[int, list[str]] = {}
    for label, curve in curves.items():
        groups.setdefault(curve["step"][-1], []).append(label)
    colours = {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(curves)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(groups), 3.6), layout="constrained")
        for axes, labels in zip(figure.subplots(1, len(groups), squeeze=False).flat, groups.values(), strict=True):
            ends: list[End] = []
            drawn = {label: _smooth(np.asarray(curves[label]["loss"])) for label in labels}
            last = [losses[-1] for losses in drawn.values()]
            if min(last) > 0 and max(last) > 10 * min(last):
                axes.set_yscale("log")
            for label, losses in drawn.items():
                steps = curves[label]["step"]
                axes.plot(steps, losses, color=colours[label])
                ends.append(((steps[-1], float(losses[-1])), label, colours[label]))
            axes.set_xlabel("training step")
            axes.set_ylabel("training loss")
            axes.margins(y=0.12)  # room for the labels of curves that end at the bottom
            _label_ends(axes, ends)
        save(figure, out)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average over a tenth of the curve [n]; at its ends over what there is."""
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    first, last = np.maximum(positions - half, 0), np.minimum(positions + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


# --- shared ----------------------------------------------------------------------------------------------------------


def _label_ends(axes: Any, ends: list[End]) -> None:
    """Write each line's label beside its last point, moved apart where labels would overlap."""
    low, high = 0.0, 1.0  # heights are shares of the axes', whatever its scale
    spacing = 0.075  # height of a text line
    ends = sorted(ends, key=lambda end: end[0][1])
    axes.get_ylim()  # settles the limits
    to_share = axes.transData + axes.transAxes.inverted()
    ys = [float(to_share.transform(point)[1]) for point, _, _ in ends]
    heights = list(ys)
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + spacing)
    # Moving all back by the mean displacement centres the labels on their lines, within the axes.
    back = sum(height - y for height, y in zip(heights, ys, strict=True)) / len(ends)
    heights = [height - max(min(back, heights[0] - low), heights[-1] - high) for height in heights]
    right = max(x for (x, _), _, _ in ends)
    for (_, label, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            label, (right, height), xycoords=("data", "axes fraction"),
            xytext=(8, 0), textcoords="offset points", color=colour, va="center", fontsize=9,
        )  # fmt: skip


def save(figure: Figure, out: Path) -> None:
    with atomic_path(out) as temporary:
        # Without the library's version in it, equal inputs give equal bytes.
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
