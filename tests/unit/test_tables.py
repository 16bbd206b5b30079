"""Tables: rows from metrics, and the pages made of them."""

from __future__ import annotations

import html.parser
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from mixflow import config as config_module
from mixflow.config import load_config
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.stages.render_tables import make_row, render
from mixflow.tables import METRICS, build_row, cells, figure_files, figure_paths, render_html, render_markdown

ROOT = Path(__file__).resolve().parents[2]
CONFIG = load_config(ROOT / "config.yaml")

ROW: dict[str, Any] = {
    "table": "t", "row": "mix", "label": "MixFlow", "checkpoint": "mix", "quoted": False,
    "columns": [{"metric": "fd", "sampler": "euler5", "num_steps": 5, "guidance": 1.0},
                {"metric": "accuracy", "sampler": "euler5", "num_steps": 5, "guidance": 1.0}],
    "paper": [10.0, None], "tolerance": {"relative": 0.05, "reason": "one run"},
    "made_by": {"init": "base", "law": "mixflow", "gamma": 0.8, "shift": 1.0, "num_steps": 1500, "batch_size": 128,
                "learning_rate": 3e-4, "seed": 1},
}  # fmt: skip
TABLE: dict[str, Any] = {
    "table": "t", "title": "A <table>", "paper": False, "figures": [], "notes": ["Read | it."], "rows": ["base", "mix"],
    "columns": [{"label": "Euler 5", "metric": "fd", "sampler": "euler5", "protocol": "100 images, seed 1"},
                {"label": "Euler 5", "metric": "accuracy", "sampler": "euler5", "protocol": "100 images, seed 1"}],
}  # fmt: skip


def files_with(fd: float, accuracy: float = 0.5) -> dict[str, Any]:
    return {
        "results/metrics/mix/euler5/metrics.json": {
            "metrics": {"fd": fd, "accuracy": accuracy}, "parents": {"samples": "ab" * 32},
        },
        "results/metrics/mix/euler5/run.json": {"code": {"commit": "0123456789abcdef", "dirty": False}},
    }  # fmt: skip


def other_row(label: str, fd: float, accuracy: float) -> dict[str, Any]:
    """Return a measured row without numbers of the paper."""
    settings = {key: value for key, value in ROW.items() if key not in ("paper", "tolerance")} | {"label": label}
    return build_row(settings, files_with(fd, accuracy).get)


def test_a_measured_row() -> None:
    row = build_row(ROW, files_with(10.4).get)
    assert row["status"] == "measured"
    fd, accuracy = row["cells"]
    assert fd["difference"] == pytest.approx(0.4)
    assert fd["within_tolerance"] is True
    assert (fd["num_steps"], fd["sampler"], fd["file"]) == (5, "euler5", paths.metrics("mix", "euler5"))
    assert (fd["commit"], fd["parents"]) == ("0123456789abcdef", {"samples": "ab" * 32})
    assert (accuracy["value"], accuracy["difference"], accuracy["within_tolerance"]) == (0.5, None, None)
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(("fd", "within"), [(9.5, True), (10.5, True), (9.49, False), (10.51, False)])
def test_tolerance_is_a_fraction_of_the_paper_s_number(fd: float, within: bool) -> None:
    assert build_row(ROW, files_with(fd).get)["cells"][0]["within_tolerance"] is within


def test_rows_that_are_not_measured() -> None:
    row = build_row(ROW, {}.get)
    assert row["status"] == "not run"
    assert [cell["value"] for cell in row["cells"]] == [None, None]
    quoted = {**ROW, "quoted": True, "columns": [{"metric": "fd"}, {"metric": "accuracy"}]}
    row = build_row(quoted, {}.get)
    assert row["status"] == "quoted"
    assert [cell["paper"] for cell in row["cells"]] == [10.0, None]


def test_a_metric_that_is_not_in_the_file() -> None:
    files = files_with(1.0)
    del files["results/metrics/mix/euler5/metrics.json"]["metrics"]["accuracy"]
    with pytest.raises(UserError, match="holds no metric 'accuracy': delete it and evaluate again"):
        build_row(ROW, files.get)


def test_markdown() -> None:
    rows = [other_row("base", 12.3456, 0.9), build_row(ROW, files_with(10.4).get)]
    lines = render_markdown(TABLE, rows, {"steps": "t/steps.png"}).splitlines()
    assert lines[2] == "|  | Euler 5<br>FD ↓ | Euler 5<br>accuracy ↑ |"
    assert lines[4] == "| base | 12.35 | **0.900** |"
    assert lines[5] == "| MixFlow | **10.40**<br>(paper 10.00, +0.40, within tolerance) | 0.500 |"
    text = "\n".join(lines)
    assert "](t/steps.png)" in text
    assert "Read \\| it." in text
    assert "law mixflow, gamma 0.8, seed 1; evaluated at commit 01234567; tolerance 5%: one run" in text
    assert "100 images, seed 1" in text
    for metric in ("fd", "accuracy"):
        assert METRICS[metric].definition in text
    assert METRICS["fid"].definition not in text


def test_nothing_is_best_where_neither_end_is_good_or_nothing_is_compared() -> None:
    table = {**TABLE, "columns": [{"label": "", "metric": "variance_ratio"}]}
    cell = {"metric": "variance_ratio", "value": 1.0, "paper": None}
    rows = [{**other_row(label, 1, 1), "cells": [cell]} for label in ("a", "b")]
    assert "**1.000**" not in render_markdown(table, rows, {})
    assert "**12.00**" not in render_markdown(TABLE, [other_row("a", 12, 0.5)], {})


def test_equal_numbers_are_equally_bold() -> None:
    text = render_markdown(TABLE, [other_row("a", 1.001, 0.1), other_row("b", 1.002, 0.2)], {})
    assert text.count("**1.00**") == 2


def test_a_row_not_run_yet_shows_dashes() -> None:
    text = render_markdown(TABLE, [build_row(ROW, {}.get)], {})
    assert "| MixFlow | –<br>(paper 10.00) | – |" in text
    assert "not run" in text


def test_tables_of_the_paper_say_what_is_quoted_and_what_was_not_run() -> None:
    for name in CONFIG.paper_tables():
        table = CONFIG.slice("render", name)
        rows = [build_row(CONFIG.slice("row", name, row), {}.get) for row in table["rows"]]
        text = render_markdown(table, rows, {})
        quoted = [row.label for row in CONFIG.tables[name].rows if row.quoted]
        measured = [row for row in CONFIG.tables[name].rows if not row.quoted]
        for label in quoted:
            assert f"- **{label}**: the paper's number, quoted; not reproduced here" in text
        assert len(measured) >= 4
        for row in measured:
            line = next(line for line in text.splitlines() if line.startswith(f"| {row.label} |"))
            assert line.count("–") == line.count("|") - 2, "nothing was measured"
            assert all(f"(paper {number:.2f})" in line for number in (row.paper or ())[:1])
            (remark,) = (line for line in text.splitlines() if line.startswith(f"- **{row.label}**: "))
            assert "not run yet" in remark
            assert (row.tolerance is None) == ("tolerance" not in remark)


def test_a_row_can_be_sampled_in_its_own_way() -> None:
    """Table 8's REPA rows: REPA's sampler and guidance in the columns of SiT's."""
    settings = CONFIG.slice("row", "table8", "repa-xl2-256-mixflow")
    assert {column["sampler"] for column in settings["columns"]} == {"repa-sde250", "repa-sde250-cfg1.8"}
    row = build_row(settings, {}.get)
    text = render_markdown(CONFIG.slice("render", "table8"), [row], {})
    assert "SDE 250, guidance 1.8 for t in [0.3, 1] (50,000 images, balanced labels, tf32, pixel values trunc" in text
    pairs = CONFIG.cells("table8", "repa-xl2-256-mixflow")
    assert [pair.sampler for pair in pairs] == ["repa-sde250", "repa-sde250-cfg1.8"]
    of_sit = {cell.sampler for cell in cells(CONFIG, "table8") if cell.row.startswith("sit")}
    assert of_sit == {"sde250", "sde250-cfg1.5"}


class PageReader(html.parser.HTMLParser):
    """Collects tags and addresses, and checks that tags close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_one_whole_page(tmp_path: Path) -> None:
    picture = tmp_path / "steps.png"
    picture.write_bytes(b"\x89PNG\r\n")
    rows = [other_row("a < b", 12.0, 0.9), build_row(ROW, files_with(10.4).get)]
    text = render_html(TABLE, rows, {"steps": str(picture)})
    page = PageReader()
    page.feed(text)
    assert page.open == []
    assert page.tags.count("tr") == 3
    assert page.addresses == ["data:image/png;base64,iVBORw0K"]
    assert "://" not in text
    assert "A &lt;table&gt;" in text
    assert "a &lt; b" in text
    assert '<td class="best">10.40<span>paper 10.00, +0.40, within tolerance</span></td>' in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_cells_and_files() -> None:
    found = cells(CONFIG, "digits")
    table = CONFIG.tables["digits"]
    assert len(found) == len(table.rows) * len(table.columns)
    assert {cell.file for cell in found} == {paths.metrics(*pair) for pair in CONFIG.cells("digits")}
    assert {cell.row for cell in cells(CONFIG, "main")} == {r.key for r in CONFIG.tables["main"].rows if not r.quoted}
    assert figure_paths(CONFIG, "digits") == [f"results/tables/digits/{n}.png" for n in ("samples", "steps", "losses")]
    assert figure_files(CONFIG.slice("figure", "digits", "losses"))[0] == paths.losses("digits-base")
    assert figure_files(CONFIG.slice("figure", "digits", "steps"))[0] == paths.row("digits", "digits-base")
    # Of the six samplers the one with most network calls: 50 guided steps.
    drawn = figure_files(CONFIG.slice("figure", "digits", "samples"))
    assert drawn[1] == paths.samples("digits-continued", "euler50-cfg2")


def test_every_metric_is_described() -> None:
    names = [*typing.get_args(config_module.CLASSIFIER_METRICS), *typing.get_args(config_module.INCEPTION_METRICS)]
    assert list(METRICS) == names


def test_from_files_to_files(tmp_path: Path) -> None:
    for name, content in files_with(10.4).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    row, markdown, page = tmp_path / "mix.json", tmp_path / "t.md", tmp_path / "t.html"
    make_row(ROW, out=row, root=tmp_path)
    picture = tmp_path / "t" / "steps.png"
    picture.parent.mkdir()
    picture.write_bytes(b"png")
    settings = {**TABLE, "rows": ["mix"], "figures": ["steps"]}
    render(settings, rows=[row], figures={"steps": picture}, markdown=markdown, page=page)
    assert "](t/steps.png)" in markdown.read_text()
    assert "10.40" in page.read_text()
    before = markdown.read_bytes(), page.read_bytes()
    render(settings, rows=[row], figures={"steps": picture}, markdown=markdown, page=page)
    assert (markdown.read_bytes(), page.read_bytes()) == before
    with pytest.raises(UserError, match="table 't' lacks its row 'base'"):
        render(TABLE, rows=[row], figures={}, markdown=markdown, page=page)
