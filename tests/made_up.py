"""Results that nothing computed: records and metrics as the stages write them, with numbers that a hash gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mixflow.config import Config
from mixflow.runtime import paths
from mixflow.runtime.files import write_json
from mixflow.tables import METRICS, cells

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# A plausible value of each metric, about which the made-up ones lie.
CENTRES = {
    "fd": 1.5, "fd_held_out": 1.8, "accuracy": 0.85, "variance_ratio": 0.9, "nearest_train": 4.2,
    "nearest_held_out": 4.4, "fid": 9.0, "sfid": 6.0, "is": 140.0, "precision": 0.69, "recall": 0.66,
    "precision_exact": 0.685, "recall_exact": 0.655, "kid": 0.004, "density": 1.02, "coverage": 0.82,
    "fd_dinov2": 150.0,
}  # fmt: skip


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fraction(*names: str) -> float:
    """A number in [0, 1) that stands for these names."""
    return int(sha256("/".join(names))[:8], 16) / 2**32


def record(root: Path, file: str, stage: str, settings: dict[str, Any], parents: dict[str, str]) -> None:
    """Write the run.json beside a result."""
    write_json(
        root / paths.record(file),
        {
            "stage": stage,
            "settings": settings,
            "parents": {role: {"file": parent, "sha256": sha256(parent)} for role, parent in parents.items()},
            "outputs": {Path(file).name: sha256(file)},
            "measured": {"wall_seconds": 20.0},
            "started": "2026-11-20T09:30:00+00:00",
            "command": ["mixflow", stage],
            "code": {
                "commit": COMMIT,
                "dirty": False,
                "image": None,
                "python": "3.11.7",
                "packages": {"torch": "2.11.0"},
            },
            "machine": {"host": "somewhere", "devices": ["cpu"]},
        },
    )


def make_table(config: Config, root: Path, table: str, rows: Iterable[str] | None = None) -> None:
    """Write the metrics of a table's rows (default: all) with the records behind them, and its figures."""
    for checkpoint, sampler, file in dict.fromkeys(
        (cell.checkpoint, cell.sampler, cell.file) for cell in cells(config, table) if rows is None or cell.row in rows
    ):
        make_metrics(config, root, checkpoint, sampler, *Path(file).parts[4:-1])
    for figure in config.tables[table].figures:
        draw(root / paths.figure(table, figure), figure)


def make_metrics(config: Config, root: Path, checkpoint: str, sampler: str, reference: str | None = None) -> None:
    """Write one metrics.json, with the records of samples and weights."""
    name = reference or config.reference_of(checkpoint)
    file, samples, weights = (
        paths.metrics(checkpoint, sampler, reference), paths.samples(checkpoint, sampler), paths.weights(checkpoint)
    )  # fmt: skip
    values, errors = {}, {}
    for metric in config.references_of(checkpoint)[name]:
        away = fraction(checkpoint, metric) - 0.5 + 0.1 * (fraction(checkpoint, sampler, metric) - 0.5)
        values[metric] = CENTRES[metric] * (1 + (0.3 if METRICS[metric].better == "lower" else 0.06) * away)
        errors[metric] = CENTRES[metric] * 0.012
    write_json(
        root / file,
        {
            "metrics": values, "standard_errors": errors, "num_images": config.samplers[sampler].num_images,
            "labels": config.samplers[sampler].labels, "warnings": [],
            "parents": {"samples": sha256(samples), "reference": sha256(paths.reference(name))},
        },
    )  # fmt: skip
    settings = config.slice("evaluate", checkpoint, sampler, *([reference] if reference else []))
    record(root, file, "evaluate", settings, {"samples": samples, "reference": paths.reference(name)})
    record(root, samples, "sample", config.slice("sample", checkpoint, sampler), {"weights": weights})
    trained = config.checkpoints[checkpoint].train is not None
    parent = config.parent(checkpoint)
    stage = "train" if trained else "import_weights"
    parents = {"init": paths.weights(parent)} if parent else {}
    record(root, weights, stage.replace("_", "-"), config.slice(stage, checkpoint), parents)


def draw(out: Path, words: str) -> None:
    """Write a picture."""
    figure = Figure(figsize=(4.6, 3.0))
    axes = figure.subplots()
    axes.plot([5, 10, 50], [3.1, 1.9, 1.2], marker="o")
    axes.set_title(words)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
