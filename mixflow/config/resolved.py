"""The resolved config: every entry spelled out, and the lookups between them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mixflow.config.entries import (
    Checkpoint,
    Clock,
    Encoder,
    Extractor,
    Pair,
    Reference,
    Report,
    Row,
    SlowFlow,
    SlowFlowFigure,
    Table,
    Theory,
)
from mixflow.config.networks import AnyModel, network_flops
from mixflow.config.replicates import replicates
from mixflow.config.samplers import Sampler
from mixflow.config.slices import SLICES
from mixflow.config.sources import Autoencoder, Dataset, Download, Latents, StandIns
from mixflow.config.values import SCRATCH, Entry, Name
from mixflow.runtime.errors import UserError, did_you_mean


class Config(Entry):
    """A resolved config. Lookups raise `UserError` for names that are not there."""

    image: str
    stand_ins: StandIns | None = None
    downloads: dict[Name, Download] = Field(default_factory=dict)  # a section left out has no entries
    datasets: dict[Name, Dataset]
    autoencoders: dict[Name, Autoencoder]
    latents: dict[Name, Latents]
    encoders: dict[Name, Encoder] = Field(default_factory=dict)
    checkpoints: dict[Name, Checkpoint]
    samplers: dict[Name, Sampler]
    extractors: dict[Name, Extractor]
    references: dict[Name, Reference]
    tables: dict[Name, Table]
    clocks: dict[Name, Clock] = Field(default_factory=dict)  # by the latents whose time they read
    slow_flow: SlowFlow | None = None
    figures: dict[Name, SlowFlowFigure] = Field(default_factory=dict)
    theory: Theory | None = None
    report: Report | None = None

    def get(self, section: str, name: str) -> Any:
        """Return an entry; an unknown name is a `UserError`."""
        entries = getattr(self, section)
        if name not in entries:
            raise UserError(f"'{name}' is not one of the {section} in the config{did_you_mean(name, entries)}")
        return entries[name]

    def row(self, table: str, name: str) -> Row:
        """Return a row of a table by its name."""
        rows = {row.key: row for row in self.get("tables", table).rows}
        if name not in rows:
            raise UserError(f"'{name}' is not a row of table '{table}'{did_you_mean(name, rows)}")
        return rows[name]

    def parent(self, checkpoint: str) -> str | None:
        """Return the checkpoint that this one starts from, None for one trained from scratch or taken from a file."""
        train = self.get("checkpoints", checkpoint).train
        return None if train is None or train.init == SCRATCH else train.init

    def latents_of(self, checkpoint: str) -> str:
        """Return the latents that a checkpoint models."""
        return self.get("checkpoints", checkpoint).origin.latents

    def dataset_of(self, latents: str) -> Dataset:
        """Return the dataset behind latents."""
        return self.get("datasets", self.get("latents", latents).dataset)

    def cache_of(self, latents: str) -> str:
        """Return the latents whose files training reads: these, or the pixels that they are encoded from."""
        return self.get("latents", latents).encoded_from or latents

    def bytes_of(self, latents: str) -> int:
        """Return the size of a latent cache, without the few bytes of its headers."""
        entry, dataset = self.get("latents", latents), self.dataset_of(latents)
        if entry.encoded_from is not None:
            return 0
        return dataset.num_images * self.autoencoder_of(latents).bytes_per_image(dataset, entry.mirrors)

    def reference_of(self, checkpoint: str) -> str:
        """Return the reference that a checkpoint's samples are compared with first; `UserError` without one."""
        if not (references := self.dataset_of(self.latents_of(checkpoint)).references):
            raise UserError(
                f"'{checkpoint}' makes no images, so that there is no reference for them: name a checkpoint of images"
            )
        return references[0]

    def references_of(self, checkpoint: str) -> dict[str, tuple[str, ...]]:
        """Return all references that a checkpoint's samples can be compared with, and the metrics of each."""
        names = dict.fromkeys(self.dataset_of(self.latents_of(checkpoint)).references)
        return {name: self.extractors[self.get("references", name).extractor].metrics for name in names}

    def reference_for(self, checkpoint: str, metric: str) -> str:
        """Return the reference that gives a metric of a checkpoint's samples. `UserError` where none does."""
        references = self.references_of(checkpoint)
        for name, metrics in references.items():
            if metric in metrics:
                return name
        known = [metric for metrics in references.values() for metric in metrics]
        raise UserError(
            f"'{metric}' cannot be had from {' or '.join(references)}, with which '{checkpoint}' is "
            f"compared{did_you_mean(metric, known)}"
        )

    def clock_of(self, checkpoint: str) -> str | None:
        """Return the clock that reads the time of a checkpoint's states, None where there is none."""
        origin = self.get("checkpoints", checkpoint).origin
        clock = self.clocks.get(origin.latents)
        return origin.latents if clock is not None and clock.interpolant == origin.interpolant else None

    def cells(self, table: str, row: str | None = None) -> list[Pair]:
        """Return the sample sets that a table, or one row of it, needs: each once, in order."""
        entry = self.get("tables", table)
        rows = entry.rows if row is None else (self.row(table, row),)
        pairs = [
            Pair(checkpoint, samplers[row.sampler_of(column)])
            for row in rows
            if row.checkpoint
            for checkpoint, samplers in self.makers(table, row)
            for column in entry.columns
        ]
        return list(dict.fromkeys(pairs))

    def makers(self, table: str, row: Row) -> list[tuple[str, dict[str, str]]]:
        """Return (checkpoint, sampler of the row -> its replicate) of each replicate of a measured row."""
        entry = self.get("tables", table)
        if entry.replicates is not None:
            return [(made.checkpoint, made.samplers) for made in replicates(self, table, row)]
        assert row.checkpoint is not None, "quoted rows are not made"
        return [(row.checkpoint, {name: name for name in map(row.sampler_of, entry.columns)})]

    def paper_tables(self) -> list[str]:
        """Return the names of the paper's own tables."""
        return [name for name, table in self.tables.items() if table.paper]

    def science_tables(self) -> list[str]:
        """Return the names of the tables on digits that say what MixFlow's gain is: digits_..., replicated."""
        return [name for name, table in self.tables.items() if name.startswith("digits_") and table.replicates]

    def trained_checkpoints(self) -> list[str]:
        """Return the names of the checkpoints that are trained here."""
        return [name for name, checkpoint in self.checkpoints.items() if checkpoint.train]

    def imported_checkpoints(self) -> list[str]:
        """Return the names of the checkpoints that are taken from files."""
        return [name for name, checkpoint in self.checkpoints.items() if checkpoint.weights]

    def exact_checkpoints(self) -> list[str]:
        """Return the names of the checkpoints that are known exactly."""
        return [name for name, checkpoint in self.checkpoints.items() if checkpoint.exact]

    def model_of(self, checkpoint: str) -> AnyModel:
        """Return what network a checkpoint is."""
        entry = self.get("checkpoints", checkpoint)
        if entry.exact is not None:
            return entry.exact.field(self.dataset_of(entry.exact.latents))
        return entry.origin.model

    def network_options(self, checkpoint: str) -> dict[str, Any]:
        """Return all options of a checkpoint's network, with those that its latents and dataset decide."""
        model = self.model_of(checkpoint)
        channels, size, num_classes = self._sizes(checkpoint)
        return {**model.dump(), "input_size": size, "in_channels": channels, "num_classes": num_classes}

    def num_parameters(self, checkpoint: str) -> int:
        """Return how many numbers a checkpoint's weights hold."""
        return self.model_of(checkpoint).num_parameters(*self._sizes(checkpoint))

    def flops(self, checkpoint: str) -> int:
        """Return the FLOPs of a forward pass of a checkpoint's network on one image."""
        return network_flops(self.network_options(checkpoint))

    def _sizes(self, checkpoint: str) -> tuple[int, int, int]:
        """Return (channels, size, classes) that latents and dataset decide."""
        latents = self.latents_of(checkpoint)
        return *self.latent_shape(latents), self.dataset_of(latents).num_classes

    def latent_shape(self, latents: str) -> tuple[int, int]:
        """Return (channels, size) of square latents."""
        return self.autoencoder_of(latents).latent_shape(self.dataset_of(latents))

    def autoencoder_of(self, latents: str) -> Autoencoder:
        """Return the autoencoder behind latents."""
        return self.get("autoencoders", self.get("latents", latents).autoencoder)

    def slice(self, stage: str, *names: str) -> dict[str, Any]:
        """Return the settings of one job as plain JSON-able values, resolved, with nothing that is not its business.

        Stages and names: stand_ins, download DOWNLOAD, cache_latents LATENTS, train CHECKPOINT, import_weights
        CHECKPOINT, make_exact CHECKPOINT, sample CHECKPOINT SAMPLER, train_clock LATENTS, slow_flow CHECKPOINT SAMPLER,
        slow_flow_figure CHECKPOINT SAMPLER or FIGURE, theory, evaluate CHECKPOINT SAMPLER [REFERENCE], train_extractor
        EXTRACTOR, make_reference REFERENCE, row TABLE ROW, figure TABLE FIGURE, render TABLE, report.
        """
        return SLICES[stage](self, *names)
