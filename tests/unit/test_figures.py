"""Figures: what is drawn is what the files hold, and equal inputs give equal bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixflow.runtime.errors import UserError
from mixflow.stages import draw_figures
from mixflow.stages.draw_figures import draw, draw_losses, draw_samples, draw_steps


def write_samples(path: Path, labels: np.ndarray | None, grey: int = 0) -> Path:
    """Write images whose red is their index, whose green is `grey`."""
    count = 40 if labels is None else len(labels)
    images = np.zeros((count, 8, 8, 3), np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 1] = grey
    np.savez(path, arr_0=images, **({} if labels is None else {"arr_1": labels}))
    return path


def make_row(label: str, values: dict[tuple[int, float], float | None]) -> dict[str, Any]:
    cells = [
        {"metric": "fd", "num_steps": steps, "guidance": scale, "value": value}
        for (steps, scale), value in values.items()
    ]
    return {"label": label, "cells": [*cells, {"metric": "accuracy", "value": 0.5}]}


def write_losses(path: Path, last: int) -> Path:
    steps = list(range(50, last + 1, 50))
    path.write_text(json.dumps({"step": steps, "loss": [1 / step for step in steps]}))
    return path


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert "Software" not in image.info
        return image.size


def test_samples_are_the_first_of_each_class(tmp_path: Path) -> None:
    labels = np.array([2, 0, 1, 1, 0, 2, 2, 1, 0, 0])
    indices = draw_figures._indices_by_class(write_samples(tmp_path / "a.npz", labels))
    assert indices.tolist() == [[1, 2, 0], [4, 3, 5], [8, 7, 6]]  # rows of classes 0, 1, 2
    assert draw_figures._images(tmp_path / "a.npz", indices)[..., 0, 0, 0].tolist() == indices.tolist()


def test_samples_without_labels_are_the_first(tmp_path: Path) -> None:
    indices = draw_figures._indices_by_class(write_samples(tmp_path / "a.npz", None))
    assert indices.tolist() == np.arange(40).reshape(4, 10).tolist()


def test_only_the_first_rows_of_a_member_are_read(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "a.npz", np.arange(30))
    part = draw_figures._read_member(path, "arr_0", 3)
    np.testing.assert_array_equal(part, np.load(path)["arr_0"][:3])
    assert draw_figures._read_member(path, "arr_2", 3) is None


def test_sheet_keeps_pixels_and_order() -> None:
    images = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.ones((1, 1, 16, 16, 3), np.uint8)
    sheet = draw_figures._sheet(images)
    assert sheet.shape == (2 * 17 - 1, 3 * 17 - 1, 3)
    assert sheet[::17, ::17, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (sheet[16] == 255).all()


def test_samples_of_another_length(tmp_path: Path) -> None:
    files = {
        "a": write_samples(tmp_path / "a.npz", np.arange(40) % 10),
        "b": write_samples(tmp_path / "b.npz", np.arange(9)),
    }
    with pytest.raises(UserError, match="holds 9 images, fewer than the other arms"):
        draw_samples(files, tmp_path / "samples.png")


def test_figures_are_png_and_repeatable(tmp_path: Path) -> None:
    labels = np.arange(40) % 10
    samples = {str(k): write_samples(tmp_path / f"{k}.npz", labels, grey=50 * k) for k in range(3)}
    losses = {"base": write_losses(tmp_path / "b.json", 3000), "arm": write_losses(tmp_path / "a.json", 1500)}
    rows = [make_row("base", {(5, 1.0): 30.0, (50, 1.0): 20.0, (5, 2.0): 10.0}), make_row("arm", {(5, 1.0): None})]
    for name in ("first", "second"):
        draw_samples(samples, tmp_path / f"{name}-samples.png", title="Euler 5")
        draw_steps(rows, tmp_path / f"{name}-steps.png")
        draw_losses(losses, tmp_path / f"{name}-losses.png")
    for figure in ("samples", "steps", "losses"):
        first, second = (tmp_path / f"{name}-{figure}.png" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        assert size(first)[0] == pytest.approx(2 * 4.6 * 150, abs=2)  # two panels side by side at 150 dpi


def test_the_base_has_its_own_panel_only_where_its_steps_differ(tmp_path: Path) -> None:
    files = {"base": write_losses(tmp_path / "b.json", 1500), "arm": write_losses(tmp_path / "a.json", 1500)}
    draw_losses(files, tmp_path / "losses.png")
    assert size(tmp_path / "losses.png")[0] == pytest.approx(4.6 * 150, abs=2)


def test_arms_that_share_a_training_share_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their losses would lie on each other; a target of another size does not flatten the rest."""
    drawn: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        draw_figures, "_label_ends", lambda axes, ends: drawn.append((axes.get_yscale(), [end[1] for end in ends]))
    )
    shared, other = write_losses(tmp_path / "a.json", 1500), write_losses(tmp_path / "b.json", 1500)
    draw_losses({"arm": shared, "other": other, "arm, corrected": shared}, tmp_path / "losses.png")
    large = tmp_path / "c.json"
    large.write_text(json.dumps({"step": [750, 1500], "loss": [30.0, 20.0]}))
    draw_losses({"arm": shared, "another target": large}, tmp_path / "losses.png")
    assert drawn == [("linear", ["arm", "other"]), ("log", ["arm", "another target"])]


def test_points_are_the_measured_cells_by_steps() -> None:
    row = make_row("a", {(50, 1.0): 3.0, (5, 1.0): 9.0, (10, 1.0): None, (5, 2.0): 4.0})
    assert draw_figures._points(row, "fd", (False, "")) == [(5, 9.0, None), (50, 3.0, None)]
    row["cells"][0] |= {"solver": "heun", "interval": [2.5, 3.5]}
    assert draw_figures._points(row, "fd", (False, "heun")) == [(50, 3.0, (2.5, 3.5))]
    assert draw_figures._points(row, "fd", (False, "")) == [(5, 9.0, None)]


def test_solvers_have_panels_and_replicates_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(draw_figures, "save", lambda figure, out: drawn.append(figure))
    row = make_row("a", {(5, 1.0): 9.0, (10, 1.0): 8.0})
    for cell, solver in zip(row["cells"][:2], ("euler", "heun"), strict=True):
        cell |= {"solver": solver, "interval": [-1.0, 12.0]}
    draw_steps([row], tmp_path / "steps.png")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == [
        "Euler, without guidance", "Heun, without guidance"
    ]  # fmt: skip
    for axes in drawn[0].axes:
        (bar,) = axes.collections
        assert [float(y) for _, y in bar.get_segments()[0]] == [0.0, 12.0]
        assert axes.get_ylim()[1] > 12


def test_the_variance_ratio_is_drawn_around_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(draw_figures, "save", lambda figure, out: drawn.append(figure))
    row = make_row("a", {(5, 1.0): 0.8, (10, 1.0): 0.9})
    for cell in row["cells"]:
        cell["metric"] = "variance_ratio"
    draw_figures.draw_variance([row], tmp_path / "variance.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert 0.7 < low < 0.8
    assert 1.0 < high < 1.1


def test_distance_against_gamma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(draw_figures, "save", lambda figure, out: drawn.append(figure))
    rows = [make_row("file", {(5, 1.0): 1.0}), make_row("b", {(5, 1.0): 9.0}), make_row("a", {(5, 1.0): 8.0})]
    for row, made_by in zip(rows, ({"file": "x"}, {"gamma": 0.8}, {"gamma": 0.0}), strict=True):
        row["made_by"] = made_by
    draw_figures.draw_gamma(rows, tmp_path / "gamma.png")
    (line,) = drawn[0].axes[0].lines
    assert [line.get_xdata().tolist(), line.get_ydata().tolist()] == [[0.0, 0.8], [8.0, 9.0]]
    with pytest.raises(UserError, match="no FD of a trained row yet"):
        draw_figures.draw_gamma(rows[:1], tmp_path / "gamma.png")


def test_no_line_leaves_its_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The panels share an axis: the right one's numbers may be larger than the left one's."""
    drawn = []
    monkeypatch.setattr(draw_figures, "save", lambda figure, out: drawn.append(figure))
    draw_steps([make_row("a", {(5, 1.0): 9.0, (10, 1.0): 8.0, (5, 2.0): 12.0, (10, 2.0): 3.0})], tmp_path / "steps.png")
    for axes in drawn[0].axes:
        low, high = axes.get_ylim()
        assert all(low <= value <= high for line in axes.lines for value in line.get_ydata())
    assert len(drawn[0].axes) == 2


def test_steps_without_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finds no FD yet: make the rows first"):
        draw_steps([make_row("a", {(5, 1.0): None})], tmp_path / "steps.png")
    with pytest.raises(UserError, match="needs a column of fd or fid"):
        draw_steps([make_row("a", {})], tmp_path / "steps.png")


def test_smoothing_is_a_moving_average() -> None:
    values = np.arange(40.0)
    smooth = draw_figures._smooth(values)
    assert smooth[2:-2].tolist() == values[2:-2].tolist()  # a line is its own centred average
    assert smooth[0] == np.mean(values[:3])
    assert draw_figures._smooth(np.array([3.0])).tolist() == [3.0]


def test_draw_takes_a_slice(tmp_path: Path) -> None:
    arms = [{"label": "base", "row": "base", "checkpoint": "base"}]
    losses = write_losses(tmp_path / "losses.json", 200)
    draw({"table": "t", "figure": "losses", "arms": arms}, [losses], tmp_path / "losses.png")
    row = tmp_path / "row.json"
    row.write_text(json.dumps(make_row("base", {(5, 1.0): 2.0})))
    draw({"table": "t", "figure": "steps", "arms": arms}, [row], tmp_path / "steps.png")
    samples = write_samples(tmp_path / "samples.npz", np.arange(40) % 10)
    settings = {"table": "t", "figure": "samples", "arms": arms, "sampler": "euler5", "title": "Euler 5"}
    draw(settings, [samples], tmp_path / "samples.png")
    for figure in ("losses", "steps", "samples"):
        size(tmp_path / f"{figure}.png")
