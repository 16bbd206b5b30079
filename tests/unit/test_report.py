"""The report page: what it says of results, and that it is one whole, harmless file."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixflow.cli import main
from mixflow.config import load_config
from mixflow.report import Page, render
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import read_json, write_json
from mixflow.stages.report import collect, make_report
from tests.conftest import ROOT
from tests.made_up import COMMIT, make_metrics, make_table

SEEDS = {
    "title": "Three seeds",
    "paper": False,
    "replicates": {"training": [1, 2, 3], "sampling": [100, 101, 102]},
    "columns": [{"sampler": "euler5", "metric": "fd"}, {"sampler": "euler50", "metric": "accuracy"}],
    "rows": [
        {"checkpoint": "digits-base", "label": "base"},
        {"checkpoint": "digits-continued", "label": "continued"},
        {"checkpoint": "digits-mixflow-g0.8", "label": "MixFlow", "against": ["digits-continued", "digits-base"]},
    ],
}
ASKED = {"asks": "Better?", "table": "seeds", "row": "digits-mixflow-g0.8", "sampler": "euler5", "metric": "fd"}


def config_with(folder: Path, **report: Any) -> Any:
    """The project's config with a table over seeds, and another report."""
    said = {"made": ["digits"], "shown": ["main"], "answers": [], "slow_flow": [], **report}
    (folder / "more.yaml").write_text(yaml.safe_dump({"tables": {"seeds": SEEDS}, "report": said}))
    return load_config(ROOT / "config.yaml", folder / "more.yaml")


def set_metric(root: Path, checkpoint: str, sampler: str, **values: float) -> None:
    file = root / paths.metrics(checkpoint, sampler)
    found = read_json(file)
    write_json(file, found | {"metrics": found["metrics"] | values})


class Reader(html.parser.HTMLParser):
    """Reads a page strictly: every element closed in its place, every id there once."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), tag
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def numbers(self) -> list[dict[str, Any]]:
        """The numbers that can be asked where they come from."""
        return [
            {**told, "facts": dict(json.loads(told["data-facts"] or ""))}
            for told in self.all("a")
            if told.get("class") == "number"
        ]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Reader]:
    """A page of digits, measured, a table over seeds, and one of the paper's in part."""
    root = tmp_path_factory.mktemp("results")
    config = config_with(root, made=["seeds", "digits"], answers=[ASKED], slow_flow=["digits_slow_flow"])
    make_table(config, root, "digits")
    make_table(config, root, "seeds")
    make_table(config, root, "main", ["sit-xl2-256", "sit-xl2-256-mixflow"])
    page = collect(config, ["config.yaml", "more.yaml"], root)
    return page, Reader(render(page))


def test_the_page_is_whole(shown: tuple[Page, Reader]) -> None:
    _, reader = shown
    ids = [told["id"] for _, told in reader.elements if "id" in told]
    assert len(ids) == len(set(ids))
    targets = {str(told["href"])[1:] for told in reader.all("a") if str(told["href"]).startswith("#")}
    assert targets <= set(ids)
    levels = [int(tag[1]) for tag, _ in reader.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    for image in reader.all("img"):
        assert image["alt"]
        assert int(image["width"] or 0) > 0
        assert int(image["height"] or 0) > 0


def test_nothing_is_asked_of_the_network_and_only_its_own_script_runs(shown: tuple[Page, Reader]) -> None:
    _, reader = shown
    addresses = [str(told[key]) for _, told in reader.elements for key in ("src", "href", "srcset") if key in told]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not [told for _, told in reader.elements if "style" in told or any(key.startswith("on") for key in told)]
    policy = next(told["content"] for told in reader.all("meta") if "http-equiv" in told) or ""
    for tag in ("script", "style"):
        assert len(reader.all(tag)) == 1
        found = hashlib.sha256("".join(reader.texts[tag]).encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(found).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "url(" not in "".join(reader.texts["style"])


def test_every_number_says_where_it_comes_from(shown: tuple[Page, Reader]) -> None:
    page, reader = shown
    numbers = reader.numbers()
    records = {source.key: source for source in page.sources}
    assert {key for number in numbers for key in number["data-sources"].split()} <= set(records)
    table = next(table for table in page.tables if table.key == "table-digits")
    line = next(line for line in table.lines if line.label == "MixFlow 0.8")
    metrics, samples, weights, base = (records[key] for key in line.numbers[2].sources)
    assert (metrics.title, samples.title) == (
        "Metrics of digits-mixflow-g0.8 / euler50", "Samples of digits-mixflow-g0.8 / euler50"
    )  # fmt: skip
    assert (weights.title, base.title) == ("Training of digits-mixflow-g0.8", "Training of digits-base")
    facts = dict(weights.facts)
    assert (facts["seed"], facts["commit"]) == ("1", COMMIT[:8])
    assert "law mixflow, gamma 0.8" in facts["settings"]
    assert facts["made"] == "20 November 2026, 09:30 UTC"
    file = paths.weights("digits-mixflow-g0.8")
    assert weights.command == f"snakemake {file} --cores all --configfile more.yaml --forcerun {file}"
    assert samples.parents[0][:2] == ("weights", file)
    assert samples.parents[0][3] == weights.key
    value = read_value(numbers, "MixFlow 0.8: Euler 50, FD")
    assert float(value) == pytest.approx(float(line.numbers[2].text), abs=0.01)


def read_value(numbers: list[dict[str, Any]], name: str) -> str:
    return next(number["facts"]["value"] for number in numbers if number["data-name"] == name)


def test_replicates_are_told_one_by_one(shown: tuple[Page, Reader]) -> None:
    page, _ = shown
    table = next(table for table in page.tables if table.key == "table-seeds")
    number = next(line for line in table.lines if line.label == "MixFlow").numbers[0]
    facts = dict(number.facts)
    assert [key for key in facts if key.startswith("replicate")] == ["replicate 1", "replicate 2", "replicate 3"]
    assert facts["replicate 2"].endswith("(training seed 2, sampling seed 101)")
    titles = [source.title for source in page.sources if source.key in number.sources]
    assert [title for title in titles if title.startswith("Metrics")] == [
        "Metrics of digits-mixflow-g0.8 / euler5",
        "Metrics of digits-mixflow-g0.8-seed2 / euler5-seed101",
        "Metrics of digits-mixflow-g0.8-seed3 / euler5-seed102",
    ]
    assert [(one.label, one.control) for one in table.comparisons] == [
        ("MixFlow", "against continued"), ("MixFlow", "against base")
    ]  # fmt: skip
    assert "paired replicates" in table.before


@pytest.mark.parametrize(
    ("mixflow", "outcome", "words", "corrected"),
    [
        ((0.5, 0.501, 0.499), "better", "Better", ["still stands"]),
        ((0.75, 0.7, 0.6), "better", "Better", ["does not stand"]),
        ((3.0, 3.1, 2.9), "worse", "Worse", ["still stands"]),
        ((1.0, 3.0, 0.1), "open", "Not decided", []),
    ],
)
def test_answers_follow_from_the_numbers(
    tmp_path: Path, mixflow: tuple[float, ...], outcome: str, words: str, corrected: list[str]
) -> None:
    config = config_with(tmp_path, made=["seeds"], answers=[ASKED, {**ASKED, "against": "digits-base"}])
    make_table(config, tmp_path, "seeds")
    for number, value in enumerate(mixflow):
        sampler = "euler5" if number == 0 else f"euler5-seed{100 + number}"
        for name in ("digits-continued", "digits-mixflow-g0.8"):
            checkpoint = name if number == 0 else f"{name}-seed{1 + number}"
            set_metric(tmp_path, checkpoint, sampler, fd=value if "mixflow" in name else 1.0)
    page = collect(config, ["config.yaml"], tmp_path)
    answer, other = page.answers
    assert (answer.outcome, answer.words) == (outcome, words)
    gap = page.tables[0].comparisons[0].gaps[0]
    assert answer.sentences[0] == gap.sentence
    assert "continued" in answer.sentences[0]
    wanted = [f"Corrected for all comparisons of its table (Holm) it {words}." for words in corrected]
    assert [sentence for sentence in answer.sentences if "Holm" in sentence] == wanted
    assert "base" in other.sentences[0]
    assert answer.link == "gap-seeds-digits-mixflow-g0.8-digits-continued"
    assert gap.bar is not None
    assert gap.bar.low < gap.bar.value < gap.bar.high
    assert (gap.bar.value < 50) == (sum(mixflow) < 3)


@pytest.mark.parametrize(
    ("metric", "sampler", "ours", "theirs", "outcome"),
    [
        ("fd", "euler50", 1.0, 2.0, "better"),
        ("fd", "euler50", 2.0, 1.0, "worse"),
        ("fd", "euler50", 1.0, 1.001, "open"),
        ("accuracy", "euler50", 0.9, 0.5, "better"),
        ("accuracy", "euler50", 0.5, 0.9, "worse"),
        ("variance_ratio", "euler50", 0.7, 0.9, "moved"),
    ],
)
def test_single_runs_are_told_apart_by_the_metric_s_good_end(
    tmp_path: Path, metric: str, sampler: str, ours: float, theirs: float, outcome: str
) -> None:
    asked = {**ASKED, "table": "digits", "sampler": sampler, "metric": metric}
    config = config_with(tmp_path, answers=[asked])
    make_table(config, tmp_path, "digits")
    set_metric(tmp_path, "digits-mixflow-g0.8", sampler, **{metric: ours})
    set_metric(tmp_path, "digits-continued", sampler, **{metric: theirs})
    assert collect(config, ["config.yaml"], tmp_path).answers[0].outcome == outcome


def test_a_difference_to_the_paper_is_neither_better_nor_worse(shown: tuple[Page, Reader]) -> None:
    page, _ = shown
    main_table = next(table for table in page.tables if table.key == "table-main")
    to_paper = [one for one in main_table.comparisons if one.paper]
    assert {gap.outcome for one in to_paper for gap in one.gaps} <= {"moved", "open", "none"}
    assert not any(one.paper for one in main_table.controlled)


def test_nothing_is_run_yet(tmp_path: Path) -> None:
    asked = {"asks": "Does it?", "table": "main", "row": "sit-xl2-256-mixflow", "sampler": "heun250", "metric": "fid"}
    config = config_with(tmp_path, answers=[asked], slow_flow=["figure1"])
    page = collect(config, ["config.yaml"], tmp_path)
    text = render(page)
    Reader(text)
    answer = page.answers[0]
    assert (answer.outcome, answer.sentences, answer.link) == ("none", ["The paper has 7.87 there."], "not-run")
    assert {table.state for table in page.tables} == {"not run"}
    assert page.tally is None
    assert page.sources == []
    costs = {cost.key: cost for cost in page.costs}
    assert float(costs["table-main"].gpu_hours.replace(",", "")) > 100
    assert costs["table-digits"].gpu_hours == "none"
    assert costs["table-main"].command == "python -m mixflow plan main"
    assert "Nothing is measured yet" in text
    assert not (tmp_path / "results").exists()  # reading starts nothing


def test_labels_cannot_break_out(tmp_path: Path) -> None:
    evil = '</style></script><script>alert(1)</script><img src=x onerror=alert(2)> " onmouseover="x" \' {{ 7*7 }}'
    other = {"checkpoint": "digits-continued", "label": "c", "against": "digits-base"}
    rows = [{"checkpoint": "digits-base", "label": evil}, other]
    table = {**SEEDS, "title": evil, "rows": rows, "notes": [evil]}
    del table["replicates"]
    asked = {**ASKED, "asks": evil, "row": "digits-continued"}
    said = {"title": evil, "question": [evil], "made": ["seeds"], "shown": [], "answers": [asked], "slow_flow": []}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"tables": {"seeds": table}, "report": said}))
    config = load_config(ROOT / "config.yaml", tmp_path / "more.yaml")
    make_table(config, tmp_path, "seeds")
    text = render(collect(config, ["config.yaml"], tmp_path))
    reader = Reader(text)
    assert len(reader.all("script")) == 1
    assert not reader.all("img")
    assert not [told for _, told in reader.elements if "onmouseover" in told or "onerror" in told]
    assert "49" not in "".join(reader.texts["h1"])
    assert "".join(reader.texts["h1"]) == evil
    assert any(number["data-name"].startswith(f"{evil}: ") for number in reader.numbers())


def test_five_hundred_cells_stay_light(tmp_path: Path) -> None:
    rows = [{"checkpoint": "digits-base", "label": f"row {n}", "name": f"row{n}"} for n in range(46)]
    rows[1:] = [{**row, "against": "row0"} for row in rows[1:]]
    columns = [column.dump() for column in load_config(ROOT / "config.yaml").tables["digits"].columns]
    table = {"title": "Many", "paper": False, "columns": columns, "rows": rows}
    said = {"made": ["many"], "shown": [], "answers": [], "slow_flow": []}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"tables": {"many": table}, "report": said}))
    config = load_config(ROOT / "config.yaml", tmp_path / "more.yaml")
    make_table(config, tmp_path, "many")
    make_report(config, ["config.yaml"], tmp_path / "index.html", root=tmp_path)
    text = (tmp_path / "index.html").read_text("utf-8")
    assert len(Reader(text).numbers()) >= 500 + 45 * 11
    assert len(text) < 1_500_000


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        ({"made": ["digit"]}, "report.made.0: 'digit' is not one of the tables; did you mean 'digits'?"),
        ({"made": ["digits"], "shown": ["digits"]}, "'digits' stands in made and shown 2 times"),
        ({"answers": [{**ASKED, "table": "table8"}]}, "report.answers.0.table: 'table8' is not on the page"),
        ({"shown": ["seeds"], "answers": [{**ASKED, "row": "digits-base"}]}, "'digits-base' has no control"),
        ({"shown": ["seeds"], "answers": [{**ASKED, "metric": "is"}]}, "has no column of is under 'euler5'"),
        ({"shown": ["seeds"], "answers": [{**ASKED, "against": "x"}]}, "'x' is no control of 'digits-mixflow-g0.8'"),
        ({"slow_flow": ["figure2"]}, "report.slow_flow.0: 'figure2' is not one of the figures"),
    ],
)
def test_what_a_report_cannot_be(tmp_path: Path, report: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        config_with(tmp_path, **report)
    assert sentence in str(raised.value)


def test_the_command_refuses_another_config_than_snakemake_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        main(["report", "--config", str(ROOT / "config.yaml"), "--key", "0123456789abcdef"])
    assert raised.value.code == 2
    assert "the config files say another report" in capsys.readouterr().err
    assert not (tmp_path / paths.report()).exists()


def test_a_figure_that_is_no_picture(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    make_table(config, tmp_path, "digits")
    (tmp_path / paths.figure("digits", "steps")).write_bytes(b"no picture")
    with pytest.raises(UserError, match="is no PNG file"):
        collect(config, ["config.yaml"], tmp_path)


def test_half_of_the_replicates_are_not_run_yet(tmp_path: Path) -> None:
    config = config_with(tmp_path, made=["seeds"], answers=[ASKED])
    make_metrics(config, tmp_path, "digits-mixflow-g0.8", "euler5")
    make_metrics(config, tmp_path, "digits-continued", "euler5")
    page = collect(config, ["config.yaml"], tmp_path)
    assert page.answers[0].outcome == "none"
    Reader(render(page))
