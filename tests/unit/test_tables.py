"""Tables: rows from metrics, and the pages made of them."""

from __future__ import annotations

import html.parser
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from mixflow.config import entries, load_config
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.stages.render_tables import make_row, render
from mixflow.tables import (
    METRICS,
    build_row,
    cells,
    compare,
    difference,
    figure_files,
    figure_paths,
    render_html,
    render_markdown,
)

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


def test_a_row_says_which_arm_made_it() -> None:
    settings = CONFIG.slice("row", "digits_exposure_bias", "digits-rollout")
    page = "\n".join(rendered_notes(settings))
    assert "law uniform, gamma 0, self-rollout of 0.025 with weight 1, seed" in page
    for checkpoint, words in (("digits-perturbed", "input perturbation 0.1"), ("digits-mixec-g0.8", "target from the")):
        assert words in "\n".join(rendered_notes(CONFIG.slice("row", "digits_exposure_bias", checkpoint)))


def rendered_notes(row: dict[str, Any]) -> list[str]:
    """The lines of a page that holds one row of the config, of which nothing is measured."""
    table = {**CONFIG.slice("render", row["table"]), "rows": [row["row"]], "figures": []}
    return render_markdown(table, [build_row(row, lambda path: None)], {}).splitlines()


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
        assert len(measured) >= 3
        for row in measured:
            line = next(line for line in text.splitlines() if line.startswith(f"| {row.label} |"))
            assert line.count("–") == line.count("|") - 2, "nothing was measured"
            assert all(f"(paper {number:.2f})" in line for number in (row.paper or ())[:1] if number)
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


# --- uncertainty and differences -------------------------------------------------------------------------------------


def cell_of(metric: str, value: float | None, error: float | None = None, **more: Any) -> dict[str, Any]:
    return {"metric": metric, "value": value, "standard_error": error, "paper": None, **more}


DIFFERENCES: list[tuple[str, tuple[float, float | None], tuple[float, float | None], bool, str]] = [
    # sqrt(0.06^2 + 0.08^2) = 0.1, twice that is 0.2; 1.3% of 18 is 0.234
    ("fid", (15.64, 0.06), (18.0, 0.08), True, "beyond"),
    ("fid", (20.36, 0.06), (18.0, 0.08), True, "beyond"),
    ("fid", (17.82, 0.06), (18.0, 0.08), True, "in noise"),
    ("fid", (17.77, 0.06), (18.0, 0.08), True, "inconclusive"),
    ("fid", (17.76, 0.06), (18.0, 0.08), True, "beyond"),
    ("fid", (18.23, 0.06), (18.0, 0.08), True, "inconclusive"),
    ("fid", (17.77, 0.06), (18.0, 0.08), False, "beyond"),  # one checkpoint, two samplers: nothing was retrained
    ("fid", (17.90, 0.06), (18.0, 0.08), False, "in noise"),
    ("fid", (15.64, None), (18.0, 0.08), True, "noise unknown"),
    ("fid", (17.77, 0.06), (18.0, None), True, "inconclusive"),
    ("fd_dinov2", (99.0, 0.3), (100.0, 0.3), True, "inconclusive"),
    ("is", (101.0, 0.3), (100.0, 0.3), True, "in this run"),  # the 1.3% are of FID
    ("is", (101.0, 0.3), (100.0, 0.3), False, "beyond"),
    ("variance_ratio", (0.9, None), (1.0, None), True, "noise unknown"),
]


@pytest.mark.parametrize(("metric", "ours", "control", "retrained", "verdict"), DIFFERENCES)
def test_verdicts_on_a_difference(
    metric: str, ours: tuple[float, float | None], control: tuple[float, float | None], retrained: bool, verdict: str
) -> None:
    found = difference(cell_of(metric, *ours), cell_of(metric, *control), retrained=retrained)
    assert found is not None
    assert found.verdict == verdict
    assert found.value == pytest.approx(ours[0] - control[0])
    if ours[1] is None or control[1] is None:
        assert found.standard_error is None
    else:
        assert found.standard_error == pytest.approx(math.sqrt(ours[1] ** 2 + control[1] ** 2))


def test_what_is_not_measured_has_no_difference() -> None:
    assert difference(cell_of("fid", None), cell_of("fid", 1.0), retrained=True) is None
    assert difference(cell_of("fid", 1.0), cell_of("fid", None), retrained=True) is None


def measured(
    name: str, fd: float, errors: dict[str, float | None] | None = None, changes: Any = None, **more: Any
) -> dict[str, Any]:
    """Return the row `name`; `errors`, `more`: what its metrics.json adds, `changes`: to the slice `row`."""
    settings = {key: value for key, value in ROW.items() if key not in ("paper", "tolerance")}
    settings |= {"row": name, "label": name, "checkpoint": name, **(changes or {})}
    files = {path.replace("/mix/", f"/{settings['checkpoint']}/"): content for path, content in files_with(fd).items()}
    metrics = files[paths.metrics(settings["checkpoint"], "euler5")]
    metrics |= {"standard_errors": errors or {}, "num_images": 100, "labels": "balanced", **more}
    return build_row(settings, files.get)


ERRORS: dict[str, float | None] = {"fd": 0.06, "accuracy": None}


def test_a_row_says_what_its_metrics_say() -> None:
    warnings = ["3 of 100 images are equal."]
    row = measured("mix", 15.64, ERRORS, {"against": "base", "paper_labels": "random"}, warnings=warnings)
    fd, accuracy = row["cells"]
    assert (fd["standard_error"], accuracy["standard_error"]) == (0.06, None)
    assert (fd["labels"], fd["num_images"], fd["warnings"]) == ("balanced", 100, warnings)
    assert (row["against"], row["paper_labels"]) == ("base", "random")


def test_metrics_of_before_do_without() -> None:
    files = files_with(10.4)
    files[paths.metrics("mix", "euler5")]["protocol"] = {"sampler": {"labels": "random"}}
    fd = build_row(ROW, files.get)["cells"][0]
    assert (fd["standard_error"], fd["within_noise"], fd["num_images"]) == (None, None, None)
    assert (fd["labels"], fd["warnings"]) == ("random", [])


def without_new_keys(row: dict[str, Any]) -> dict[str, Any]:
    new = ("standard_error", "within_noise", "labels", "num_images", "warnings")
    rest = {key: value for key, value in row.items() if key not in ("against", "paper_labels")}
    cells = [{key: value for key, value in cell.items() if key not in new} for cell in row["cells"]]
    return {**rest, "cells": cells}


def test_rows_of_before_still_render() -> None:
    rows = [other_row("base", 12.0, 0.9), build_row(ROW, files_with(10.4).get), build_row(ROW, {}.get)]
    before = [without_new_keys(row) for row in rows]
    for render_page in (render_markdown, render_html):
        text = render_page(TABLE, before, {})
        assert text == render_page(TABLE, rows, {})
        assert "±" not in text
        assert "Differences" not in text
        assert "Before you compare" not in text


@pytest.mark.parametrize(
    ("metric", "paper", "value", "error", "within"),
    [
        ("fid", 10.0, 10.1249, 0.06, True),  # two standard errors and half of the last digit printed: 0.125
        ("fid", 10.0, 10.1251, 0.06, False),
        ("fid", 10.0, 9.8749, 0.06, False),
        ("precision", 0.69, 0.6989, 0.002, True),  # 0.004 + 0.005: papers print two digits
        ("precision", 0.69, 0.6991, 0.002, False),
        ("kid", 0.001, 0.001024, 0.00001, True),  # stored; shown and printed times 1000: 2e-5 + 0.5e-5
        ("kid", 0.001, 0.001026, 0.00001, False),
    ],
)
def test_noise_of_a_difference_to_the_paper(
    metric: str, paper: float, value: float, error: float, within: bool
) -> None:
    settings = {**ROW, "columns": [{"metric": metric, "sampler": "euler5"}], "paper": [paper]}
    file = {"metrics": {metric: value}, "standard_errors": {metric: error}}
    row = build_row(settings, {paths.metrics("mix", "euler5"): file}.get)
    assert row["cells"][0]["within_noise"] is within
    (comparison,) = compare([row])
    (found,) = comparison.differences
    assert found is not None
    assert (comparison.control, found.verdict) == ("the paper", "in noise" if within else "beyond noise")
    assert (found.value, found.standard_error) == (pytest.approx(value - paper), error)


def page_rows() -> list[dict[str, Any]]:
    return [
        measured("base", 18.0, {"fd": 0.08, "accuracy": 0.02}),
        measured("mix", 15.64, {"fd": 0.06, "accuracy": 0.02}, {"against": "base", "paper": [15.7, None]}),
        measured("near", 17.9, {"fd": 0.06, "accuracy": None}, {"against": "base"}),
        measured("same", 17.77, {"fd": 0.06, "accuracy": None}, {"against": "base", "checkpoint": "base"}),
        measured("floor", 17.77, {"fd": 0.06, "accuracy": None}, {"against": "base"}),
    ]


def test_a_page_with_uncertainty() -> None:
    text = render_markdown(TABLE, page_rows(), {})
    lines = text.splitlines()
    assert "| base | 18.00 ± 0.08 | **0.500** ± 0.020 |" in lines
    assert "| mix | **15.64** ± 0.06<br>(paper 15.70, −0.06) | **0.500** ± 0.020 |" in lines
    assert "| mix<br>(against base) | −2.36 ± 0.10<br>(better) | +0.000 ± 0.028<br>(in noise) |" in lines
    assert "| near<br>(against base) | −0.10 ± 0.10<br>(in noise) | +0.000<br>(noise unknown) |" in lines
    assert "| same<br>(against base) | −0.23 ± 0.10<br>(better) | +0.000<br>(noise unknown) |" in lines
    assert "| floor<br>(against base) | −0.23 ± 0.10<br>(inconclusive) | +0.000<br>(noise unknown) |" in lines
    assert "| mix<br>(against the paper) | −0.06 ± 0.06<br>(in noise) | – |" in lines
    for once in (
        "± is sampling noise only (one standard error, by a jackknife): it does not hold retraining",
        "- **better**: beyond sampling noise (twice the standard error) and, for Fréchet distances, beyond the 1.3%",
        "- **inconclusive**: inside the 1.3% by which retraining alone moves FID",
        "- **in noise**: inside sampling noise (twice the standard error): no difference shown",
        "several hundred SiTs on ImageNet 256",
        "Where they share seed and labels they move together",
        "- **against the paper**: ± is that of our number alone",
    ):
        assert text.count(once) == 1, once
    page = render_html(TABLE, page_rows(), {})
    assert '<td class="best">15.64<span>± 0.06</span><span>paper 15.70, −0.06</span></td>' in page
    assert "<td>−2.36<span>± 0.10</span><span>better</span></td>" in page
    assert '<td class="faint">−0.10<span>± 0.10</span><span>in noise</span></td>' in page
    assert '<th scope="row">mix<span>against base</span></th>' in page
    reader = PageReader()
    reader.feed(page)
    assert reader.open == []
    assert (reader.tags.count("table"), reader.tags.count("tr")) == (2, 6 + 6)


def test_the_legend_explains_what_is_there_alone() -> None:
    rows = [measured("base", 18.0, ERRORS), measured("same", 15.0, ERRORS, {"against": "base", "checkpoint": "base"})]
    text = render_markdown(TABLE, rows, {})
    assert "- **better**: beyond sampling noise (twice the standard error)\n" in text
    for absent in ("1.3%", "inconclusive", "in noise", "against the paper"):
        assert absent not in text
    assert compare([rows[0], measured("same", 15.0, ERRORS, {"against": "gone"})]) == []


def test_words_follow_what_is_better() -> None:
    columns = [{"label": "", "metric": metric} for metric in ("fd", "is", "variance_ratio")]
    rows = [
        {**other_row(name, 1, 1), "row": name, "checkpoint": name, "cells": cells, "against": against}
        for name, against, cells in (
            ("a", None, [cell_of("fd", 5.0, 0.1), cell_of("is", 90.0, 0.1), cell_of("variance_ratio", 1.0, 0.01)]),
            ("b", "a", [cell_of("fd", 6.0, 0.1), cell_of("is", 91.0, 0.1), cell_of("variance_ratio", 1.1, 0.01)]),
        )
    ]
    text = render_markdown({**TABLE, "columns": columns}, rows, {})
    words = "+1.00 ± 0.14<br>(worse) | +1.0 ± 0.1<br>(better in this run) | +0.100 ± 0.014<br>(higher in this run) |"
    assert words in text
    assert "- **better in this run, higher in this run**: beyond sampling noise, but how far retraining" in text


def test_how_numbers_are_shown() -> None:
    columns = [{"label": "", "metric": metric} for metric in ("kid", "precision", "fid")]
    row = {
        **other_row("a", 1, 1),
        "cells": [
            cell_of("kid", -0.00001, 0.0000213),  # stored as torch-fidelity's, shown times 1000
            cell_of("precision", 0.6912, 0.0021) | {"paper": 0.7, "difference": -0.0088, "within_tolerance": None},
            cell_of("fid", 1.1312, 0.0034),  # an error below the last digit is not nothing
        ],
    }
    quoted = {**row, "label": "q", "status": "quoted", "cells": [cell_of("kid", None), cell_of("precision", None) | {
        "paper": 0.7}, cell_of("fid", None)]}  # fmt: skip
    lines = render_markdown({**TABLE, "columns": columns}, [row, quoted], {}).splitlines()
    assert lines[2] == "|  | <br>KID ×1000 ↓ | <br>precision ↑ | <br>gFID ↓ |"
    assert lines[4] == "| a | −0.01 ± 0.02 | 0.691 ± 0.002<br>(paper 0.70, −0.009) | 1.13 ± 0.003 |"
    assert lines[5] == "| q | – | 0.70 | – |"


def compare_section(rows: list[dict[str, Any]]) -> list[str]:
    """Return what stands under "Before you compare"."""
    text = render_markdown(TABLE, rows, {})
    assert render_html(TABLE, rows, {}).count("<h2>Before you compare</h2>") == text.count("## Before you compare")
    lines = text.partition("## Before you compare\n\n")[2].partition("\n\n")[0].splitlines()
    return [line.removeprefix("- ") for line in lines]


RAE = "Balanced labels read about 0.1 lower FID on ImageNet than random ones (RAE's README)."


def test_numbers_of_other_labels_side_by_side() -> None:
    rows = [measured("a", 1.0), measured("b", 2.0, labels="random"), measured("c", 3.0), measured("d", 3.0)]
    assert compare_section([rows[0], rows[2]]) == []
    assert compare_section(rows) == ["**All columns**: balanced labels: a, c, d; random labels: b", RAE]
    unknown = measured("e", 1.0, labels="unknown")
    assert compare_section([rows[0], unknown]) == []

    quoted = {**ROW, "quoted": True, "label": "q", "columns": [{"metric": "fd"}, {"metric": "accuracy"}]}
    random = build_row({**quoted, "paper_labels": "random"}, {}.get)
    assert compare_section([rows[0], random]) == ["**Euler 5, FD**: balanced labels: a; random labels: q", RAE]
    assert compare_section([rows[0], build_row({**quoted, "paper_labels": "balanced"}, {}.get)]) == []
    assert compare_section([rows[0], build_row(quoted, {}.get)]) == []


def test_our_labels_against_the_paper_s() -> None:
    paper = {"paper": [10.0, None], "paper_labels": "random"}
    rows = [measured("a", 1.0, None, paper), measured("b", 1.0, None, paper), measured("c", 1.0)]
    assert compare_section(rows) == ["**a; b**: our labels are balanced, those of the paper's numbers random", RAE]
    assert compare_section([measured("a", 1.0, None, paper, labels="random")]) == []
    assert compare_section([measured("a", 1.0, None, {**paper, "paper": [None, None]})]) == []


def test_other_numbers_of_images_and_warnings() -> None:
    rows = [measured("a", 1.0), measured("b", 2.0, num_images=50_000), measured("c", 3.0)]
    assert compare_section(rows) == [
        "**All columns**: 100 images: a, c; 50,000 images: b; a Fréchet distance falls as images are added"
    ]
    rows = [measured("a", 1.0, warnings=["x", "y"]), measured("b", 1.0, warnings=["x"]), measured("c", 1.0)]
    assert compare_section(rows) == ["**a; b**: x", "**a**: y"]
    assert compare_section(rows[:2]) == ["**All rows**: x", "**a**: y"]
    columns = [{"label": "Euler 5", "metric": "fd"}, {"label": "Euler 9", "metric": "fd"}]
    cells = [cell_of("fd", 1.0, warnings=["x"]), cell_of("fd", 1.0, warnings=[])]
    text = render_markdown({**TABLE, "columns": columns}, [{**rows[0], "cells": cells}], {})
    assert "- **a (Euler 5)**: x" in text


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
    literals = (entries.CLASSIFIER_METRICS, entries.INCEPTION_METRICS, entries.DINOV2_METRICS)
    assert list(METRICS) == [name for literal in literals for name in typing.get_args(literal)]


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
