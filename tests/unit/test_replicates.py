"""Replicates: the entries that tables ask for, the files behind their rows, and what the rows and pages say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixflow.config import load_config, resolve
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.stages.jobs import Job, Jobs
from mixflow.stages.where import Where
from mixflow.stages.where import render as render_where
from mixflow.tables import build_row, cells, metric_files, render_html, render_markdown

ROOT = Path(__file__).resolve().parents[2]
CONFIG = load_config(ROOT / "config.yaml")
TABLE = "digits_exposure_bias"


RAW = yaml.safe_load((ROOT / "config.yaml").read_text())


def raw() -> dict[str, Any]:
    return copy.deepcopy(RAW)


def every_slice(config: Any, raw: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """The slices of the entries that `raw` writes out, and of tables without replicates."""
    found: dict[tuple[str, ...], Any] = {}
    for name, entry in config.checkpoints.items():
        if name in raw["checkpoints"]:
            stage = "train" if entry.train else "make_exact" if entry.exact else "import_weights"
            found[stage, name] = config.slice(stage, name)
    for name, table in config.tables.items():
        if table.replicates is None:
            found |= {("row", name, row.key): config.slice("row", name, row.key) for row in table.rows}
            found |= {("figure", name, figure): config.slice("figure", name, figure) for figure in table.figures}
            found["render", name] = config.slice("render", name)
            for pair in config.cells(name):
                found["sample", *pair] = config.slice("sample", *pair)
                found["evaluate", *pair] = config.slice("evaluate", *pair)
    return found


# --- entries


def test_replicates_change_no_slice_of_what_was_there() -> None:
    without = raw()
    for table in without["tables"].values():
        table.pop("replicates", None)
    plain = resolve(without)
    slices, before = every_slice(CONFIG, without), every_slice(plain, without)
    assert len(slices) > 100
    for key, wanted in slices.items():
        assert before[key] == wanted, key


def test_a_replicate_is_the_entry_that_one_would_write_by_hand() -> None:
    written = raw()
    written["checkpoints"]["digits-matched-seed2"] = {"extends": "digits-matched", "train": {"seed": 2}}
    written["samplers"]["digits-euler5-seed101"] = {"extends": "digits-euler5", "seed": 101}
    by_hand = resolve(written)
    names = "digits-matched-seed2", "digits-euler5-seed101"
    for stage, wanted in (("train", names[:1]), ("sample", names), ("evaluate", names)):
        assert CONFIG.slice(stage, *wanted) == by_hand.slice(stage, *wanted)
    assert CONFIG.slice("train", names[0])["train"]["seed"] == 2
    assert CONFIG.slice("sample", *names)["sampler"]["seed"] == 101


def test_a_name_that_is_taken_by_something_else() -> None:
    written = raw()
    written["checkpoints"]["digits-matched-seed2"] = {"extends": "digits-matched", "train": {"seed": 9}}
    with pytest.raises(UserError, match=r"checkpoints.digits-matched-seed2: the replicate .* other settings: rename"):
        resolve(written)


def test_seeds_of_an_entry_s_own_are_the_entry_and_what_rows_share_is_only_sampled_again() -> None:
    made = CONFIG.slice("row", TABLE, "digits-matched")["replicates"]
    assert [one["checkpoint"] for one in made] == ["digits-matched", "digits-matched-seed2", "digits-matched-seed3"]
    assert [one["samplers"]["digits-euler5"] for one in made] == [
        "digits-euler5", "digits-euler5-seed101", "digits-euler5-seed102"
    ]  # fmt: skip
    base = CONFIG.slice("row", TABLE, "digits-base")["replicates"]
    assert [(one["training"], one["checkpoint"]) for one in base] == [(None, "digits-base")] * 3
    assert [one["samplers"] for one in base] == [one["samplers"] for one in made]
    trained = [job.names[0] for job in Jobs(CONFIG, ["digits_science"]) if job.rule == "train"]
    assert len(trained) == len(set(trained))
    assert "digits-base-seed2" not in CONFIG.checkpoints
    assert "digits-matched-seed1" not in CONFIG.checkpoints
    for name in trained:
        assert name == "digits-base" or CONFIG.parent(name) == "digits-base"


def test_weights_from_a_file_are_only_sampled_again() -> None:
    written = raw()
    written["tables"]["gamma"]["replicates"] = {"training": [0, 1], "sampling": [0, 1]}
    config = resolve(written)
    made = config.slice("row", "gamma", "sit-b2-256")["replicates"]
    assert [(one["training"], one["checkpoint"]) for one in made] == [(None, "sit-b2-256")] * 2
    assert config.slice("train", "sit-b2-256-beta-seed1")["train"]["seed"] == 1


@pytest.mark.parametrize(
    ("replicates", "message"),
    [
        ({"training": [1, 2], "sampling": [1]}, "replicates.training: 2 seeds for 1 of sampling"),
        ({"training": [1, 1], "sampling": [1, 2]}, r"replicates.training: \[1, 1\] holds a seed twice"),
        ({"training": [], "sampling": []}, "tables.digits.replicates.training"),
        ({"training": [1, 2]}, "tables.digits.replicates.sampling: missing"),
    ],
)
def test_seeds_that_do_not_pair(replicates: dict[str, Any], message: str) -> None:
    written = raw()
    written["tables"]["digits"]["replicates"] = replicates
    with pytest.raises(UserError, match=message):
        resolve(written)


# --- files


def test_the_files_of_a_row_are_those_of_its_replicates_and_of_its_controls() -> None:
    settings = CONFIG.slice("row", TABLE, "digits-mixflow-g0.8")
    files = metric_files(settings)
    assert paths.metrics("digits-mixflow-g0.8-seed3", "digits-euler5-seed102") in files
    assert paths.metrics("digits-matched-seed2", "digits-euler5-seed101") in files
    assert paths.metrics("digits-continued", "digits-euler20") in files
    assert len(files) == 3 * 3 * 2  # rows, replicates, samplers
    assert paths.metrics("digits-matched-seed2", "digits-euler5-seed102") not in files  # seeds go together
    own = {cell.file for cell in cells(CONFIG, TABLE) if cell.row == "digits-mixflow-g0.8"}
    assert len(own) == 6
    assert own < set(files)
    assert {paths.metrics(*pair) for pair in CONFIG.cells(TABLE)} == {cell.file for cell in cells(CONFIG, TABLE)}


def test_jobs_and_where_know_replicates(tmp_path: Path) -> None:
    jobs = Jobs(CONFIG, [TABLE])
    assert Job("train", ("digits-matched-seed2",)) in jobs.needs
    needs = jobs.needs[Job("row", (TABLE, "digits-matched"))]
    assert Job("evaluate", ("digits-continued-seed2", "digits-euler5-seed101")) in needs
    text = render_where(Where(CONFIG, TABLE, tmp_path), "digits-matched", ["config.yaml"])
    assert "results/checkpoints/digits-matched-seed3/model.safetensors" in text
    assert "results/metrics/digits-matched-seed2/digits-euler20-seed101/metrics.json" in text
    assert "checkpoints.digits-matched-seed2, checkpoints.digits-base" in text


# --- rows and pages


def replicated(name: str, trained: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "training": seed if trained else None,
            "sampling": seed,
            "checkpoint": f"{name}-seed{seed}" if trained else name,
            "samplers": {"euler5": f"euler5-seed{seed}"},
        }
        for seed in (1, 2, 3)
    ]


def settings_of(name: str, against: str | None = None, metrics: tuple[str, ...] = ("fd",)) -> dict[str, Any]:
    columns = [{"metric": metric, "sampler": "euler5", "num_steps": 5, "guidance": 1.0} for metric in metrics]
    made_by = {"init": "base", "law": "mixflow", "gamma": 0.8, "shift": 1.0, "num_steps": 1500, "batch_size": 128,
               "learning_rate": 3e-4, "seed": 1}  # fmt: skip
    control = {"row": against, "label": (against or "").title(), "columns": columns, "replicates": []}
    if against:
        control["replicates"] = replicated(against)
    return {
        "table": "t", "row": name, "label": name.title(), "checkpoint": name, "quoted": False, "columns": columns,
        "made_by": made_by, "replicates": replicated(name), **({"against": against} if against else {}),
        **({"controls": [control]} if against else {}),
    }  # fmt: skip


def metrics_of(**values: list[float | None]) -> dict[str, Any]:
    """Metrics files of rows: name -> value of fd for each replicate, None where it is not made."""
    return {
        paths.metrics(f"{name}-seed{seed}", f"euler5-seed{seed}"): {
            "metrics": {"fd": value},
            "standard_errors": {"fd": 0.05},
            "num_images": 100,
            "labels": "balanced",
        }
        for name, numbers in values.items()
        for seed, value in enumerate(numbers, start=1)
        if value is not None
    }


def test_a_replicated_row() -> None:
    files = metrics_of(mix=[2.0, 3.0, 4.0], plain=[1.5, 2.4, 3.3])
    row = build_row(settings_of("mix", "plain"), files.get)
    assert row["status"] == "measured"
    (cell,) = row["cells"]
    assert (cell["value"], cell["standard_deviation"]) == (3.0, 1.0)
    assert cell["interval"] == pytest.approx((3 - 4.302653 / 3**0.5, 3 + 4.302653 / 3**0.5), abs=1e-5)
    assert [one["value"] for one in cell["replicates"]] == [2.0, 3.0, 4.0]
    assert cell["replicates"][2]["file"] == paths.metrics("mix-seed3", "euler5-seed3")
    assert (cell["replicates"][2]["training"], cell["replicates"][2]["sampling"]) == (3, 3)
    assert cell["standard_error"] == pytest.approx(0.05 / 3**0.5)
    (pair,) = cell["paired"]
    assert pair["differences"] == pytest.approx([0.5, 0.6, 0.7])
    assert pair["mean"] == pytest.approx(0.6)
    assert pair["interval"] == pytest.approx((0.6 - 0.248413, 0.6 + 0.248413), abs=1e-5)
    assert pair["sampling_error"] == pytest.approx(0.05 * 2**0.5 / 3**0.5)  # no groups: as if independent
    assert pair["detectable"] == pytest.approx(0.326, abs=0.001)
    assert pair["covers"] == "training and sampling"
    assert pair["sentence"] == "Mix is worse than Plain in FD: +0.60 [+0.35, +0.85] over 3 replicates."
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("mix", "plain", "verdict", "sentence"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.6, 3.4], "better",
         "Mix is better than Plain in FD: −0.50 [−0.75, −0.25] over 3 replicates."),
        ([1.0, 2.0, 3.0], [1.5, 1.6, 3.4], "not decided",
         "Not decided: Mix less Plain is −0.17 [−1.39, +1.06] over 3 replicates in FD, which could have shown 1.61 or "
         "more."),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "equal", "Mix and Plain have the same FD in 3 replicates."),
        # Exactly as far apart each time, but closer than what sampling does.
        ([1.0, 2.0, 3.0], [1.03125, 2.03125, 3.03125], "not decided",
         "Not decided: Mix less Plain is −0.03 [−0.03, −0.03] over 3 replicates in FD, which is inside the noise "
         "of sampling; 0.23 or more could have been seen."),
        ([1.0, None, 3.0], [1.0, 2.0, 3.0], "not run", "Not run yet."),
        ([1.0, 2.0, 3.0], [1.0, 2.0, None], "not run", "Not run yet."),
    ],
)  # fmt: skip
def test_verdicts_follow_from_the_numbers(
    mix: list[float | None], plain: list[float | None], verdict: str, sentence: str
) -> None:
    row = build_row(settings_of("mix", "plain"), metrics_of(mix=mix, plain=plain).get)
    (pair,) = row["cells"][0]["paired"]
    assert (pair["verdict"], pair["sentence"]) == (verdict, sentence)
    assert row["status"] == ("not run" if None in mix else "measured")
    assert (row["cells"][0]["value"] is None) == (None in mix)


def one_seed(settings: dict[str, Any], count: int) -> dict[str, Any]:
    controls = [{**control, "replicates": control["replicates"][:count]} for control in settings["controls"]]
    return {**settings, "replicates": settings["replicates"][:count], "controls": controls}


def test_one_replicate_decides_nothing() -> None:
    row = build_row(one_seed(settings_of("mix", "plain"), 1), metrics_of(mix=[2.0], plain=[1.0]).get)
    (pair,) = row["cells"][0]["paired"]
    assert (pair["verdict"], pair["interval"], pair["detectable"]) == ("not decided", None, None)
    assert pair["sentence"] == "Not decided: Mix less Plain is +1.00 in FD, but one replicate has no spread."
    assert "One replicate" in render_markdown(PAGE, [row], {})


def test_two_replicates_must_agree_well() -> None:
    two = one_seed(settings_of("mix", "plain"), 2)
    row = build_row(two, metrics_of(mix=[2.0, 2.2], plain=[1.0, 1.0]).get)
    assert row["cells"][0]["paired"][0]["verdict"] == "not decided"
    row = build_row(two, metrics_of(mix=[2.0, 2.1], plain=[1.0, 1.0]).get)
    assert row["cells"][0]["paired"][0]["verdict"] == "worse"


def test_what_sets_of_samples_share_is_no_noise() -> None:
    files = metrics_of(mix=[2.0, 2.0, 2.0], plain=[1.99, 1.98, 1.985])
    row = build_row(settings_of("mix", "plain"), files.get)
    assert row["cells"][0]["paired"][0]["verdict"] == "not decided"  # for lack of groups
    for file in files.values():
        file["group_influences"] = {"fd": [0.05, -0.05] * 5}
    row = build_row(settings_of("mix", "plain"), files.get)
    assert row["cells"][0]["paired"][0]["sampling_error"] == 0
    assert row["cells"][0]["paired"][0]["verdict"] == "worse"


def test_a_metric_where_neither_end_is_good() -> None:
    files = metrics_of(mix=[2.0, 3.0, 4.0], plain=[1.5, 2.4, 3.3])
    for file in files.values():
        file["metrics"]["variance_ratio"] = file["metrics"]["fd"]
    row = build_row(settings_of("mix", "plain", ("variance_ratio",)), files.get)
    assert row["cells"][0]["paired"][0]["verdict"] == "higher"


PAGE: dict[str, Any] = {
    "table": "t", "title": "T", "paper": False, "figures": [], "notes": [], "rows": ["plain", "mix"],
    "columns": [{"label": "Euler 5", "metric": "fd", "sampler": "euler5", "protocol": "100 images"}],
}  # fmt: skip


def test_pages_show_spread_intervals_and_verdicts() -> None:
    files = metrics_of(mix=[2.0, 3.0, 4.0], plain=[1.5, 2.4, 3.3])
    rows = [build_row(settings_of("plain"), files.get), build_row(settings_of("mix", "plain"), files.get)]
    text = render_markdown(PAGE, rows, {})
    assert "| Mix | 3.00 ± 1.00<br>(0.52 to 5.48) |" in text
    assert "| Mix<br>(against Plain) | +0.60<br>[+0.35, +0.85]<br>could show 0.33<br>**worse (Holm)** |" in text
    assert "Mix is worse than Plain in FD: +0.60 [+0.35, +0.85] over 3 replicates." in text
    assert "With 3 paired replicates a true difference is found in four cases of five where it is at least 3.26" in text
    assert text.index("With 3 paired replicates") < text.index("could show 0.33")  # before the numbers
    assert "1 differences are tested here and 1 of them called; if nothing differed, about 0.1" in text
    assert "seeds 1, 2, 3" in text
    assert "seeds 100, 101, 102" in CONFIG.slice("render", TABLE)["columns"][0]["protocol"]
    assert "retraining floor" not in text  # a measured one takes its place
    page = render_html(PAGE, rows, {})
    for part in ("3.00<span>± 1.00</span>", "[+0.35, +0.85]", "could show 0.33", "worse (Holm)", "Mix is worse than"):
        assert part in page


def test_holm_takes_calls_back_where_many_are_made() -> None:
    columns = tuple(["fd"] * 30)
    files = metrics_of(mix=[2.0, 3.0, 4.0], plain=[1.5, 2.4, 3.3])
    row = build_row(settings_of("mix", "plain", columns), files.get)
    text = render_markdown({**PAGE, "columns": PAGE["columns"] * 30}, [row], {})
    assert text.count("**worse**") == 30
    assert "(Holm)**" not in text
    assert "30 differences are tested here and 30 of them called; if nothing differed, about 1.5" in text


def test_rows_not_run_still_render() -> None:
    settings = [CONFIG.slice("row", TABLE, row) for row in CONFIG.slice("render", TABLE)["rows"]]
    rows = [build_row(one, {}.get) for one in settings]
    assert {row["status"] for row in rows} == {"not run"}
    text = render_markdown(CONFIG.slice("render", TABLE), rows, {})
    assert "not run" in text
    render_html(CONFIG.slice("render", TABLE), rows, {})


def test_several_controls_without_replicates() -> None:
    written = raw()
    table = written["tables"]["digits"]
    table["rows"][3]["against"] = ["digits-continued", "digits-matched"]
    config = resolve(written)
    values = iter(range(1, 100))
    files: dict[str, Any] = {}
    for file in {cell.file for cell in cells(config, "digits")}:
        names = {column["metric"] for column in config.slice("render", "digits")["columns"]}
        files[file] = {"metrics": {name: float(next(values) % 7) for name in names}}
        values = iter(range(int(next(values)), 1000))
    rows = [build_row(config.slice("row", "digits", row.key), files.get) for row in config.tables["digits"].rows]
    text = render_markdown(config.slice("render", "digits"), rows, {})
    assert "| MixFlow 0.8<br>(against continued) |" in text
    assert "| MixFlow 0.8<br>(against matched 0.8) |" in text
    table["rows"][3]["against"] = ["digits-continued", "digits-matchd"]
    with pytest.raises(UserError, match="'digits-matchd' is not a row of this table"):
        resolve(written)
