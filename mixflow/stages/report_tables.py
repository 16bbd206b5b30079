"""A table of the report: what its rows say, each number with its records, and how rows stand beside their controls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from mixflow import report as pages
from mixflow.runtime import paths
from mixflow.stages.report_records import Records, picture
from mixflow.tables import METRICS, Row, compare
from mixflow.tables.differences import Comparison, Difference
from mixflow.tables.metrics import paper_text
from mixflow.tables.statistics import LEVEL, NOISE
from mixflow.tables.words import (
    CAPTIONS,
    beside_text,
    best_text,
    difference_rows,
    errors_note,
    find_warnings,
    head_text,
    legend,
    paired_legend,
    paired_note,
    paired_rows,
    sections,
    shown_text,
    spread_text,
)

NOTES = "How to read this"  # the section that stands above the others
VERDICTS: dict[pages.Outcome, str] = {
    "better": "Better",
    "worse": "Worse",
    "moved": "Changed",
    "open": "Not decided",
    "none": "Not run yet",
}


class Beside(NamedTuple):
    """A row beside a control, before it is laid out."""

    row: Row
    control: Row | None  # None: the numbers of the paper
    label: str  # "against ..."
    gaps: list[pages.Gap]


class Builder:
    """A table of the page, from its slice `render` and its rows in order."""

    def __init__(self, render: dict[str, Any], rows: list[Row], records: Records) -> None:
        self.render, self.rows, self.records = render, rows, records
        self.name = render["table"]
        self.by_name = {row["row"]: row for row in rows}
        self.singles = compare(rows)
        self.replicated = any("replicates" in row for row in rows)
        self.scales = [self._scale(index) for index in range(len(render["columns"]))]
        self.beside = [*self._paired(), *self._single()]

    def table(self, command: str) -> pages.Table:
        """Return all that is said of it."""
        state, words = self._state()
        found = sections(self.render, self.rows)
        return pages.Table(
            key=f"table-{self.name}",
            title=self.render["title"],
            state=state,
            state_words=words,
            command=command,
            heads=[self._head(column) for column in self.render["columns"]],
            lines=[self._line(row) for row in self.rows],
            remark=errors_note(self.rows) or "",
            comparisons=[
                pages.Comparison(
                    self._anchor(beside), beside.row["label"], beside.label, beside.gaps, not beside.control
                )
                for beside in self.beside
            ],
            before=paired_note(self.rows) if self.replicated and state != "not run" else "",
            legend=self._legend(),
            warnings=find_warnings(self.render, self.rows),
            notes=[text for title, items in found if title == NOTES for _, text in items],
            paper=any(cell["paper"] is not None for row in self.rows for cell in row["cells"]),
            figures=[self._figure(name) for name in self.render["figures"]] if state != "not run" else [],
            sections=[(title, items) for title, items in found if title != NOTES],
        )

    def _state(self) -> tuple[Literal["measured", "in part", "not run", "quoted"], str]:
        cells = [cell for row in self.rows if row["status"] != "quoted" for cell in row["cells"]]
        known = sum(cell["value"] is not None for cell in cells)
        if not cells:
            return "quoted", "quoted from the paper"
        if known == len(cells):
            return "measured", "measured"
        return ("in part", f"{known} of {len(cells)} numbers measured") if known else ("not run", "not run yet")

    def _head(self, column: dict[str, Any]) -> pages.Head:
        metric = METRICS[column["metric"]]
        name = head_text(column).replace(" ", "\N{NO-BREAK SPACE}")
        return pages.Head(column["label"], name, f"{metric.long_name}: {metric.definition}", metric.better)

    # --- numbers

    def _line(self, row: Row) -> pages.Line:
        best = [best_text(self.rows, index, column["metric"]) for index, column in enumerate(self.render["columns"])]
        note = "" if row["status"] == "measured" else row["status"]
        return pages.Line(row["label"], note, [self._number(row, index, text) for index, text in enumerate(best)])

    def _column_name(self, index: int) -> str:
        column = self.render["columns"][index]
        return ", ".join(part for part in (column["label"], METRICS[column["metric"]].name) if part)

    def _number(self, row: Row, index: int, best: str | None) -> pages.Number:
        cell = row["cells"][index]
        text = shown_text(cell, row)
        return pages.Number(
            text=text,
            under=[spread_text(cell).strip(), *beside_text(cell, row).split(", ", 1)],
            name=f"{row['label']}: {self._column_name(index)}",
            best=text == best,
            faint=row["status"] == "quoted",
            facts=_facts(cell),
            sources=self._records_of(cell),
        )

    def _records_of(self, cell: Row) -> tuple[str, ...]:
        files = [one["file"] for one in cell.get("replicates", ())] or [cell.get("file")]
        return tuple(dict.fromkeys(key for file in files for key in self.records.chain(file)))

    # --- beside controls

    def _paired(self) -> list[Beside]:
        """Return the comparisons of replicated rows, in the order of `paired_rows`."""
        found = [
            (row, self.by_name.get(pair["row"]), number)
            for row in self.rows
            for number, pair in enumerate(row["cells"][0].get("paired", ()))
        ]
        return [
            Beside(row, control, label, [
                self._paired_gap(row, control, label, index, row["cells"][index]["paired"][number], cell)
                for index, cell in enumerate(cells)
            ])
            for (row, control, number), (_, label, cells) in zip(found, paired_rows(self.rows), strict=True)
            if any(row["cells"][index]["paired"][number]["mean"] is not None for index in range(len(cells)))
        ]  # fmt: skip

    def _paired_gap(self, row: Row, control: Row | None, label: str, index: int, pair: Row, words: Any) -> pages.Gap:
        outcomes: dict[str, pages.Outcome] = {
            "better": "better", "worse": "worse", "lower": "moved", "higher": "moved", "not run": "none"
        }  # fmt: skip
        known = {key: pair[key] for key in ("mean", "standard_deviation", "detectable", "p_value", "sampling_error")}
        facts = [("in words", pair["sentence"])]
        facts += [(f"{100 * LEVEL:.0f}% interval", f"{pair['interval'][0]:.4g} to {pair['interval'][1]:.4g}")] * bool(
            pair["interval"]
        )
        facts += [(_TERMS[key], f"{value:.4g}") for key, value in known.items() if value is not None]
        facts += [("by replicate", ", ".join(f"{value:+.4g}" for value in pair["differences"] or ()))]
        return pages.Gap(
            text=words.number,
            under=[words.interval, words.able],
            outcome=outcomes.get(pair["verdict"], "open"),
            words=words.verdict,
            bar=None if pair["mean"] is None else self._bar(pair["mean"], pair["interval"], index),
            name=f"{row['label']} {label}: {self._column_name(index)}",
            facts=[(term, text) for term, text in facts if text],
            sources=() if pair["mean"] is None else self._behind(row, control, index),
            sentence=pair["sentence"],
        )

    def _single(self) -> list[Beside]:
        """Return the comparisons of single runs, and those with the paper."""
        return [
            Beside(
                row := self.by_name[comparison.row],
                control := self.by_name.get(comparison.control_row or ""),
                label,
                [self._single_gap(row, control, comparison, label, index, words) for index, words in enumerate(cells)],
            )
            for comparison, (_, label, cells) in zip(
                self.singles, difference_rows(self.render, self.singles), strict=True
            )
        ]

    def _single_gap(
        self, row: Row, control: Row | None, comparison: Comparison, label: str, index: int, words: Any
    ) -> pages.Gap:
        found, cell = comparison.differences[index], row["cells"][index]
        number, error, verdict, _ = words
        name = f"{row['label']} {label}: {self._column_name(index)}"
        if found is None:
            return pages.Gap(number, [], "none", name=name)
        theirs = (
            paper_text(cell["paper"], cell["metric"])
            if control is None
            else shown_text(control["cells"][index], control)
        )
        sentence = (
            f"{METRICS[cell['metric']].long_name}, {self.render['columns'][index]['label']}: {row['label']} has "
            f"{shown_text(cell, row)}, {comparison.control} {theirs}, a difference of {number}{error}: {verdict}."
        )
        return pages.Gap(
            text=number,
            under=[error.strip()],
            outcome=_outcome(found, cell["metric"], control),
            words=verdict,
            bar=self._bar(found.value, _ends(found), index),
            name=name,
            facts=[("in words", sentence), ("difference", f"{found.value:+.6g}")],
            sources=self._behind(row, control, index),
            sentence=sentence,
        )

    def _anchor(self, beside: Beside) -> str:
        return f"gap-{self.name}-{beside.row['row']}-{'paper' if beside.control is None else beside.control['row']}"

    def _behind(self, row: Row, control: Row | None, index: int) -> tuple[str, ...]:
        """Return the records behind both sides of a difference."""
        sides = [row] if control is None else [row, control]
        return tuple(dict.fromkeys(key for side in sides for key in self._records_of(side["cells"][index])))

    def _scale(self, index: int) -> float:
        """Return the largest end of the intervals of a column, all of which share it; 1 where there are none."""
        pairs = [pair for row in self.rows for pair in row["cells"][index].get("paired", ())]
        ends = [end for pair in pairs for end in (pair["mean"], *(pair["interval"] or ())) if end is not None]
        ends += [end for found in self.singles if (gap := found.differences[index]) for end in _ends(gap)]
        return max(map(abs, ends), default=0.0) or 1.0

    def _bar(self, value: float, interval: Sequence[float] | None, index: int) -> pages.Bar:
        low, high = interval or (value, value)
        return pages.Bar(*(50 + 46 * end / self.scales[index] for end in (low, value, high)))

    def _legend(self) -> list[tuple[str, str]]:
        if not self.beside:
            return []
        reach = f"the {100 * LEVEL:.0f}% interval" if self.replicated else f"{NOISE} standard errors to both sides"
        line = ("the line", f"the difference and {reach}; every column has a scale of its own")
        return [line, *(paired_legend(self.rows) if self.replicated else ()), *legend(self.render, self.singles)]

    # --- questions

    def answer(self, asked: dict[str, Any]) -> pages.Answer:
        """Return what the comparison of a row with its control says to a question of the config."""
        row = self.by_name[asked["row"]]
        index = next(
            index
            for index, column in enumerate(self.render["columns"])
            if (column.get("sampler"), column["metric"]) == (asked["sampler"], asked["metric"])
        )
        wanted = (asked["row"], asked.get("against"))
        beside = next(
            (one for one in self.beside if one.control and wanted in (_names(one), (one.row["row"], None))), None
        )
        if beside is None or beside.gaps[index].outcome == "none":
            paper = row["cells"][index]["paper"]
            said = [] if paper is None else [f"The paper has {paper_text(paper, asked['metric'])} there."]
            return pages.Answer(asked["asks"], "none", VERDICTS["none"], said, "not-run")
        gap, outcomes = beside.gaps[index], [gap.outcome for gap in beside.gaps]
        sentences = [gap.sentence]
        if self.replicated and gap.outcome in ("better", "worse", "changed"):
            stands = "still stands" if "(Holm)" in gap.words else "does not stand"
            sentences.append(f"Corrected for all comparisons of its table (Holm) it {stands}.")
        if len(outcomes) > 1:
            sentences.append(f"Over the {len(outcomes)} columns of its table: {counted(outcomes)}.")
        return pages.Answer(asked["asks"], gap.outcome, VERDICTS[gap.outcome], sentences, self._anchor(beside))

    def _figure(self, name: str) -> pages.Figure:
        labels = ", ".join(row["label"] for row in self.rows if row["status"] != "quoted")
        return picture(
            paths.figure(self.name, name), f"{CAPTIONS[name]}.", f"{CAPTIONS[name]}: {labels}", self.records.root
        )


_TERMS = {
    "mean": "mean difference",
    "standard_deviation": "standard deviation",
    "detectable": "could be seen from",
    "p_value": "p",
    "sampling_error": "sampling error",
}


def _facts(cell: Row) -> list[tuple[str, str]]:
    """Return what a cell has no room for."""
    texts = {
        "value": "value",
        "standard_deviation": "standard deviation",
        "standard_error": "sampling error",
        "paper": "the paper",
    }
    facts = [(term, f"{cell[key]:.6g}") for key, term in texts.items() if cell.get(key) is not None]
    if cell.get("interval"):
        facts.append((f"{100 * LEVEL:.0f}% interval", f"{cell['interval'][0]:.6g} to {cell['interval'][1]:.6g}"))
    for number, one in enumerate(cell.get("replicates", ()), 1):
        training = "" if one["training"] is None else f"training seed {one['training']}, "
        value = "not run" if one["value"] is None else f"{one['value']:.6g}"
        facts.append((f"replicate {number}", f"{value} ({training}sampling seed {one['sampling']})"))
    return facts


def _names(beside: Beside) -> tuple[str, str | None]:
    return beside.row["row"], None if beside.control is None else beside.control["row"]


def _ends(difference: Difference) -> tuple[float, float]:
    reach = NOISE * (difference.standard_error or 0.0)
    return difference.value - reach, difference.value + reach


def _outcome(found: Difference, metric: str, control: Row | None) -> pages.Outcome:
    """Return how a difference came out: better or worse where the metric has a good end, and the control is ours."""
    if found.verdict not in ("beyond", "in this run", "beyond noise"):
        return "open"
    better = METRICS[metric].better
    if better is None or control is None:
        return "moved"
    return "better" if (found.value < 0) == (better == "lower") else "worse"


def counted(outcomes: Iterable[pages.Outcome]) -> str:
    """Return "better in 3, not decided in 8"."""
    words: dict[pages.Outcome, str] = {
        "better": "better in",
        "worse": "worse in",
        "moved": "changed in",
        "open": "not decided in",
        "none": "not run in",
    }
    found = list(outcomes)
    return ", ".join(f"{text} {found.count(kind)}" for kind, text in words.items() if kind in found)
