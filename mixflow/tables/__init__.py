"""Tables: which files a table is made of, what a row says, and the page that people read. No torch.

A table is columns (sampler and metric) and rows (checkpoints); a cell is (checkpoint, sampler, metric), so that tables
share the sample sets they have in common. Each file imports only from those before it: metrics, files, statistics;
rows, differences, words; markdown, page.
"""

from mixflow.tables.differences import Comparison, Difference, compare, difference
from mixflow.tables.files import Cell, cells, figure_files, figure_paths, metric_files
from mixflow.tables.markdown import render_markdown
from mixflow.tables.metrics import METRICS, Metric
from mixflow.tables.page import render_html
from mixflow.tables.rows import Row, build_row

__all__ = [
    "METRICS",
    "Cell",
    "Comparison",
    "Difference",
    "Metric",
    "Row",
    "build_row",
    "cells",
    "compare",
    "difference",
    "figure_files",
    "figure_paths",
    "metric_files",
    "render_html",
    "render_markdown",
]
