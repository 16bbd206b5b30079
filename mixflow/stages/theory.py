"""What Euler makes of fields that are known exactly, against dimension, gamma and steps: a perfect network's faults.

Without slowing it follows in closed form (mixflow.flow.gaussian); under MixFlow's law the exact optimum of training
(mixflow.models.exact) is integrated from counter-based noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixflow.config import spectrum_variances
from mixflow.flow.gaussian import euler_factors, projected_time, std_along, velocity_slope
from mixflow.models import GaussianField
from mixflow.runtime.files import write_json
from mixflow.runtime.progress import log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.seeds import Stream, normal
from mixflow.sampling import sample, time_grid
from mixflow.stages.draw_theory import draw_theory

FEWEST = 32  # draws of a point, however many dimensions it has
NULL_RULE = 0.75  # of the noise that is left: about this / sqrt(2 d_null), with so many null directions


class Point(NamedTuple):
    """One setting: data of a spectrum in so many dimensions, slowed by gamma (0: the exact field), Euler steps."""

    spectrum: str
    dimension: int
    gamma: float
    steps: int


def make_theory(
    settings: dict[str, Any],
    *,
    out: Path,  # theory.json; run.json is written beside it
    figure: Path,  # PNG
) -> None:
    """Compute and draw the slice `theory` of the config."""
    theory = settings["theory"]
    record = RunRecord("theory", settings, {})
    points = list(dict.fromkeys(_points(theory)))
    found = []
    for number, point in enumerate(points, 1):
        found.append(measure(point, theory["spectra"][point.spectrum], theory["numbers"], theory["seed"]))
        log.info("theory: %d of %d, %s", number, len(points), ", ".join(map(str, point)))
    write_json(out, {"theory": theory, "points": found})
    draw_theory(theory, found, figure)
    record.write(out.parent / "run.json", [out, figure])


def _points(theory: dict[str, Any]) -> Iterator[Point]:
    """Yield the points of the figure: along one axis, with the others held."""
    held = theory["held"]
    for name in sorted(theory["spectra"]):  # JSON keeps no order
        for gamma in held["gammas"]:
            for dimension in theory["dimensions"]:
                yield Point(name, dimension, gamma, held["steps"])
            for steps in theory["steps"]:
                yield Point(name, held["dimension"], gamma, steps)
        for gamma in theory["gammas"]:
            yield Point(name, held["dimension"], gamma, held["steps"])


def measure(point: Point, spectrum: dict[str, Any], numbers: int, seed: int) -> dict[str, Any]:
    """Return what a sampler without any error of learning shows at a point.

    `variance_ratio`: total variance of its samples over that of the data. `paired_time`: the m whose x_m of the same
    noise and independent data is nearest to its samples, which a reader takes for 1; `exact_flow_time`: the same of a
    perfect sampler. `null_std`: the noise left along directions without variance, None where there are none;
    `null_std_rule`: 0.75 / sqrt(2 d_null). Each has a `..._error`, its standard error (0 in closed form).
    """
    variances = torch.tensor(spectrum_variances(spectrum, point.dimension), dtype=torch.float64)
    null, zero = variances == 0, torch.zeros_like(variances)
    times = time_grid(point.steps)
    exact_flow = projected_time(variances, zero, 0.0, 1.0, variances.sqrt())
    if point.gamma == 0:
        std = std_along(euler_factors(lambda t: velocity_slope(variances, t), times))[-1]
        noise = end = None
        growth, energy = std, std.square()
    else:
        noise, end = _integrate(point, variances, times, numbers, seed)
        # Ratios, since the noise that was drawn explains most of the scatter.
        growth, energy = (noise * end).sum(0) / noise.square().sum(0), end.square().sum(0) / noise.square().sum(0)
    result = {
        **point._asdict(),
        "draws": 0 if noise is None else len(noise),
        "variance_ratio": float(energy.sum() / variances.sum()),
        "paired_time": float(projected_time(variances, zero, 0.0, 1.0, growth)),
        "exact_flow_time": float(exact_flow),
        "null_std": float(energy[null].mean().sqrt()) if null.any() else None,
        "null_std_rule": NULL_RULE / math.sqrt(2 * int(null.sum())) if null.any() else None,
    }
    return result | _errors(result, variances, noise, end)


def _integrate(point: Point, variances: Tensor, times: Tensor, numbers: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noise and samples, float64 [n,d]: Euler on the exact optimum of MixFlow."""
    shape = (point.dimension, 1, 1)
    net = GaussianField.from_spectrum(torch.zeros(shape), variances, law="mixflow", gamma=point.gamma)
    indices = torch.arange(max(FEWEST, numbers // point.dimension))
    noise = normal(seed, Stream.NOISE, 0, indices, shape).double()
    labels = torch.zeros(len(indices), dtype=torch.int64)
    end = sample(lambda x, t: net(x, t, labels), noise, solver="euler", times=times)
    return noise.flatten(1), end.flatten(1)


def _errors(
    result: dict[str, Any], variances: Tensor, noise: Tensor | None, end: Tensor | None
) -> dict[str, float | None]:
    """Return the standard errors over draws, of ratios to first order."""
    null = variances == 0
    if noise is None or end is None:
        return {"variance_ratio_error": 0.0, "paired_time_error": 0.0, "null_std_error": 0.0 if null.any() else None}

    def error(above: Tensor, below: Tensor) -> Tensor:  # [n,d] each -> of the sum of ratios of sums over draws
        ratio = above.sum(0) / below.sum(0)
        return ((above - ratio * below) / below.mean(0)).sum(1).std() / math.sqrt(len(above))

    square = noise.square()
    of_null = None
    if null.any():
        of_null = error(end.square()[:, null], square[:, null]) / int(null.sum()) / (2 * result["null_std"])
    return {
        "variance_ratio_error": float(error(end.square(), square) / variances.sum()),
        "paired_time_error": float(error(noise * end, square) / (variances + 1).sum()),
        "null_std_error": None if of_null is None else float(of_null),
    }
