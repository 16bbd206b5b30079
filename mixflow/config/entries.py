"""The entries of config.yaml, section by section; those of samplers are next door."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import ConfigDict, Field, model_validator

from mixflow.config.values import (
    LIST,
    TEXT,
    BelowOne,
    Count,
    Entry,
    Flag,
    Fraction,
    NonNegative,
    Positive,
    Precision,
    Seed,
    from_text,
)
from mixflow.runtime.errors import UserError, did_you_mean

# --- datasets, autoencoders, latents ---------------------------------------------------------------------------------
# A later kind is one more class, joined as in samplers.Sampler: Annotated[A | B, Field(discriminator="kind")].


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
            if from_text(values.setdefault(key, number)) != number:
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
    betas: Annotated[tuple[BelowOne, BelowOne], LIST]
    weight_decay: NonNegative
    warmup_steps: Annotated[int, Field(ge=0), TEXT]
    gradient_clip: Annotated[float | None, Field(gt=0), TEXT] = None
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


# --- evaluation ------------------------------------------------------------------------------------------------------

CLASSIFIER_METRICS = Literal["fd", "fd_held_out", "accuracy", "variance_ratio", "nearest_train", "nearest_held_out"]
INCEPTION_METRICS = Literal["fid", "sfid", "is", "precision", "recall"]


class Classifier(Entry):
    """A small convolutional classifier that the pipeline trains; its features compare images."""

    kind: Literal["classifier"]
    latents: str
    width: Count
    num_features: Annotated[int, Field(ge=2), TEXT]
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
    paper: Annotated[tuple[Annotated[float | None, Field(allow_inf_nan=False), TEXT], ...] | None, LIST] = None
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
    columns: Annotated[tuple[Column, ...], Field(min_length=1), LIST]
    rows: Annotated[tuple[Row, ...], Field(min_length=1), LIST]
    figures: Annotated[tuple[Literal["samples", "steps", "losses"], ...], LIST] = ()
    notes: Annotated[tuple[str, ...], LIST] = ()


class Pair(NamedTuple):
    """A set of samples: who made it, and how."""

    checkpoint: str
    sampler: str
