"""The figure of the target theory: lag, shrinkage and left noise of perfect networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from mixflow.stages.draw_figures import COLOURS, STYLE, save

REFERENCE = "#777777"
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))  # of the spectra
MARKERS = ("o", "s", "^", "D", "v")  # of the values of gamma
ROWS = {
    "lag": "lag of the paired measure\nat $t=1$",
    "variance_ratio": "variance of samples\nover that of the data",
    "null_std": "std left in null directions",
}


def draw_theory(theory: dict[str, Any], points: list[dict[str, Any]], out: Path) -> None:
    """Draw the points of a theory.json: rows are what is predicted, columns what it is drawn against.

    One line style per spectrum, one colour per gamma; grey is what a perfect sampler shows (lag, variance) or the rule
    0.75 / sqrt(2 d_null) (noise).
    """
    held, spectra = theory["held"], sorted(theory["spectra"])
    columns = {"dimension": "dimensions", "gamma": "$\\gamma$", "steps": "Euler steps"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 8.6), layout="constrained")
        panels = figure.subplots(len(ROWS), len(columns), sharex="col", sharey="row")
        for row, name in enumerate(ROWS):
            for column, axis in enumerate(columns):
                _draw_panel(panels[row, column], theory, points, axis, name)
            panels[row, 0].set_ylabel(ROWS[name])
        for column, (axis, label) in enumerate(columns.items()):
            panels[-1, column].set_xlabel(label)
            fixed = {"dimension": f"{held['dimension']:,} dimensions", "steps": f"{held['steps']} steps"}
            panels[0, column].set_title(", ".join(text for key, text in fixed.items() if key != axis), loc="left")
        figure.legend(handles=_legend(held["gammas"], spectra), loc="outside lower left", ncols=3, frameon=False)
        save(figure, out)


def _draw_panel(axes: Axes, theory: dict[str, Any], points: list[dict[str, Any]], axis: str, name: str) -> None:
    held = theory["held"]
    fixed = {key: held[key] for key in ("dimension", "steps") if key != axis}
    for spectrum, style in zip(sorted(theory["spectra"]), STYLES, strict=False):
        gammas = [None] if axis == "gamma" else held["gammas"]
        for index, gamma in enumerate(gammas):
            wanted = fixed | {"spectrum": spectrum} | ({} if gamma is None else {"gamma": gamma})
            line = sorted((point for point in points if wanted.items() <= point.items()), key=lambda point: point[axis])
            # The exact field leaves no noise, which a logarithm cannot show.
            drawn = [point for point in line if name != "null_std" or point["gamma"] > 0]
            shown = [(point[axis], value) for point in drawn if (value := _value(point, name)) is not None]
            if shown:
                colour = COLOURS[4] if gamma is None else COLOURS[index % len(COLOURS)]
                marker = "." if gamma is None else MARKERS[index % len(MARKERS)]
                axes.plot(*zip(*shown, strict=True), color=colour, linestyle=style, marker=marker, markersize=4.5)
            if index == 0:
                _draw_reference(axes, line, axis, name, style)
    if axis == "gamma":
        axes.set_xlim(-0.03, 1.03)
    else:
        _log_axis(axes, theory["dimensions" if axis == "dimension" else "steps"])
    if name == "null_std":
        axes.set_yscale("log")


def _value(point: dict[str, Any], name: str) -> float | None:
    return 1 - point["paired_time"] if name == "lag" else point[name]


def _draw_reference(axes: Axes, line: list[dict[str, Any]], axis: str, name: str, style: Any) -> None:
    if name == "variance_ratio":
        axes.axhline(1, color=REFERENCE, linewidth=1)
        return
    key = "exact_flow_time" if name == "lag" else "null_std_rule"
    drawn = [(point[axis], 1 - point[key] if name == "lag" else point[key]) for point in line if point[key] is not None]
    if drawn:
        axes.plot(*zip(*drawn, strict=True), color=REFERENCE, linewidth=1, linestyle=style)


def _log_axis(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(gammas: list[float], spectra: list[str]) -> list[Line2D]:
    names = [("exact field" if gamma == 0 else f"MixFlow's optimum, $\\gamma$ = {gamma:g}") for gamma in gammas]
    lines = [
        Line2D([], [], color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], label=label)
        for index, label in enumerate(names)
    ]
    lines += [
        Line2D([], [], color=COLOURS[4], marker=".", label="the same, along $\\gamma$ (0: exact field)"),
        *(
            Line2D([], [], color="black", linestyle=style, label=f"{name} spectrum")
            for name, style in zip(spectra, STYLES, strict=False)
        ),
        Line2D([], [], color=REFERENCE, label="perfect sampler; below: $0.75/\\sqrt{2\\,d_{null}}$"),
    ]
    return lines
