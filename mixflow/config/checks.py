"""Checks across entries: that names lead somewhere, and that what meets fits together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mixflow.config.entries import REPA, SDVAE, Classifier, Pair, Row, Table
from mixflow.config.samplers import EulerMaruyama
from mixflow.config.values import NAME_PATTERN, SCRATCH
from mixflow.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mixflow.config.resolved import Config


def _references(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield (where, name, section) for every mention of an entry by its name."""
    for name, dataset in config.datasets.items():
        yield f"datasets.{name}.reference", dataset.reference, "references"
        for other in dataset.further_references:
            yield f"datasets.{name}.further_references", other, "references"
    for section in ("autoencoders", "encoders", "extractors", "references"):
        for name, entry in getattr(config, section).items():
            if (download := getattr(entry, "download", None)) is not None:
                yield f"{section}.{name}.download", download, "downloads"
    for name, latents in config.latents.items():
        yield f"latents.{name}.dataset", latents.dataset, "datasets"
        yield f"latents.{name}.autoencoder", latents.autoencoder, "autoencoders"
    for name, checkpoint in config.checkpoints.items():
        part = "train" if checkpoint.train else "weights"
        yield f"checkpoints.{name}.{part}.latents", checkpoint.origin.latents, "latents"
        if checkpoint.train and checkpoint.train.init != SCRATCH:
            yield f"checkpoints.{name}.train.init", checkpoint.train.init, "checkpoints"
        if checkpoint.weights and checkpoint.weights.download is not None:
            yield f"checkpoints.{name}.weights.download", checkpoint.weights.download, "downloads"
        if checkpoint.train and checkpoint.train.align:
            yield f"checkpoints.{name}.train.align.encoder", checkpoint.train.align.encoder, "encoders"
            yield f"checkpoints.{name}.train.align.images", checkpoint.train.align.images, "latents"
    for name, extractor in config.extractors.items():
        if isinstance(extractor, Classifier):
            yield f"extractors.{name}.latents", extractor.latents, "latents"
    for name, reference in config.references.items():
        if reference.latents is not None:
            yield f"references.{name}.latents", reference.latents, "latents"
        yield f"references.{name}.extractor", reference.extractor, "extractors"
    for name, table in config.tables.items():
        for index, column in enumerate(table.columns):
            if column.sampler is not None:
                yield f"tables.{name}.columns.{index}.sampler", column.sampler, "samplers"
        for row in table.rows:
            if row.checkpoint is not None:
                yield f"tables.{name}.rows.{row.key}.checkpoint", row.checkpoint, "checkpoints"
            for own in (row.samplers or {}).values():
                yield f"tables.{name}.rows.{row.key}.samplers", own, "samplers"


def check_references(config: Config) -> None:
    """Check that every name is that of an entry, and that no checkpoint starts from itself."""
    for where, name, section in _references(config):
        entries = getattr(config, section)
        if name not in entries:
            known = [*entries, SCRATCH] if where.endswith(".init") else entries
            raise UserError(f"{where}: '{name}' is not one of the {section}{did_you_mean(name, known)}")
    for name in config.checkpoints:
        chain = [name]
        while (parent := config.parent(chain[-1])) is not None:
            circle = " -> ".join((*chain, parent))
            if parent in chain:
                raise UserError(f"checkpoints.{name}.train.init: {circle} never ends: start one from scratch")
            chain.append(parent)


def check_networks(config: Config) -> None:
    """Check that networks fit their latents, and the checkpoints that they start from."""
    for name, checkpoint in config.checkpoints.items():
        options, latents, parent = config.network_options(name), checkpoint.origin.latents, config.parent(name)
        if options["input_size"] % options["patch_size"]:
            raise UserError(
                f"checkpoints.{name}: patch_size {options['patch_size']} does not divide the latents of '{latents}', "
                f"which are {options['input_size']} wide: take one that does"
            )
        if parent is not None and config.network_options(parent) != options:
            raise UserError(
                f"checkpoints.{name}.train.latents: '{latents}' has other channels, sizes or classes than those of "
                f"'{parent}', which it starts from: name latents of the same shape"
            )


def check_latents_entries(config: Config) -> None:
    """Check that autoencoders can take the images that they are to encode."""
    for name, latents in config.latents.items():
        dataset, autoencoder = config.dataset_of(name), config.autoencoder_of(name)
        if not isinstance(autoencoder, SDVAE):
            continue
        if dataset.num_channels != 3 or dataset.resolution % autoencoder.downsampling:
            raise UserError(
                f"latents.{name}.autoencoder: '{latents.autoencoder}' takes colour images whose size is a multiple of "
                f"{autoencoder.downsampling}, but '{latents.dataset}' has {dataset.num_channels} channels at "
                f"{dataset.resolution}: name another dataset or autoencoder"
            )


def check_comparisons(config: Config) -> None:
    """Check that references can be made by their extractors."""
    for name, reference in config.references.items():
        where, extractor = f"references.{name}", config.extractors[reference.extractor]
        if isinstance(extractor, Classifier) and reference.latents is None:
            raise UserError(
                f"{where}.download: the extractor '{reference.extractor}' sees cached images alone: name latents"
            )
        if isinstance(extractor, Classifier) or reference.latents is None:
            continue
        if config.autoencoder_of(reference.latents).kind != "pixels":
            raise UserError(
                f"{where}.latents: '{reference.latents}' holds no pixels, and images that went through an autoencoder "
                "are no reference: name latents with the autoencoder pixels"
            )


def check_alignment(config: Config) -> None:
    """Check that what REPA aligns fits together: a network with projectors, the encoder's width, the same images."""
    for name, checkpoint in config.checkpoints.items():
        align = checkpoint.train.align if checkpoint.train else None
        if align is None:
            continue
        where = f"checkpoints.{name}.train.align"
        model, encoder = checkpoint.origin.model, config.encoders[align.encoder]
        if not isinstance(model, REPA):
            family = checkpoint.origin.model and checkpoint.origin.model.family
            raise UserError(
                f"{where}: a {family} network has no projectors to align: take family repa, or leave it out"
            )
        if model.z_dims != (encoder.num_features,):
            raise UserError(
                f"{where}.encoder: '{align.encoder}' has {encoder.num_features} features but the projectors of "
                f"'{name}' have {list(model.z_dims)}: name the encoder that they were made for"
            )
        if config.latents[align.images].dataset != config.latents[checkpoint.origin.latents].dataset:
            raise UserError(
                f"{where}.images: '{align.images}' holds '{config.latents[align.images].dataset}', the latents are of "
                f"'{config.latents[checkpoint.origin.latents].dataset}': name pixels of the same dataset"
            )
        if config.autoencoder_of(align.images).kind != "pixels":
            raise UserError(
                f"{where}.images: '{align.images}' holds no pixels: name latents with the autoencoder pixels"
            )


def check_pair(config: Config, pair: Pair) -> None:
    """Check that a checkpoint can be sampled this way."""
    origin, sampler = config.get("checkpoints", pair.checkpoint).origin, config.get("samplers", pair.sampler)
    guidance, (channels, _) = sampler.guidance, config.latent_shape(origin.latents)
    where = f"samplers.{pair.sampler}.guidance"
    if guidance.scale != 1 and origin.model.label_dropout == 0:
        raise UserError(
            f"{where}.scale: {guidance.scale:g} cannot be used with '{pair.checkpoint}', whose label_dropout 0 leaves "
            "it without a null class: take a sampler with scale 1.0"
        )
    if guidance.channels != "all" and guidance.channels > channels:
        raise UserError(
            f"{where}.channels: {guidance.channels} is more than the {channels} of the latents of "
            f"'{pair.checkpoint}': write a smaller number, or all"
        )
    if isinstance(sampler, EulerMaruyama) and origin.interpolant is None:
        raise UserError(
            f"checkpoints.{pair.checkpoint}.weights.interpolant: missing, but the SDE sampler '{pair.sampler}' needs "
            "it: add linear or gvp"
        )


def check_tables(config: Config) -> None:
    """Check that rows have names of their own, a number for each column, and metrics that can be had."""
    for name, table in config.tables.items():
        where, width = f"tables.{name}", len(table.columns)
        for key, count in Counter(row.key for row in table.rows).items():
            if count > 1:
                raise UserError(f"{where}.rows: '{key}' stands there {count} times: give one of them another name")
            if not re.match(NAME_PATTERN, key):
                raise UserError(f"{where}.rows: the name '{key}' cannot be used in paths: write it as entries are")
        for row in table.rows:
            if row.paper is not None and len(row.paper) != width:
                raise UserError(
                    f"{where}.rows.{row.key}.paper: {len(row.paper)} numbers for {width} columns: write one for each, "
                    "null where the paper has none"
                )
            if row.against is not None:
                _check_control(where, table, row, row.against)
            if row.checkpoint is not None:
                _check_columns(config, where, table, row, row.checkpoint)


def _check_control(where: str, table: Table, row: Row, against: str) -> None:
    at = f"{where}.rows.{row.key}.against"
    quoted = {other.key: other.quoted for other in table.rows}
    if against not in quoted:
        raise UserError(f"{at}: '{against}' is not a row of this table{did_you_mean(against, quoted)}")
    if against == row.key:
        raise UserError(f"{at}: a row cannot be its own control: name another one")
    if row.quoted or quoted[against]:
        key = row.key if row.quoted else against
        raise UserError(f"{at}: '{key}' is quoted, so nothing is measured there to compare: leave it out")


def _check_columns(config: Config, where: str, table: Table, row: Row, checkpoint: str) -> None:
    replaced = {column.sampler for column in table.columns}
    for name in row.samplers or ():
        if name not in replaced:
            raise UserError(f"{where}.rows.{row.key}.samplers: no column has the sampler '{name}' to take the place of")
    for index, column in enumerate(table.columns):
        at = f"{where}.columns.{index}"
        if column.sampler is None:
            raise UserError(f"{at}.sampler: missing, but the row of '{checkpoint}' is to be measured: add it")
        try:
            config.reference_for(checkpoint, column.metric)
        except UserError as error:
            raise UserError(f"{at}.metric: {error}") from None
        check_pair(config, Pair(checkpoint, row.sampler_of(column)))
