"""The report page: what it holds, and the one HTML file made of it. No torch, no files of results.

`page` says what the page is made of, as text and keys; page.html.j2, style.css and script.js, package data beside it,
are all of its markup.
"""

from mixflow.report.page import (
    Answer,
    Bar,
    Comparison,
    Cost,
    Figure,
    Gap,
    Head,
    Line,
    Number,
    Outcome,
    Page,
    SlowFlow,
    Source,
    Table,
    Tally,
    render,
)

__all__ = [
    "Answer",
    "Bar",
    "Comparison",
    "Cost",
    "Figure",
    "Gap",
    "Head",
    "Line",
    "Number",
    "Outcome",
    "Page",
    "SlowFlow",
    "Source",
    "Table",
    "Tally",
    "render",
]
