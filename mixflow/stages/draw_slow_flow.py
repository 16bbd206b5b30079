"""The figure of Slow Flow: the paper's axes, one column per checkpoint, each beside what an exact sampler shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mixflow.runtime.files import read_json
from mixflow.stages.draw_figures import COLOURS, STYLE, save

FIRST = 0.05  # the paper's axes begin there
COLUMN, PANEL = 2.7, 2.5  # inches
BEFORE, AFTER, NULL = COLOURS[3], COLOURS[1], "#555555"
READINGS = {
    "from_start": "same pair, from $x_{{{start:g}}}$",
    "from_noise": "same pair, from noise",
    "own_end": "own end point",
}
CLOCKS = {
    "wasserstein": ("W2", COLOURS[0]),
    "kl": ("KL", COLOURS[2]),
    "energy": ("energy", COLOURS[4]),
    "null_space": ("null space", COLOURS[5]),
    "learned": ("learned", COLOURS[6]),
}


def draw_slow_flow(settings: dict[str, Any], files: list[Path], out: Path) -> None:
    """Draw the slice `slow_flow_figure` from the slow_flow.json of each of its arms, in order.

    The first is drawn as what was before, the others as what came after.
    """
    found = [read_json(file) for file in files]
    arms, paper = settings["arms"], settings.get("paper")
    with matplotlib.rc_context(STYLE):
        rows = len(READINGS) + 1
        figure = Figure(figsize=(0.7 + COLUMN * len(arms), 1.5 + PANEL * rows), layout="constrained")
        panels = figure.subplots(rows, len(arms), squeeze=False, sharey="row")
        for column, (arm, result) in enumerate(zip(arms, found, strict=True)):
            colour = BEFORE if column == 0 else AFTER
            for row, (reading, words) in enumerate(READINGS.items()):
                axes = panels[row, column]
                _draw_reading(axes, result["readings"][reading], colour)
                if column == 0:
                    axes.set_ylabel(f"nearest time $m$\n{words.format(start=result['start'])}")
            borders = (paper or {"borders": {}})["borders"].get(arm["checkpoint"])
            if paper is not None and borders is not None:
                for side in ("upper", "lower"):
                    panels[0, column].plot(paper["times"], borders[side], "x", color="black", markersize=4, zorder=5)
            panels[0, column].set_title(arm["label"], loc="left")
            _draw_clocks(panels[-1, column], result["clocks"])
            panels[-1, column].set_xlabel("sampling time $t$")
        panels[-1, 0].set_ylabel("marginal clock, $m - t$")
        figure.suptitle(f"{settings['title']}: {_protocol(settings, found)}", fontsize=11, x=0.01, ha="left")
        figure.legend(
            handles=_legend(found, paper), loc="outside lower left", ncols=2 if len(arms) < 3 else 4, frameon=False,
            fontsize=8,
        )  # fmt: skip
        save(figure, out)


def null_of(part: dict[str, Any]) -> str:
    """Return the null that is drawn: the one that knows the labels, as the network does, where there is one."""
    return "class_gaussian" if "class_gaussian" in part["nulls"] else "gaussian"


def _protocol(settings: dict[str, Any], found: list[dict[str, Any]]) -> str:
    images = sorted({result["num_images"] for result in found})
    return f"{settings['protocol']}, {' and '.join(f'{count:,}' for count in images)} images"


def _draw_reading(axes: Axes, part: dict[str, Any], colour: str) -> None:
    times, measured, null = part["times"], part["measured"], part["nulls"][null_of(part)]
    axes.plot([0, 1], [0, 1], "--", color="#999999", linewidth=1)
    axes.fill_between(times, measured["min"], measured["max"], color=colour, alpha=0.15, linewidth=0)
    axes.fill_between(times, measured["p5"], measured["p95"], color=colour, alpha=0.3, linewidth=0)
    axes.plot(times, measured["median"], color=colour)
    for border in ("min", "max"):
        axes.plot(times, null[border], color=NULL, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.plot(times, null["median"], color=NULL, linewidth=1.3, linestyle=(0, (4, 2)))
    axes.plot(times, part["exact_flow"][null_of(part)], color="black", linewidth=1, linestyle=":")
    axes.set_xlim(FIRST, 1)
    axes.set_ylim(FIRST, 1)
    axes.set_box_aspect(1)


def _draw_clocks(axes: Axes, clocks: dict[str, Any]) -> None:
    """Solid: the checkpoint. Dashed: its null. A clock that has no answer leaves a gap."""
    times = clocks["times"]
    null = null_of({"nulls": clocks["wasserstein"]})
    axes.axhline(0, color="#999999", linewidth=1)
    for name, (_, colour) in CLOCKS.items():
        for series, style, width in (("measured", "-", 1.4), (null, (0, (3, 2)), 1.0)):
            if name in clocks:
                lag = [float("nan") if m is None else m - t for t, m in zip(times, clocks[name][series], strict=True)]
                axes.plot(times, lag, color=colour, linestyle=style, linewidth=width)
    axes.set_xlim(FIRST, 1)
    axes.set_box_aspect(1)


def _legend(found: list[dict[str, Any]], paper: dict[str, Any] | None) -> list[Any]:
    null = null_of(found[0]["readings"]["from_noise"])
    law = "class-wise Gaussian" if null == "class_gaussian" else "Gaussian"
    names = [(BEFORE, "first checkpoint"), (AFTER, "others")][: len(found)]
    handles: list[Any] = [Patch(color=colour, alpha=0.4, label=f"{name}: 5-95%, all, median") for colour, name in names]
    handles += [
        Line2D([], [], color=NULL, linestyle=(0, (4, 2)), label=f"null ({law}, same sampler): min, median, max"),
        Line2D([], [], color="black", linestyle=":", linewidth=1, label="null, exact flow"),
    ]
    if paper is not None:
        handles.append(Line2D([], [], color="black", marker="x", linestyle="", markersize=4, label="paper's borders"))
    shown = [name for name in CLOCKS if any(name in result["clocks"] for result in found)]
    return handles + [Line2D([], [], color=CLOCKS[name][1], label=f"clock: {CLOCKS[name][0]}") for name in shown]
