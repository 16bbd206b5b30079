"""Checks across entries: that names lead somewhere, and that what meets fits together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mixflow.config.entries import Classifier, Pair, Row, Table
from mixflow.config.networks import REPA
from mixflow.config.samplers import CORRECTIONS, Dopri5, EulerMaruyama, FixedStep
from mixflow.config.sources import RAE, SDVAE
from mixflow.config.values import NAME_PATTERN, SCRATCH
from mixflow.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mixflow.config.resolved import Config


def _references(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield (where, name, section) for every mention of an entry by its name."""
    for name, dataset in config.datasets.items():
        for index, compared in enumerate(dataset.references):
            yield f"datasets.{name}.{'further_references' if index else 'reference'}", compared, "references"
    for section in ("encoders", "extractors", "references"):
        for name, entry in getattr(config, section).items():
            if entry.download is not None:
                yield f"{section}.{name}.download", entry.download, "downloads"
    for name, autoencoder in config.autoencoders.items():
        for role, download in autoencoder.files_for("encode", "latents", "decode").items():
            key = "download" if role == "network" else role
            yield f"autoencoders.{name}.{key}", download, "downloads"
    for name, latents in config.latents.items():
        yield f"latents.{name}.dataset", latents.dataset, "datasets"
        yield f"latents.{name}.autoencoder", latents.autoencoder, "autoencoders"
        if latents.encoded_from is not None:
            yield f"latents.{name}.encoded_from", latents.encoded_from, "latents"
    for name, sampler in config.samplers.items():
        if sampler.guidance.guide is not None:
            yield f"samplers.{name}.guidance.guide", sampler.guidance.guide, "checkpoints"
    for name, checkpoint in config.checkpoints.items():
        part = next(part for part in ("train", "weights", "exact") if getattr(checkpoint, part))
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
    for name in config.clocks:
        yield f"clocks.{name}", name, "latents"
    for name, figure in config.figures.items():
        yield f"figures.{name}.sampler", figure.sampler, "samplers"
        for index, arm in enumerate(figure.arms):
            yield f"figures.{name}.arms.{index}.checkpoint", arm.checkpoint, "checkpoints"
        for drawn in figure.paper.borders if figure.paper else ():
            yield f"figures.{name}.paper.borders.{drawn}", drawn, "checkpoints"
    if config.report is not None:
        for key in ("made", "shown"):
            for index, table_name in enumerate(getattr(config.report, key)):
                yield f"report.{key}.{index}", table_name, "tables"
        for index, figure_name in enumerate(config.report.slow_flow):
            yield f"report.slow_flow.{index}", figure_name, "figures"
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
        if (parent := config.parent(name)) is not None and config.checkpoints[parent].exact is not None:
            raise UserError(
                f"checkpoints.{name}.train.init: '{parent}' is an exact field, which has no weights to train: name "
                "trained weights, or scratch"
            )
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
        patch_size = options.get("patch_size", 1)
        if options["input_size"] % patch_size:
            raise UserError(
                f"checkpoints.{name}: patch_size {patch_size} does not divide the latents of '{latents}', "
                f"which are {options['input_size']} wide: take one that does"
            )
        if checkpoint.train and checkpoint.train.horizontal_flip and config.latents[latents].mirrors is False:
            raise UserError(
                f"checkpoints.{name}.train.horizontal_flip: the cached latents '{latents}' hold no mirror images, and "
                "tokens of a mirror image are not the flipped tokens: write false, or mirrors: true there"
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
        if (dataset.kind == "gaussian") != (autoencoder.kind == "identity"):
            raise UserError(
                f"latents.{name}.autoencoder: '{latents.autoencoder}' is of kind {autoencoder.kind}, the dataset "
                f"'{latents.dataset}' of kind {dataset.kind}: identity goes with kind gaussian, and with no other"
            )
        if isinstance(autoencoder, RAE):
            _check_rae(config, name)
        elif latents.mirrors is not None or latents.encoded_from is not None:
            key = "mirrors" if latents.encoded_from is None else "encoded_from"
            raise UserError(
                f"latents.{name}.{key}: goes with an autoencoder of kind rae, and '{latents.autoencoder}' is of kind "
                f"{autoencoder.kind}: leave it out"
            )
        if not isinstance(autoencoder, RAE | SDVAE):
            continue
        if dataset.num_channels != 3 or dataset.resolution % autoencoder.downsampling:
            raise UserError(
                f"latents.{name}.autoencoder: '{latents.autoencoder}' takes colour images whose size is a multiple of "
                f"{autoencoder.downsampling}, but '{latents.dataset}' has {dataset.num_channels} channels at "
                f"{dataset.resolution}: name another dataset or autoencoder"
            )


def _check_rae(config: Config, name: str) -> None:
    """Check the geometry of representation latents, and what they are kept in or made from."""
    latents, dataset, autoencoder = config.latents[name], config.dataset_of(name), config.autoencoder_of(name)
    assert isinstance(autoencoder, RAE)
    tokens = autoencoder.encoder_size // autoencoder.encoder_patch
    _, wanted = autoencoder.latent_shape(dataset)
    if tokens != wanted:
        raise UserError(
            f"latents.{name}.autoencoder: '{latents.autoencoder}' sees images at {autoencoder.encoder_size} pixels, "
            f"which makes {tokens}x{tokens} tokens, but latents of {dataset.resolution} pixels are {wanted}x{wanted}: "
            f"set encoder_size to {wanted * autoencoder.encoder_patch}, and take decoder and statistics of that size"
        )
    if latents.encoded_from is None:
        if latents.mirrors is None:
            size = dataset.num_images * autoencoder.bytes_per_image(dataset, False) / 1e9
            raise UserError(
                f"latents.{name}.mirrors: missing, and nothing has a default: write false ({size:,.0f} GB), or true "
                f"({2 * size:,.0f} GB), which training with horizontal_flip needs"
            )
        return
    if config.autoencoder_of(latents.encoded_from).kind != "pixels":
        raise UserError(
            f"latents.{name}.encoded_from: '{latents.encoded_from}' holds no pixels: name latents with the autoencoder "
            "pixels"
        )
    if config.latents[latents.encoded_from].dataset != latents.dataset:
        raise UserError(
            f"latents.{name}.encoded_from: '{latents.encoded_from}' holds "
            f"'{config.latents[latents.encoded_from].dataset}', not '{latents.dataset}': name pixels of that dataset"
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
    num_classes = config.dataset_of(origin.latents).num_classes
    if sampler.labels == "balanced_shuffled" and sampler.num_images % num_classes:
        raise UserError(
            f"samplers.{pair.sampler}.num_images: {sampler.num_images} is no multiple of the {num_classes} classes of "
            f"'{pair.checkpoint}', as labels: balanced_shuffled asks for: write one, or take labels: balanced"
        )
    if guidance.guide is not None:
        _check_guide(config, where, pair.checkpoint, guidance.guide)
    elif guidance.scale != 1 and not config.model_of(pair.checkpoint).has_null_class:
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
    if isinstance(sampler, FixedStep):
        _check_corrections(config, pair, sampler)


def _check_corrections(config: Config, pair: Pair, sampler: FixedStep) -> None:
    """Check that what a sampler does against exposure bias is defined for a checkpoint."""
    origin = config.checkpoints[pair.checkpoint].origin
    (_, size), where = config.latent_shape(origin.latents), f"samplers.{pair.sampler}"
    used = [key for key in CORRECTIONS if getattr(sampler, key) is not None]
    if used and origin.interpolant != "linear":
        found = "missing" if origin.interpolant is None else origin.interpolant
        raise UserError(
            f"{where}.{used[0]}: its formula is that of the linear path, and the interpolant of '{pair.checkpoint}' is "
            f"{found}: take a checkpoint with interpolant linear, or add it to weights"
        )
    if sampler.differential_correction is not None and sampler.differential_correction.band == "low" and size % 2:
        raise UserError(
            f"{where}.differential_correction.band: low takes blocks of 2x2, into which the latents of "
            f"'{pair.checkpoint}', {size} wide, cannot be cut: write pixel"
        )
    if sampler.time_shift is not None and config.clock_of(pair.checkpoint) is None:
        raise UserError(
            f"{where}.time_shift: there is no clock for '{origin.latents}', the latents of '{pair.checkpoint}': add an "
            "entry of that name to clocks, with interpolant linear"
        )


def check_images(config: Config, checkpoint: str) -> None:
    """Check that what a checkpoint makes are latents of images, so that it can be decoded and looked at."""
    latents = config.latents_of(checkpoint)
    if config.dataset_of(latents).kind == "gaussian":
        raise UserError(
            f"checkpoints.{checkpoint}: makes draws of '{latents}', which are no images to write or compare: take a "
            "checkpoint of images, or see what the target theory draws"
        )


def check_slow_flow(config: Config, pair: Pair) -> None:
    """Check that Slow Flow of a checkpoint can be measured under a sampler."""
    check_pair(config, pair)
    if config.slow_flow is None:
        raise UserError(
            "slow_flow: missing from the config, and nothing has a default: add start, fit_images, max_axes"
        )
    if isinstance(config.samplers[pair.sampler], Dopri5):
        raise UserError(
            f"samplers.{pair.sampler}.solver: dopri5 chooses its own steps, so there are no common times at which to "
            "measure Slow Flow: take a sampler with num_steps"
        )
    if (interpolant := config.checkpoints[pair.checkpoint].origin.interpolant) != "linear":
        found = "missing" if interpolant is None else interpolant
        raise UserError(
            f"checkpoints.{pair.checkpoint}: its interpolant is {found}, and Slow Flow is measured on the linear path "
            "alone: take a checkpoint with interpolant linear, or add it to weights"
        )


def check_figures(config: Config) -> None:
    """Check that figures can be drawn, and that their names are free as targets."""
    for name, figure in config.figures.items():
        if name in (*config.tables, "paper"):
            raise UserError(f"figures.{name}: a table has this name, and both are targets: give it another name")
        for arm in figure.arms:
            try:
                check_slow_flow(config, Pair(arm.checkpoint, figure.sampler))
            except UserError as error:
                raise UserError(f"figures.{name}: {error}") from None


def _check_guide(config: Config, where: str, checkpoint: str, guide: str) -> None:
    ours, theirs = (config.latents[config.latents_of(name)] for name in (checkpoint, guide))
    shape, found = (config.latent_shape(config.latents_of(name)) for name in (checkpoint, guide))
    if shape != found or ours.autoencoder != theirs.autoencoder:
        described = [
            f"{size}x{size}x{channels} of '{latents.autoencoder}'"
            for (channels, size), latents in ((shape, ours), (found, theirs))
        ]
        raise UserError(
            f"{where}.guide: '{guide}' makes latents {described[1]}, but those of '{checkpoint}' are {described[0]}: "
            "take a sampler whose guide was trained on the same latents"
        )
    paths = {config.checkpoints[name].origin.interpolant for name in (checkpoint, guide)} - {None}
    if len(paths) > 1:
        raise UserError(f"{where}.guide: '{guide}' has another interpolant than '{checkpoint}': name another guide")
    wanted, known = (config.network_options(name)["num_classes"] for name in (checkpoint, guide))
    if known < wanted:
        raise UserError(f"{where}.guide: '{guide}' knows {known} of the {wanted} classes: name another guide")


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
            for control in row.controls:
                _check_control(where, table, row, control)
            if row.checkpoint is not None:
                check_images(config, row.checkpoint)
                _check_columns(config, where, table, row, row.checkpoint)


def check_report(config: Config) -> None:
    """Check that each table stands once on the page, and that every question has a comparison that answers it."""
    if config.report is None:
        return
    for name, count in Counter(config.report.tables).items():
        if count > 1:
            raise UserError(f"report.shown: '{name}' stands in made and shown {count} times: write it once")
    for index, answer in enumerate(config.report.answers):
        where = f"report.answers.{index}"
        if answer.table not in config.report.tables:
            raise UserError(
                f"{where}.table: '{answer.table}' is not on the page{did_you_mean(answer.table, config.report.tables)}"
            )
        try:
            row = config.row(answer.table, answer.row)
        except UserError as error:
            raise UserError(f"{where}.row: {error}") from None
        if not row.controls:
            raise UserError(f"{where}.row: '{answer.row}' has no control to be compared with: give it an 'against'")
        if answer.against not in (None, *row.controls):
            raise UserError(
                f"{where}.against: '{answer.against}' is no control of '{answer.row}'"
                f"{did_you_mean(answer.against or '', row.controls)}"
            )
        columns = [(column.sampler, column.metric) for column in config.tables[answer.table].columns]
        if (answer.sampler, answer.metric) not in columns:
            raise UserError(
                f"{where}: table '{answer.table}' has no column of {answer.metric} under '{answer.sampler}': name one "
                "of its columns"
            )


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
