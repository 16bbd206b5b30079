"""What each stage is handed: the part of the config that decides its result, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mixflow.config.checks import check_pair
from mixflow.config.entries import Checkpoint, Column, Pair
from mixflow.config.samplers import Dopri5
from mixflow.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mixflow.config.resolved import Config


def _slice_cache_latents(config: Config, name: str) -> dict[str, Any]:
    entry = config.get("latents", name)
    return {
        "latents": name,
        "dataset": config.dataset_of(name).dump("reference"),
        "autoencoder": config.autoencoder_of(name).dump(),
        "shard_size": entry.shard_size,
    }


def _slice_train(config: Config, name: str) -> dict[str, Any]:
    train = config.get("checkpoints", name).train
    if train is None:
        raise UserError(f"checkpoints.{name} comes from a weights file: import it instead of training it")
    return {
        "checkpoint": name,
        "train": {**train.dump("model"), "model": config.network_options(name)},
        "autoencoder": config.autoencoder_of(train.latents).dump(),
    }


def _slice_import_weights(config: Config, name: str) -> dict[str, Any]:
    weights = config.get("checkpoints", name).weights
    if weights is None:
        raise UserError(f"checkpoints.{name} is trained here: train it instead of importing it")
    model = config.network_options(name)
    return {"checkpoint": name, "weights": {**weights.dump("model", "latents", "interpolant"), "model": model}}


def _slice_sample(config: Config, checkpoint: str, sampler: str) -> dict[str, Any]:
    check_pair(config, Pair(checkpoint, sampler))
    origin = config.checkpoints[checkpoint].origin
    dataset = config.dataset_of(origin.latents)
    interpolant = {} if origin.interpolant is None else {"interpolant": origin.interpolant}
    return {
        "checkpoint": checkpoint,
        "sampler_name": sampler,
        "sampler": config.samplers[sampler].dump(),
        "model": config.network_options(checkpoint),
        "autoencoder": config.autoencoder_of(origin.latents).dump(),
        "num_classes": dataset.num_classes,
        "resolution": dataset.resolution,
        **interpolant,
    }


def _slice_train_extractor(config: Config, name: str) -> dict[str, Any]:
    entry = config.get("extractors", name)
    return {
        "extractor_name": name,
        "extractor": entry.dump(),
        "autoencoder": config.autoencoder_of(entry.latents).dump(),
    }


def _slice_make_reference(config: Config, name: str) -> dict[str, Any]:
    entry = config.get("references", name)
    return {
        "reference_name": name,
        "reference": entry.dump(),
        "autoencoder": config.autoencoder_of(entry.latents).dump(),
        "extractor": config.extractors[entry.extractor].network(),
    }


def _slice_evaluate(config: Config, checkpoint: str, sampler: str) -> dict[str, Any]:
    check_pair(config, Pair(checkpoint, sampler))
    entry = config.samplers[sampler]
    extractor = config.extractor_of(checkpoint)
    calls = {} if entry.call_times is None else {"network_calls_per_image": network_calls(entry)}
    return {
        "checkpoint": checkpoint,
        "sampler_name": sampler,
        "sampler": entry.dump(),
        **calls,
        "reference_name": config.reference_of(checkpoint),
        "extractor_name": extractor,
        "extractor": config.extractors[extractor].network(),
    }


def network_calls(sampler: Any) -> int:
    """Return the forward passes per image; a guided one counts twice, once with the class and once without.

    0 where the solver chooses its own steps.
    """
    if sampler.call_times is None:
        return 0
    return sum(1 + sampler.guidance.acts_at(t) for t in sampler.call_times)


def _slice_row(config: Config, table: str, name: str) -> dict[str, Any]:
    row = config.row(table, name)
    columns = [
        {"metric": column.metric, **_sampler_of(config, column)} if row.checkpoint else {"metric": column.metric}
        for column in config.tables[table].columns
    ]
    made_by = {} if row.checkpoint is None else {"made_by": _made_by(config.checkpoints[row.checkpoint])}
    return {"table": table, "row": name, **row.dump("name"), "columns": columns, **made_by}


def _sampler_of(config: Config, column: Column) -> dict[str, Any]:
    assert column.sampler is not None
    sampler = config.samplers[column.sampler]
    steps = {} if isinstance(sampler, Dopri5) else {"num_steps": sampler.num_steps}
    return {"sampler": column.sampler, "guidance": sampler.guidance.scale, **steps}


def _made_by(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.train is None:
        return {"file": checkpoint.origin.dump()["file"]}
    shown = ("init", "law", "gamma", "shift", "num_steps", "batch_size", "learning_rate", "seed")
    return {key: checkpoint.train.dump()[key] for key in shown}


def _slice_figure(config: Config, table: str, figure: str) -> dict[str, Any]:
    entry = config.get("tables", table)
    if figure not in entry.figures:
        raise UserError(f"'{figure}' is not a figure of table '{table}'{did_you_mean(figure, entry.figures)}")
    arms = [{"label": row.label, "row": row.key, "checkpoint": row.checkpoint} for row in entry.rows if row.checkpoint]
    settings = {"table": table, "figure": figure, "arms": arms}
    if figure == "samples":  # those of the most careful sampler
        names = [column.sampler for column in entry.columns if column.sampler is not None]
        sampler = max(names, key=lambda name: network_calls(config.samplers[name]))
        settings |= {"sampler": sampler, "title": config.samplers[sampler].description}
    return settings


def _slice_render(config: Config, name: str) -> dict[str, Any]:
    table = config.get("tables", name)
    columns = []
    for column in table.columns:
        sampler = None if column.sampler is None else config.samplers[column.sampler]
        label = column.label or (sampler.description if sampler else "")
        columns.append({"label": label, "metric": column.metric})
        if sampler:
            columns[-1] |= {"sampler": column.sampler or "", "protocol": sampler.protocol}
    rows = [row.key for row in table.rows]
    return {"table": name, "columns": columns, "rows": rows, **table.dump("columns", "rows")}


SLICES: dict[str, Callable[..., dict[str, Any]]] = {
    "cache_latents": _slice_cache_latents,
    "train": _slice_train,
    "import_weights": _slice_import_weights,
    "sample": _slice_sample,
    "train_extractor": _slice_train_extractor,
    "make_reference": _slice_make_reference,
    "evaluate": _slice_evaluate,
    "row": _slice_row,
    "figure": _slice_figure,
    "render": _slice_render,
}


def to_json(settings: dict[str, Any]) -> str:
    """Return the one canonical JSON text of a slice: sorted keys, no spaces, ASCII."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)


def slice_key(settings: dict[str, Any], *parents_sha256: str) -> str:
    """Return 16 hex digits that stand for a slice and the files it starts from."""
    text = "\n".join([to_json(settings), *parents_sha256])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
