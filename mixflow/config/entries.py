"""The entries of checkpoints, of what evaluates their samples, and of tables."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from mixflow.config import costs
from mixflow.config.networks import Model
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
    Sha256,
)
from mixflow.runtime.errors import UserError

# --- checkpoints -----------------------------------------------------------------------------------------------------

Interpolant = Literal["linear", "gvp"]
SLOWED_LAWS = ("mixflow", "matched", "blind", "uniform_slowed")  # the laws whose m differs from the plain t, by gamma


class Align(Entry):
    """REPA's alignment: the network's projections follow an image encoder's patch features."""

    encoder: str
    images: str  # latents of the same dataset that hold its pixels
    coefficient: Positive


class Decay(Entry):
    """The learning rate falls linearly between two steps, to the one given here; constant before and after."""

    start_step: Annotated[int, Field(ge=0), TEXT]
    end_step: Count
    learning_rate: NonNegative

    @model_validator(mode="after")
    def _ascending(self) -> Decay:
        if self.start_step >= self.end_step:
            raise UserError(f"start_step: {self.start_step} is not before end_step {self.end_step}: lower it")
        return self


class Encoder(Entry):
    """An image encoder whose patch features REPA aligns with: a DINOv2 in timm's or Meta's file format."""

    kind: Literal["dinov2"]
    download: str
    num_features: Count

    def flops(self, patches: int) -> int:
        """Return the FLOPs of a forward pass on an image of so many patches."""
        return costs.dinov2(self.num_features, patches)


class Train(Entry):
    """Training from scratch, or post-training from another checkpoint."""

    init: str
    latents: str
    model: Model | None = None  # None only before resolution: inherited from init
    interpolant: Interpolant
    law: Literal[
        "uniform",
        "logit_normal",
        "beta",
        "mixflow",
        "matched",
        "blind",
        "uniform_slowed",
        "uniform_any",
        "beta_any",
    ]
    gamma: Fraction
    shift: Positive
    num_steps: Count
    batch_size: Count
    learning_rate: Positive
    betas: Annotated[tuple[BelowOne, BelowOne], LIST]
    weight_decay: NonNegative
    warmup_steps: Annotated[int, Field(ge=0), TEXT]
    decay: Decay | None = None
    gradient_clip: Annotated[float | None, Field(gt=0), TEXT] = None
    ema_decay: BelowOne
    horizontal_flip: Flag
    precision: Precision
    compile: Flag
    align: Align | None = None
    seed: Seed

    @model_validator(mode="before")
    @classmethod
    def _one_law(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        law, peers = values.get("law"), values.get("time_dist_type")
        if peers is not None:
            raise UserError(
                f"time_dist_type: '{peers}' is how RAE's files name the law of t, which is 'law' here: write law: "
                "mixflow, whose Beta(2,1) takes its place, or law: logit_normal for RAE's own training"
            )
        named = set(re.findall("[a-z_]+", str(law)))
        if (law is not None and not isinstance(law, str)) or {"mixflow", "logit_normal"} <= named:
            raise UserError(
                f"law: {law!r} is not one law: mixflow draws t ~ Beta(2,1) in the place of logit_normal or any other, "
                "and slows m on top: write one of them"
            )
        return values

    @model_validator(mode="after")
    def _law_and_gamma(self) -> Train:
        if self.law in SLOWED_LAWS and self.gamma == 0:
            raise UserError(f"gamma: law '{self.law}' needs a gamma above 0: write one, or take law 'beta' (m = t)")
        if self.law not in SLOWED_LAWS and self.gamma != 0:
            laws = ", ".join(SLOWED_LAWS)
            raise UserError(f"gamma: {self.gamma} has no effect under law '{self.law}': write 0.0, or a law of {laws}")
        return self


class Weights(Entry):
    """A weights file of one's own, or a published one, under the peer's key names."""

    file: str | None = None
    sha256: Sha256 | None = None
    download: str | None = None  # an entry of one file, which holds its own sha256
    latents: str
    model: Model
    interpolant: Interpolant | None = None  # what it was trained with; only SDE samplers ask

    @model_validator(mode="after")
    def _one_file(self) -> Weights:
        if (self.file is None) == (self.download is None):
            raise UserError("weights have either 'file' or 'download': write one of the two")
        if self.download is not None and self.sha256 is not None:
            raise UserError("sha256: stands in the entry of the download: move it there")
        return self


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
INCEPTION_METRICS = Literal[
    "fid", "sfid", "is", "precision", "recall", "precision_exact", "recall_exact", "kid", "density", "coverage"
]
DINOV2_METRICS = Literal["fd_dinov2"]


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
    def download(self) -> None:
        return None  # it is trained here

    @property
    def metrics(self) -> tuple[str, ...]:
        return get_args(CLASSIFIER_METRICS)

    def network(self) -> dict[str, Any]:
        """Return what shapes the features, apart from how the network was trained."""
        return {"kind": self.kind, "width": self.width, "num_features": self.num_features}

    def flops(self, channels: int, resolution: int) -> int:
        """Return the FLOPs of a forward pass on an image, without the few of its head."""
        widths, total = (channels, (self.width + 1) // 2, self.width, 2 * self.width), 0
        for inputs, outputs in pairwise(widths):
            resolution = (resolution + 1) // 2
            total += costs.linear(resolution**2, 9 * inputs, outputs)
        return total + costs.linear(1, 2 * self.width, self.num_features)


class Inception(Entry):
    """The Inception network of 2015-12-05, as in OpenAI's ADM evaluator; the file is torch-fidelity's."""

    kind: Literal["inception"]
    download: str
    tf32: Flag  # on a GPU; TensorFlow's default on recent ones, faster, and off by an amount that nobody published

    @property
    def metrics(self) -> tuple[str, ...]:
        return get_args(INCEPTION_METRICS)

    def network(self) -> dict[str, Any]:
        """Return what shapes the features."""
        return {"kind": self.kind, "tf32": self.tf32}

    def flops(self, channels: int, resolution: int) -> int:
        """Return the FLOPs of a forward pass on an image."""
        return costs.INCEPTION_FLOPS

    def num_parameters(self) -> int:
        """Return how many numbers its file holds."""
        return costs.INCEPTION_PARAMETERS


class DINOv2(Entry):
    """The class token of a DINOv2 without registers, on images of 224 pixels: ViT-L/14 for FD-DINOv2."""

    kind: Literal["dinov2"]
    download: str
    num_features: Count

    @property
    def metrics(self) -> tuple[str, ...]:
        return get_args(DINOV2_METRICS)

    def network(self) -> dict[str, Any]:
        """Return what shapes the features."""
        return {"kind": self.kind}

    def flops(self, channels: int, resolution: int) -> int:
        """Return the FLOPs of a forward pass on an image."""
        return costs.dinov2(self.num_features, (224 // costs.DINOV2_PATCH) ** 2)

    def num_parameters(self) -> int:
        """Return how many numbers its file holds."""
        return costs.dinov2_parameters(self.num_features)


Extractor = Annotated[Classifier | Inception | DINOv2, Field(discriminator="kind")]


class Reference(Entry):
    """What samples are compared with, seen by an extractor: a dataset, or a published file of statistics and images."""

    latents: str | None = None
    # ADM's reference .npz (arr_0, mu, sigma, mu_s, sigma_s), EDM2's .pkl, or what `evaluate --make-reference` wrote.
    download: str | None = None
    extractor: str

    @model_validator(mode="after")
    def _one_source(self) -> Reference:
        if (self.latents is None) == (self.download is None):
            raise UserError("a reference has either 'latents' or 'download': write one of the two")
        return self


# --- tables ----------------------------------------------------------------------------------------------------------


class Column(Entry):
    """A metric under a sampler; no sampler where all rows are quoted."""

    label: str | None = None
    sampler: str | None = None
    metric: Literal[CLASSIFIER_METRICS, INCEPTION_METRICS, DINOV2_METRICS]


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
    paper_labels: Literal["balanced", "random"] | None = None  # of the samples behind the paper's numbers, where known
    samplers: dict[str, str] | None = None  # sampler of a column -> the one that this row takes in its place
    against: str | None = None  # the row of the same table that is this one's control
    note: str | None = None

    @model_validator(mode="after")
    def _measured_or_quoted(self) -> Row:
        if self.quoted and (self.checkpoint is not None or self.name is None or self.paper is None):
            raise UserError(f"the quoted row '{self.label}' needs 'name' and 'paper' and no 'checkpoint': correct it")
        if not self.quoted and self.checkpoint is None:
            raise UserError(f"the row '{self.label}' needs a 'checkpoint': name one, or write quoted: true")
        if self.paper_labels is not None and self.paper is None:
            raise UserError(f"paper_labels: the row '{self.label}' has no numbers of the paper: leave it out")
        return self

    @property
    def key(self) -> str:
        """The row's name in paths and on the command line."""
        key = self.name or self.checkpoint
        assert key is not None
        return key

    def sampler_of(self, column: Column) -> str:
        """Return the sampler of this row's cell in a column."""
        assert column.sampler is not None, "only quoted rows do without samplers"
        return (self.samplers or {}).get(column.sampler, column.sampler)


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
