"""What the report page holds, all of it text that is escaped here and nowhere else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

Terms = Sequence[tuple[str, str]]  # (term, sentence); no term: a sentence by itself
Outcome = Literal["better", "worse", "moved", "open", "none"]  # moved: clearly, where neither end is good


@dataclass(frozen=True)
class Source:
    """A run record: what made a result, under which settings, from what."""

    key: str  # its anchor
    title: str
    brief: str  # shown while the mouse rests on a number
    facts: Terms
    parents: Sequence[tuple[str, str, str, str | None]]  # role, file, SHA-256 (short), key of its own record
    command: str | None  # makes it again


@dataclass(frozen=True)
class Number:
    """A cell of a table: the number, what stands under it, and where it comes from."""

    text: str
    under: Sequence[str] = ()
    name: str = ""  # row, sampler and metric
    best: bool = False
    faint: bool = False
    facts: Terms = ()  # that the cell has no room for
    sources: Sequence[str] = ()  # keys, the nearest first; none: it was not made here


@dataclass(frozen=True)
class Bar:
    """An interval as a line: positions in percent of the cell's width; no difference is at 50."""

    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Gap:
    """A difference to a control, in one column."""

    text: str
    under: Sequence[str]
    outcome: Outcome
    words: str = ""
    bar: Bar | None = None
    name: str = ""
    facts: Terms = ()
    sources: Sequence[str] = ()
    sentence: str = ""


@dataclass(frozen=True)
class Head:
    """A column: the sampler, the metric with its arrow, and the metric in full."""

    label: str
    metric: str
    meaning: str
    better: str | None  # lower or higher


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    label: str
    note: str
    numbers: Sequence[Number]
    key: str = ""


@dataclass(frozen=True)
class Comparison:
    """A row beside its control."""

    key: str  # its anchor
    label: str
    control: str
    gaps: Sequence[Gap]
    paper: bool = False  # the control is a number of the paper


@dataclass(frozen=True)
class Figure:
    """A picture: PNG bytes with their size in pixels, or none where it is not drawn yet."""

    caption: str
    alt: str
    file: str
    png: bytes | None = None
    width: int = 0
    height: int = 0
    sources: Sequence[str] = ()

    @property
    def data(self) -> str:
        """Return the address that holds the picture itself."""
        assert self.png is not None
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Table:
    """A table with all that is said of it."""

    key: str
    title: str
    state: Literal["measured", "in part", "not run", "quoted"]
    state_words: str
    command: str
    heads: Sequence[Head]
    lines: Sequence[Line]
    remark: str  # what the ± is
    comparisons: Sequence[Comparison]
    before: str  # what is to be known before the differences are read
    legend: Terms
    warnings: Terms
    notes: Sequence[str]
    paper: bool  # whether it has numbers of the paper's
    figures: Sequence[Figure]
    sections: Sequence[tuple[str, Terms]]

    @property
    def controlled(self) -> list[Comparison]:
        """Return the comparisons with controls that were measured here."""
        return [comparison for comparison in self.comparisons if not comparison.paper]


@dataclass(frozen=True)
class SlowFlow:
    """A figure of Slow Flow, and its last points as numbers."""

    key: str
    title: str
    figure: Figure
    heads: Sequence[Head]
    lines: Sequence[Line]
    command: str


@dataclass(frozen=True)
class Answer:
    """A question, and what the numbers say to it."""

    asks: str
    outcome: Outcome
    words: str
    sentences: Sequence[str]
    link: str  # key of the comparison


@dataclass(frozen=True)
class Tally:
    """How many comparisons came out how, in words."""

    sentence: str
    by_chance: str


@dataclass(frozen=True)
class Cost:
    """What a table still takes."""

    title: str
    key: str
    jobs: str
    gpu_hours: str
    time: str
    command: str


@dataclass(frozen=True)
class Page:
    """The whole page."""

    title: str
    rehearsal: str  # what is said of a rehearsal, else ""
    question: Sequence[str]
    answers: Sequence[Answer]
    tally: Tally | None
    tables: Sequence[Table]
    slow_flow: Sequence[SlowFlow]
    costs: Sequence[Cost]
    cost_notes: Sequence[str]
    environment: Terms
    sources: Sequence[Source]
    made: str  # date and time
    commit: str


GLYPHS: dict[Outcome, str] = {"better": "▲", "worse": "▼", "moved": "◆", "open": "○", "none": "·"}
OUTCOMES: dict[Outcome, str] = {
    "better": "better than its control",
    "worse": "worse than its control",
    "moved": "changed, where neither end is good",
    "open": "not decided",
    "none": "not run",
}


def render(page: Page) -> str:
    """Return the page as one HTML file that asks the network for nothing: its own policy forbids it.

    Text is escaped by the template; script and style run by their hashes alone.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_minified((folder / name).read_text("utf-8")) for name in ("style.css", "script.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = environment.get_template("page.html.j2")
    text = template.render(page=page, style=style, script=script, policy=policy, glyphs=GLYPHS, outcomes=OUTCOMES)
    return "\n".join(line for line in text.splitlines() if line.strip()) + "\n"


def _minified(text: str) -> str:
    """Return a file's lines without their indents and the empty ones among them."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
