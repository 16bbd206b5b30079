"""Replicates: entries that differ from a named one in their seed alone, made as tables ask for them.

`NAME-seedN` stands for the entry NAME with seed N; with its own seed an entry stands for itself, so that nothing is
trained twice. What arms of a table share is not replicated: weights from files, and checkpoints that other rows start
from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from mixflow.config.entries import Row
from mixflow.runtime.errors import UserError

if TYPE_CHECKING:
    from mixflow.config.resolved import Config


class Replicate(NamedTuple):
    """The i-th training of a row's checkpoint and the i-th set of samples of it."""

    training: int | None  # the seed; None where the checkpoint is shared, and only samples are drawn again
    sampling: int
    checkpoint: str
    samplers: dict[str, str]  # sampler of the row -> the one with the seed


def replicates(config: Config, table: str, row: Row) -> list[Replicate]:
    """Return the replicates of a measured row of a table that has any."""
    entry = config.tables[table]
    assert row.checkpoint is not None, "only measured rows have replicates"
    seeds = entry.replicates
    assert seeds is not None, "asked of tables with replicates alone"
    samplers = dict.fromkeys(row.sampler_of(column) for column in entry.columns)
    shared = row.checkpoint in _shared(config, table) or config.checkpoints[row.checkpoint].train is None
    return [
        Replicate(
            None if shared else training,
            sampling,
            row.checkpoint if shared else _name(row.checkpoint, config.checkpoints[row.checkpoint].train, training),
            {name: _name(name, config.samplers[name], sampling) for name in samplers},
        )
        for training, sampling in zip(seeds.training, seeds.sampling, strict=True)
    ]


def _shared(config: Config, table: str) -> set[str]:
    """Return the checkpoints that rows of a table start from, at any distance."""
    shared = set()
    for row in config.tables[table].rows:
        name = row.checkpoint
        while name is not None and (name := config.parent(name)) is not None:
            shared.add(name)
    return shared


def _name(name: str, entry: Any, seed: int) -> str:
    return name if entry.seed == seed else f"{name}-seed{seed}"


def with_replicates(config: Config) -> Config:
    """Return the config with an entry for every replicate that its tables ask for.

    Raises `UserError` where such a name is already that of another entry.
    """
    checkpoints, samplers = dict(config.checkpoints), dict(config.samplers)
    for table, entry in config.tables.items():
        for row in entry.rows if entry.replicates else ():
            for made in replicates(config, table, row) if row.checkpoint else ():
                if made.training is not None and row.checkpoint != made.checkpoint:
                    original = config.checkpoints[row.checkpoint or ""]
                    assert original.train is not None
                    copy = original.model_copy(update={"train": _with_seed(original.train, made.training)})
                    _add(checkpoints, "checkpoints", table, made.checkpoint, copy)
                for name, own in made.samplers.items():
                    if name != own:
                        _add(samplers, "samplers", table, own, _with_seed(config.samplers[name], made.sampling))
    return config.model_copy(update={"checkpoints": checkpoints, "samplers": samplers})


def _with_seed(entry: Any, seed: int) -> Any:
    return entry.model_copy(update={"seed": seed})


def _add(entries: dict[str, Any], section: str, table: str, name: str, entry: Any) -> None:
    if entries.setdefault(name, entry) != entry:
        raise UserError(
            f"{section}.{name}: the replicate that table '{table}' makes has this name and other settings: rename it"
        )
