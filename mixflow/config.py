"""What to compute: config.yaml as typed entries, and the slice of it that each stage is handed.

No value that can change a result has a default: a resolved entry spells out everything. Optional features that are
absent are None and left out of slices, so that adding an optional key never makes a finished job run again.
`python -m mixflow.config --write-schema` regenerates the JSON schema for editors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.weights_header import safetensors_shapes, saved_model_options, sit_options_from_shapes

SCRATCH = "scratch"  # `init: scratch` starts from random weights
SCHEMA_FILE = "workflow/schemas/config.schema.yaml"
NAME_PATTERN = "^[a-z0-9][a-z0-9._-]*$"  # entry names are path components and Snakemake wildcards

# --- values ----------------------------------------------------------------------------------------------------------


def _from_text(value: Any) -> Any:
    """Read text as YAML reads it where it is a number, a truth value or null.

    Snakemake's `--config` leaves every nested value as text.
    """
    if not isinstance(value, str):
        return value
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return read if read is None or isinstance(read, int | float) else value


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_TEXT = BeforeValidator(_from_text)
_LIST = BeforeValidator(_list_to_tuple)
Flag = Annotated[bool, _TEXT]
Count = Annotated[int, Field(ge=1), _TEXT]
Seed = Annotated[int, Field(ge=0, lt=2**63), _TEXT]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _TEXT]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _TEXT]
Fraction = Annotated[float, Field(ge=0, le=1), _TEXT]
BelowOne = Annotated[float, Field(ge=0, lt=1), _TEXT]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]

Precision = Literal["fp32", "tf32", "bf16"]
CLASSIFIER_METRICS = Literal["fd", "fd_held_out", "accuracy", "variance_ratio", "nearest_train", "nearest_held_out"]
INCEPTION_METRICS = Literal["fid", "sfid", "is", "precision", "recall"]


class Entry(BaseModel):
    """Base of all entries: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise UserError(f"'{key}' is not a key here{did_you_mean(key, cls.model_fields)}")
        return values

    def dump(self, *left_out: str) -> dict[str, Any]:
        """Return the entry as plain JSON-able values, without what is absent or `left_out`."""
        return self.model_dump(mode="json", exclude_none=True, exclude=set(left_out))


# --- datasets, autoencoders, latents ---------------------------------------------------------------------------------
# A later kind is one more class, joined as in `Sampler` below: Annotated[A | B, Field(discriminator="kind")].


class Digits(Entry):
    """scikit-learn's handwritten digits."""

    kind: Literal["digits"]
    resolution: Count
    num_classes: Count
    num_held_out: Count
    seed: Seed
    reference: str

    @property
    def num_channels(self) -> int:
        return 1

    @model_validator(mode="after")
    def _fits_the_data(self) -> Digits:
        if self.num_held_out >= 1797:
            raise UserError(f"num_held_out: {self.num_held_out} leaves none of the 1797 digits: write a smaller number")
        if self.num_classes != 10:
            raise UserError(f"num_classes: {self.num_classes} does not fit the digits: write 10")
        return self


class Pixels(Entry):
    """No autoencoder: latents are the pixels, scaled to [-1, 1]."""

    kind: Literal["pixels"]

    def latent_shape(self, dataset: Dataset) -> tuple[int, int]:
        """Return (channels, size) of the square latents of a dataset's images."""
        return dataset.num_channels, dataset.resolution


class Latents(Entry):
    """A dataset, encoded once by an autoencoder."""

    dataset: str
    autoencoder: str
    shard_size: Count


Dataset = Digits
Autoencoder = Pixels

# --- checkpoints -----------------------------------------------------------------------------------------------------

# fmt: off
SIT_SIZES = {
    "S":  {"depth": 12, "hidden_size":  384, "num_heads":  6},  #  33 M parameters with patch 2
    "B":  {"depth": 12, "hidden_size":  768, "num_heads": 12},  # 131 M
    "L":  {"depth": 24, "hidden_size": 1024, "num_heads": 16},  # 458 M
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},  # 675 M
}
# fmt: on
SIT_SHORTHANDS = {
    f"{size}/{patch_size}": {**numbers, "patch_size": patch_size}
    for size, numbers in SIT_SIZES.items()
    for patch_size in (2, 4, 8)
}


def _offer_size(schema: dict[str, Any]) -> None:
    schema["properties"]["size"] = {"enum": list(SIT_SHORTHANDS)}


class SiT(Entry):
    """A SiT network; `size: XL/2` stands for hidden_size, depth, num_heads and patch_size."""

    model_config = ConfigDict(json_schema_extra=_offer_size)

    family: Literal["sit"]
    hidden_size: Count
    depth: Count
    num_heads: Count
    patch_size: Count
    learn_sigma: Flag
    label_dropout: BelowOne

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "size" not in values:
            return values
        values = dict(values)
        size = values.pop("size")
        if size not in SIT_SHORTHANDS:
            raise UserError(f"size: '{size}' is not known{did_you_mean(size, SIT_SHORTHANDS)}")
        for key, number in SIT_SHORTHANDS[size].items():
            if _from_text(values.setdefault(key, number)) != number:
                raise UserError(f"{key}: {values[key]} contradicts size: {size}: write one of the two")
        return values

    @model_validator(mode="after")
    def _divisible(self) -> SiT:
        for divisor, needed_by in ((self.num_heads, "num_heads"), (4, "its position embedding")):
            if self.hidden_size % divisor:
                raise UserError(f"hidden_size: {self.hidden_size} is not divisible by {needed_by} ({divisor})")
        return self


Model = SiT
Interpolant = Literal["linear", "gvp"]
SLOWED_LAWS = ("mixflow", "matched", "blind")  # the laws whose m differs from the plain t, by gamma


class Train(Entry):
    """Training from scratch, or post-training from another checkpoint."""

    init: str
    latents: str
    model: Model | None = None  # None only before resolution: inherited from init
    interpolant: Interpolant
    law: Literal["uniform", "beta", "mixflow", "matched", "blind", "logit_normal"]
    gamma: Fraction
    shift: Positive
    num_steps: Count
    batch_size: Count
    learning_rate: Positive
    betas: Annotated[tuple[BelowOne, BelowOne], _LIST]
    weight_decay: NonNegative
    warmup_steps: Annotated[int, Field(ge=0), _TEXT]
    gradient_clip: Annotated[float | None, Field(gt=0), _TEXT] = None
    ema_decay: BelowOne
    horizontal_flip: Flag
    precision: Precision
    compile: Flag
    seed: Seed

    @model_validator(mode="after")
    def _law_and_gamma(self) -> Train:
        if self.law in SLOWED_LAWS and self.gamma == 0:
            raise UserError(f"gamma: law '{self.law}' needs a gamma above 0: write one, or take law 'beta' (m = t)")
        if self.law not in SLOWED_LAWS and self.gamma != 0:
            laws = ", ".join(SLOWED_LAWS)
            raise UserError(f"gamma: {self.gamma} has no effect under law '{self.law}': write 0.0, or a law of {laws}")
        return self


class Weights(Entry):
    """A weights file of one's own, or a peer's, under the peer's key names."""

    file: str
    sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None
    latents: str
    model: Model
    interpolant: Interpolant | None = None  # what it was trained with; only SDE samplers ask


class Checkpoint(Entry):
    """Weights: trained here, or taken from a file."""

    train: Train | None = None
    weights: Weights | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Checkpoint:
        if (self.train is None) == (self.weights is None):
            raise UserError("a checkpoint has either 'train' or 'weights': write one of the two")
        return self

    @property
    def origin(self) -> Train | Weights:
        origin = self.train or self.weights
        assert origin is not None
        return origin


# --- samplers --------------------------------------------------------------------------------------------------------


def _number_of_channels(value: Any) -> Any:
    value = _from_text(value)
    if value != "all" and (type(value) is not int or value < 1):
        raise UserError(f"{value!r} is not a number of channels: write a whole number above 0, or all")
    return value


class Guidance(Entry):
    """Classifier-free guidance: null + scale (class - null) on the first `channels`, for t in `interval`."""

    scale: NonNegative
    channels: Annotated[int | Literal["all"], BeforeValidator(_number_of_channels)]
    interval: Annotated[tuple[Fraction, Fraction], _LIST]

    @field_validator("interval")
    @classmethod
    def _ascending(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if interval[0] > interval[1]:
            raise UserError(f"{list(interval)} is in the wrong order: write [{interval[1]}, {interval[0]}]")
        return interval

    def acts_at(self, t: float) -> bool:
        edge = 1e-6  # a rounded time still lies on the edge that it was meant to, as in mixflow.sampling
        return self.scale != 1 and self.interval[0] - edge <= t <= self.interval[1] + edge

    @property
    def description(self) -> str:
        if self.scale == 1:
            return ""
        channels = "" if self.channels == "all" else f" on {self.channels} channels"
        interval = "" if self.interval == (0, 1) else f" for t in [{self.interval[0]:g}, {self.interval[1]:g}]"
        return f", guidance {self.scale:g}{channels}{interval}"


class AnySampler(Entry):
    """What all samplers share."""

    guidance: Guidance
    labels: Literal["balanced", "random"]
    num_images: Annotated[int, Field(ge=2), _TEXT]
    precision: Precision
    seed: Seed

    @property
    def protocol(self) -> str:
        """What a header has no room for, though the numbers depend on it."""
        return f"{self.num_images:,} images, {self.labels} labels, {self.precision}, seed {self.seed}"


class FixedStep(AnySampler):
    """An ODE solver with `num_steps` equal steps."""

    solver: Literal["euler", "heun", "midpoint", "rk4"]
    num_steps: Count

    @property
    def description(self) -> str:
        title = {"euler": "Euler", "heun": "Heun", "midpoint": "midpoint", "rk4": "RK4"}[self.solver]
        return f"{title} {self.num_steps}{self.guidance.description}"

    @property
    def call_times(self) -> list[float] | None:
        """Paper time of each velocity evaluation."""
        stages = {"euler": (0.0,), "heun": (0.0, 1.0), "midpoint": (0.0, 0.5), "rk4": (0.0, 1 / 3, 2 / 3, 1.0)}
        return [(step + stage) / self.num_steps for step in range(self.num_steps) for stage in stages[self.solver]]


class Dopri5(AnySampler):
    """The adaptive Dormand-Prince ODE solver."""

    solver: Literal["dopri5"]
    atol: Positive
    rtol: Positive

    @property
    def description(self) -> str:
        return f"dopri5 ({self.atol:g}, {self.rtol:g}){self.guidance.description}"

    @property
    def call_times(self) -> None:
        return None  # it chooses its steps while it runs


class Diffusion(Entry):
    """The diffusion coefficient w(t) of the SDE, and its factor."""

    form: Literal["sigma", "linear", "decreasing", "constant", "sin2"]
    norm: Positive


class EulerMaruyama(AnySampler):
    """The SDE solver: `num_steps` steps, of which the last has its own size (0: that of the others) and rule."""

    solver: Literal["euler_maruyama"]
    num_steps: Annotated[int, Field(ge=2), _TEXT]
    diffusion: Diffusion
    last_step: Literal["mean", "euler", "tweedie", "none"]
    last_step_size: BelowOne

    @model_validator(mode="after")
    def _no_last_step_has_no_size(self) -> EulerMaruyama:
        if self.last_step == "none" and self.last_step_size != 0:
            raise UserError(f"last_step_size: {self.last_step_size} contradicts last_step: none: write 0.0")
        return self

    @property
    def description(self) -> str:
        return f"SDE {self.num_steps}{self.guidance.description}"

    @property
    def call_times(self) -> list[float] | None:
        """Paper time of each velocity evaluation."""
        if self.last_step_size == 0:
            return [step / self.num_steps for step in range(self.num_steps)]
        return [(1 - self.last_step_size) * step / (self.num_steps - 1) for step in range(self.num_steps)]


Sampler = Annotated[FixedStep | Dopri5 | EulerMaruyama, Field(discriminator="solver")]

# --- evaluation ------------------------------------------------------------------------------------------------------


class Classifier(Entry):
    """A small convolutional classifier that the pipeline trains; its features compare images."""

    kind: Literal["classifier"]
    latents: str
    width: Count
    num_features: Annotated[int, Field(ge=2), _TEXT]
    num_steps: Count
    batch_size: Count
    learning_rate: Positive
    seed: Seed

    @property
    def metrics(self) -> tuple[str, ...]:
        return get_args(CLASSIFIER_METRICS)

    def network(self) -> dict[str, Any]:
        """Return what shapes the features, apart from how the network was trained."""
        return {"kind": self.kind, "width": self.width, "num_features": self.num_features}


Extractor = Classifier


class Reference(Entry):
    """What samples are compared with: a dataset, seen by an extractor."""

    latents: str
    extractor: str


# --- tables ----------------------------------------------------------------------------------------------------------


class Column(Entry):
    """A metric under a sampler; no sampler where all rows are quoted."""

    label: str | None = None
    sampler: str | None = None
    metric: Literal[CLASSIFIER_METRICS, INCEPTION_METRICS]


class Tolerance(Entry):
    """How far from the paper's number still counts as reproduced, as a fraction of it, and why."""

    relative: Positive
    reason: str


class Row(Entry):
    """A checkpoint, or (quoted) numbers of the paper alone."""

    label: str
    checkpoint: str | None = None
    name: str | None = None
    quoted: Flag = False
    paper: Annotated[tuple[Annotated[float | None, Field(allow_inf_nan=False), _TEXT], ...] | None, _LIST] = None
    tolerance: Tolerance | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _measured_or_quoted(self) -> Row:
        if self.quoted and (self.checkpoint is not None or self.name is None or self.paper is None):
            raise UserError(f"the quoted row '{self.label}' needs 'name' and 'paper' and no 'checkpoint': correct it")
        if not self.quoted and self.checkpoint is None:
            raise UserError(f"the row '{self.label}' needs a 'checkpoint': name one, or write quoted: true")
        return self

    @property
    def key(self) -> str:
        """The row's name in paths and on the command line."""
        key = self.name or self.checkpoint
        assert key is not None
        return key


class Table(Entry):
    """Columns (sampler and metric), rows (checkpoints), and what is shown beside them."""

    title: str
    paper: Flag
    columns: Annotated[tuple[Column, ...], Field(min_length=1), _LIST]
    rows: Annotated[tuple[Row, ...], Field(min_length=1), _LIST]
    figures: Annotated[tuple[Literal["samples", "steps", "losses"], ...], _LIST] = ()
    notes: Annotated[tuple[str, ...], _LIST] = ()


# --- the whole -------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A set of samples: who made it, and how."""

    checkpoint: str
    sampler: str


class Config(Entry):
    """A resolved config. Lookups raise `UserError` for names that are not there."""

    image: str
    datasets: dict[Name, Dataset]
    autoencoders: dict[Name, Autoencoder]
    latents: dict[Name, Latents]
    checkpoints: dict[Name, Checkpoint]
    samplers: dict[Name, Sampler]
    extractors: dict[Name, Extractor]
    references: dict[Name, Reference]
    tables: dict[Name, Table]

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

    def reference_of(self, checkpoint: str) -> str:
        """Return the reference that a checkpoint's samples are compared with."""
        return self.dataset_of(self.latents_of(checkpoint)).reference

    def extractor_of(self, checkpoint: str) -> str:
        """Return the extractor that a checkpoint's samples are seen by."""
        return self.get("references", self.reference_of(checkpoint)).extractor

    def cells(self, table: str, row: str | None = None) -> list[Pair]:
        """Return the sample sets that a table, or one row of it, needs: each once, in order."""
        entry = self.get("tables", table)
        rows = entry.rows if row is None else (self.row(table, row),)
        pairs = [Pair(row.checkpoint, column.sampler) for row in rows if row.checkpoint for column in entry.columns]
        return list(dict.fromkeys(pairs))

    def paper_tables(self) -> list[str]:
        """Return the names of the paper's own tables."""
        return [name for name, table in self.tables.items() if table.paper]

    def trained_checkpoints(self) -> list[str]:
        """Return the names of the checkpoints that are trained here."""
        return [name for name, checkpoint in self.checkpoints.items() if checkpoint.train]

    def imported_checkpoints(self) -> list[str]:
        """Return the names of the checkpoints that are taken from files."""
        return [name for name, checkpoint in self.checkpoints.items() if checkpoint.weights]

    def network_options(self, checkpoint: str) -> dict[str, Any]:
        """Return all options of a checkpoint's network, with those that its latents and dataset decide."""
        origin = self.get("checkpoints", checkpoint).origin
        channels, size = self.latent_shape(origin.latents)
        num_classes = self.dataset_of(origin.latents).num_classes
        return {**origin.model.dump(), "input_size": size, "in_channels": channels, "num_classes": num_classes}

    def latent_shape(self, latents: str) -> tuple[int, int]:
        """Return (channels, size) of square latents."""
        return self.autoencoder_of(latents).latent_shape(self.dataset_of(latents))

    def autoencoder_of(self, latents: str) -> Autoencoder:
        """Return the autoencoder behind latents."""
        return self.get("autoencoders", self.get("latents", latents).autoencoder)

    def slice(self, stage: str, *names: str) -> dict[str, Any]:
        """Return the settings of one job as plain JSON-able values, resolved, with nothing that is not its business.

        Stages and names: cache_latents LATENTS, train CHECKPOINT, import_weights CHECKPOINT, sample and evaluate
        CHECKPOINT SAMPLER, train_extractor EXTRACTOR, make_reference REFERENCE, row TABLE ROW, figure TABLE FIGURE,
        render TABLE.
        """
        return _SLICES[stage](self, *names)


# --- slices ----------------------------------------------------------------------------------------------------------


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
    _check_pair(config, Pair(checkpoint, sampler))
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
    _check_pair(config, Pair(checkpoint, sampler))
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


_SLICES: dict[str, Callable[..., dict[str, Any]]] = {
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


# --- loading ---------------------------------------------------------------------------------------------------------


def load_config(*paths: str | os.PathLike[str]) -> Config:
    """Read YAML files, each overlaying the ones before it (mappings deeply, all else replaced), and resolve them.

    Raises `UserError`, one sentence on the first problem found.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _merged(merged, _read_yaml(Path(path)))
    return resolve(merged)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file '{path}' does not exist: correct the path, or go to the project's root") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "it cannot be read"
        raise UserError(f"'{path}'{where} is not valid YAML ({what}): check indentation, colons, brackets") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no sections: it must be a mapping such as config.yaml")
    return content


def resolve(raw: dict[str, Any]) -> Config:
    """Return the typed config behind a merged mapping, such as Snakemake's `config`, with every entry spelled out.

    Numbers may be text, for that is what `--config` makes of them. Raises `UserError`, one sentence on the first
    problem found.
    """
    sections = _expand_sections(raw)
    try:
        config = Config.model_validate(sections)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0], sections)) from None
    _check_references(config)
    config = _inherit_models(config)
    _check_networks(config)
    _check_tables(config)
    return config


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _expand_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """Follow `extends` in every section; a key or entry set to null is taken away."""
    sections = {}
    for section, entries in raw.items():
        if not isinstance(entries, dict):
            sections[section] = entries
            continue
        for name in entries:
            if not isinstance(name, str) or not re.match(NAME_PATTERN, name) or name == SCRATCH:
                raise UserError(
                    f"{section}: the entry name '{name}' cannot be used in paths: take lower-case letters, digits, "
                    "dots, hyphens and underscores, a letter or digit first, and not the word 'scratch'"
                )
        named = {name: entry for name, entry in entries.items() if entry is not None}
        sections[section] = {name: _without_nulls(_extended(section, named, name, ())) for name in named}
    return sections


def _extended(section: str, entries: dict[str, Any], name: str, seen: tuple[str, ...]) -> Any:
    if name in seen:
        raise UserError(f"{section}.{name}.extends: {' -> '.join((*seen, name))} never ends: remove one of them")
    entry = entries[name]
    if not isinstance(entry, dict) or "extends" not in entry:
        return entry
    parent = entry["extends"]
    if parent not in entries:
        raise UserError(
            f"{section}.{name}.extends: '{parent}' is not one of the {section}{did_you_mean(parent, entries)}"
        )
    base = _extended(section, entries, parent, (*seen, name))
    if not isinstance(base, dict):
        raise UserError(f"{section}.{parent}: {base!r} is not a mapping: write keys and values")
    return _merged(base, {key: value for key, value in entry.items() if key != "extends"})


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(part) for key, part in value.items() if part is not None}


# --- sentences -------------------------------------------------------------------------------------------------------


def _sentence(error: Any, sections: dict[str, Any]) -> str:
    """Say what is wrong: section.entry.field, the value, and the fix."""
    where = _where(error["loc"], sections, missing=error["type"] == "missing")
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind.startswith("union_tag"):  # the key that tells the members of a union apart
        where = f"{where}.{context['discriminator'][1:-1]}"
        value = context.get("tag")
    what = _what(kind, value, context, error["msg"])
    names_a_field = kind == "value_error" and re.match("[a-z_]+: ", what)
    return f"{where}{'.' if names_a_field else ': '}{what}" if where else what


def _what(kind: str, value: Any, context: dict[str, Any], message: str) -> str:
    if kind == "value_error":
        return str(context["error"])
    if kind in ("missing", "union_tag_not_found"):
        return "missing, and nothing has a default: add it"
    if kind in ("literal_error", "union_tag_invalid"):
        known = re.findall("'([^']*)'", context.get("expected") or context["expected_tags"])
        return f"{value!r} is not known{did_you_mean(value, known)}"
    if kind in ("float_type", "int_type", "int_from_float"):
        return _not_a_number(value, whole=kind != "float_type")
    if kind == "bool_type":
        return f"{value!r} is neither true nor false: write one of them"
    for name, words in _LIMITS.items():
        if name in context and kind.startswith(("greater", "less")):
            return f"{value} is out of range: it must be {words} {context[name]:g}"
    if kind == "string_type":
        return f"{value!r} is not text: put it in quotes"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{value!r} is not a mapping: write keys and values"
    return f"{value!r} does not fit: {message[0].lower()}{message[1:]}"


_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _not_a_number(value: Any, whole: bool) -> str:
    wanted = "a whole number" if whole else "a number"
    if not isinstance(value, str):
        return f"{value!r} is not {wanted}: write {wanted}"
    match = re.fullmatch(r"([+-]?\d+)(\.\d*)?[eE]([+-]?)(\d+)", value)
    if match is None:
        return f"'{value}' is text where {wanted} is needed: write {wanted}"
    if whole:
        return f"'{value}' is text, YAML reads no exponents here: write {float(value):.0f}"
    digits, decimals, sign, exponent = match.groups()
    lacks = "a dot" if decimals is None else "a sign in the exponent"
    return f"'{value}' is text, YAML needs {lacks}: write {digits}{decimals or '.0'}e{sign or '+'}{exponent}"


def _where(location: tuple[Any, ...], sections: Any, missing: bool) -> str:
    """Return section.entry.field, without the names of union members that pydantic puts between."""
    parts, value = [], sections
    for part in location:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        elif not (missing and part == location[-1]):
            continue
        parts.append(str(part))
    return ".".join(parts)


# --- checks across entries -------------------------------------------------------------------------------------------


def _references(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield (where, name, section) for every mention of an entry by its name."""
    for name, dataset in config.datasets.items():
        yield f"datasets.{name}.reference", dataset.reference, "references"
    for name, latents in config.latents.items():
        yield f"latents.{name}.dataset", latents.dataset, "datasets"
        yield f"latents.{name}.autoencoder", latents.autoencoder, "autoencoders"
    for name, checkpoint in config.checkpoints.items():
        part = "train" if checkpoint.train else "weights"
        yield f"checkpoints.{name}.{part}.latents", checkpoint.origin.latents, "latents"
        if checkpoint.train and checkpoint.train.init != SCRATCH:
            yield f"checkpoints.{name}.train.init", checkpoint.train.init, "checkpoints"
    for name, extractor in config.extractors.items():
        yield f"extractors.{name}.latents", extractor.latents, "latents"
    for name, reference in config.references.items():
        yield f"references.{name}.latents", reference.latents, "latents"
        yield f"references.{name}.extractor", reference.extractor, "extractors"
    for name, table in config.tables.items():
        for index, column in enumerate(table.columns):
            if column.sampler is not None:
                yield f"tables.{name}.columns.{index}.sampler", column.sampler, "samplers"
        for row in table.rows:
            if row.checkpoint is not None:
                yield f"tables.{name}.rows.{row.key}.checkpoint", row.checkpoint, "checkpoints"


def _check_references(config: Config) -> None:
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


def _inherit_models(config: Config) -> Config:
    """Give every checkpoint its model, from the one it starts from where it names none."""
    resolved: dict[str, Checkpoint] = {}

    def model_of(name: str) -> Model:
        checkpoint, parent = config.checkpoints[name], config.parent(name)
        own = checkpoint.origin.model
        if parent is None:
            if own is None:
                raise UserError(f"checkpoints.{name}.train.model: missing, and nothing has a default: add it")
            return own
        inherited = model_of(parent)
        for key, value in (own.dump() if own else {}).items():
            if value != getattr(inherited, key):
                raise UserError(
                    f"checkpoints.{name}.train.model.{key}: {value} differs from the {getattr(inherited, key)} of "
                    f"'{parent}', which it starts from: leave model out to inherit it"
                )
        return inherited

    for name, checkpoint in config.checkpoints.items():
        model = model_of(name)
        train = checkpoint.train and checkpoint.train.model_copy(update={"model": model})
        resolved[name] = checkpoint.model_copy(update={"train": train})
    return config.model_copy(update={"checkpoints": resolved})


def _check_networks(config: Config) -> None:
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


def _check_pair(config: Config, pair: Pair) -> None:
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


def _check_tables(config: Config) -> None:
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
            if row.checkpoint is not None:
                _check_columns(config, where, table, row.checkpoint)


def _check_columns(config: Config, where: str, table: Table, checkpoint: str) -> None:
    extractor = config.extractor_of(checkpoint)
    metrics = config.extractors[extractor].metrics
    for index, column in enumerate(table.columns):
        at = f"{where}.columns.{index}"
        if column.sampler is None:
            raise UserError(f"{at}.sampler: missing, but the row of '{checkpoint}' is to be measured: add it")
        if column.metric not in metrics:
            raise UserError(
                f"{at}.metric: '{column.metric}' cannot be had from the extractor '{extractor}', with which "
                f"'{checkpoint}' is compared{did_you_mean(column.metric, metrics)}"
            )
        _check_pair(config, Pair(checkpoint, column.sampler))


# --- checks of files, before any job starts --------------------------------------------------------------------------


def check_weights_file(config: Config, name: str) -> str:
    """Return the path of a `weights` entry's file, after a check that it exists and fits the entry's model.

    Of a .safetensors file the header alone is read; other formats are checked when imported. Raises `UserError`.
    """
    weights = config.get("checkpoints", name).weights
    assert weights is not None, f"{name} is trained here"
    where = f"checkpoints.{name}.weights"
    path = Path(weights.file)
    if not path.is_file():
        raise UserError(f"{where}.file: '{path}' does not exist: put the weights there, or correct the path")
    if path.suffix == ".safetensors":
        _compare_header(path, where, config.network_options(name))
    return weights.file


def _compare_header(path: Path, where: str, wanted: dict[str, Any]) -> None:
    shapes = {key.removeprefix("module.").removeprefix("_orig_mod."): s for key, s in safetensors_shapes(path).items()}
    found = sit_options_from_shapes(shapes, source=f"{where}.file '{path}'", null_row=wanted["label_dropout"] > 0)
    found |= saved_model_options(path)
    differing = [key for key in wanted if key in found and found[key] != wanted[key]]
    if differing:
        held = ", ".join(f"{key} {found[key]}" for key in differing)
        asked = ", ".join(f"{key} {wanted[key]}" for key in differing)
        raise UserError(f"{where}.file: '{path}' holds a SiT with {held}, the entry says {asked}: correct one of them")


def check_latents(index_path: str | os.PathLike[str]) -> None:
    """Check, where a latent cache was made already, that its shards have the sizes in the index. Raises `UserError`."""
    index_path = Path(index_path)
    if not index_path.exists():
        return
    fix = f"delete '{index_path.parent}' and run the same command again"
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        shards = [shard for split in index["splits"].values() for shard in split["shards"]]
        sizes = [(index_path.parent / shard["file"], int(shard["bytes"])) for shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"'{index_path}' is not the index of a latent cache: {fix}") from None
    for path, wanted in sizes:
        if not path.is_file():
            raise UserError(f"latent shard '{path}' is missing: {fix}")
        if (size := path.stat().st_size) != wanted:
            raise UserError(f"latent shard '{path}' has {size:,} bytes where the index says {wanted:,}: {fix}")


# --- schema ----------------------------------------------------------------------------------------------------------

_SCHEMA_HEADER = """\
# Generated from mixflow/config.py for editors: do not edit, run `python -m mixflow.config --write-schema`.
# Entries may be partial here, for `extends` and overlays complete them; mixflow.config checks the resolved whole.
"""


def schema_text() -> str:
    """Return the JSON schema of config files, as YAML: no required keys, no defaults, no unknown keys."""
    schema = _relaxed(Config.model_json_schema())
    for section in schema["properties"].values():
        if "patternProperties" not in section:
            continue  # a plain value, such as `image`
        entries = next(iter(section["patternProperties"].values()))
        for option in entries.get("anyOf", [entries]):
            entry = schema["$defs"][option["$ref"].rsplit("/", 1)[1]]
            entry["properties"] = {"extends": {"type": "string"}, **entry["properties"]}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return _SCHEMA_HEADER + yaml.safe_dump(schema, sort_keys=False, width=120, allow_unicode=True)


def _relaxed(node: Any, names: bool = False) -> Any:
    """Return a part of the schema without what partial entries cannot meet; `names`: its keys are users' names."""
    if isinstance(node, list):
        return [_relaxed(part) for part in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {key: _relaxed(part) for key, part in node.items()}
    node = {key: part for key, part in node.items() if key not in ("required", "default", "title", "discriminator")}
    if "oneOf" in node:  # without its discriminator a partial entry can fit several members
        node["anyOf"] = node.pop("oneOf")
    if "patternProperties" in node:
        node["additionalProperties"] = False
    mappings = ("properties", "patternProperties", "$defs")
    return {key: _relaxed(part, names=key in mappings) for key, part in node.items()}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-schema"]:
        sys.exit("usage: python -m mixflow.config --write-schema")
    Path(SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
