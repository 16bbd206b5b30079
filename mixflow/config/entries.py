"""The entries of checkpoints, of what evaluates their samples, and of tables."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from mixflow.config import costs
from mixflow.config.networks import GaussianField, MixtureField, Model
from mixflow.config.sources import Dataset, Spectrum, Spiked
from mixflow.config.values import (
    LIST,
    TEXT,
    BelowOne,
    Count,
    Entry,
    Flag,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Precision,
    Seed,
    Sha256,
)
from mixflow.runtime.errors import UserError

# --- checkpoints -----------------------------------------------------------------------------------------------------

Interpolant = Literal["linear", "gvp"]
TimeLaw = Literal[
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
SLOWED_LAWS = ("mixflow", "matched", "blind", "uniform_slowed")  # the laws whose m differs from the plain t, by gamma
TOLD_LAWS = ("uniform", "logit_normal", "beta", "matched")  # the laws that tell the network where its input lies


def _check_law_and_gamma(law: str, gamma: float) -> None:
    if law in SLOWED_LAWS and gamma == 0:
        raise UserError(f"gamma: law '{law}' needs a gamma above 0: write one, or take law 'beta' (m = t)")
    if law not in SLOWED_LAWS and gamma != 0:
        laws = ", ".join(SLOWED_LAWS)
        raise UserError(f"gamma: {gamma} has no effect under law '{law}': write 0.0, or a law of {laws}")


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


class SelfRollout(Entry):
    """One step of the network itself, from which it learns to get to the data: see mixflow.flow.self_rollout_loss."""

    step_size: Annotated[float, Field(gt=0, le=1), TEXT]  # before the shift
    weight: NonNegative  # of its loss beside the plain one, whose weight is 1, in the mean of both; 0 is none
    min_remaining: Positive  # smallest 1 - t that its target divides by


class EndpointTarget(Entry):
    """The target leads from the input to the data, whatever the label says: see mixflow.flow.endpoint_target."""

    min_remaining: Positive  # smallest 1 - t that it divides by


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
    law: TimeLaw
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
    input_perturbation: NonNegative | None = None  # of the input's noise, in standard deviations; 0 is none
    self_rollout: SelfRollout | None = None
    endpoint_target: EndpointTarget | None = None
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
        _check_law_and_gamma(self.law, self.gamma)
        return self

    @model_validator(mode="after")
    def _arm(self) -> Train:
        for key in ("self_rollout", "endpoint_target"):
            if getattr(self, key) is not None and self.interpolant != "linear":
                raise UserError(
                    f"{key}: its target is a straight line to the data, which interpolant '{self.interpolant}' does "
                    "not follow: write linear, or leave it out"
                )
        if self.endpoint_target is not None and self.law in TOLD_LAWS:
            others = ", ".join(law for law in SLOWED_LAWS if law not in TOLD_LAWS)
            raise UserError(
                f"endpoint_target: under law '{self.law}' the input lies where the label says, so that it is the plain "
                f"target: leave it out, or take a law of {others}"
            )
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


class Exact(Entry):
    """A velocity field that needs no training, for it is known: of a Gaussian, or of a kernel density estimate.

    The Gaussian is that of the dataset where it is of kind gaussian, else it has the training latents' mean and
    covariance; the estimate puts a round Gaussian on each of them. Under a law of times other than uniform it is the
    optimum of training under that law.
    """

    latents: str
    interpolant: Literal["linear"]
    kind: Literal["gaussian", "kde"]
    bandwidth: Annotated[float | None, Field(ge=0, allow_inf_nan=False), TEXT] = None  # standard deviation of a kernel
    law: TimeLaw
    gamma: Fraction

    @model_validator(mode="after")
    def _fits_itself(self) -> Exact:
        if (self.kind == "kde") != (self.bandwidth is not None):
            raise UserError(
                "bandwidth: goes with kind kde alone, and is needed there: write the standard deviation of a kernel"
                if self.kind == "kde"
                else "bandwidth: a field of kind gaussian has none: leave it out, or write kind: kde"
            )
        _check_law_and_gamma(self.law, self.gamma)
        return self

    @property
    def model(self) -> None:
        return None  # `field` knows it

    def field(self, dataset: Dataset) -> GaussianField | MixtureField:
        """Return what network it is on latents of this dataset."""
        if self.kind == "kde":
            count = dataset.num_training_images
            return MixtureField(family="mixture", num_components=count, law=self.law, gamma=self.gamma)
        axes = dataset.kind == "gaussian"
        return GaussianField(family="gaussian", axes=axes, law=self.law, gamma=self.gamma)


class Checkpoint(Entry):
    """Weights: trained here, or taken from a file; or an exact velocity field."""

    train: Train | None = None
    weights: Weights | None = None
    exact: Exact | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Checkpoint:
        if sum(origin is not None for origin in (self.train, self.weights, self.exact)) != 1:
            raise UserError("a checkpoint has either 'train', 'weights' or 'exact': write one of them")
        return self

    @property
    def origin(self) -> Train | Weights | Exact:
        origin = self.train or self.weights or self.exact
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


# --- Slow Flow -------------------------------------------------------------------------------------------------------


class Clock(Entry):
    """A small network that reads the time off states, trained on true interpolants of the latents it is named after."""

    interpolant: Interpolant
    width: Count  # channels of its three convolutions
    num_steps: Count
    batch_size: Count
    learning_rate: Positive  # falls linearly to 0
    precision: Precision
    seed: Seed

    def flops(self, channels: int, size: int) -> int:
        """Return the FLOPs of a forward pass on latents [channels, size, size]."""
        half, quarter = (size + 1) // 2, (size + 3) // 4
        convolutions = costs.linear(size**2, 9 * channels, self.width) + sum(
            costs.linear(side**2, 9 * self.width, self.width) for side in (half, quarter)
        )
        return convolutions + costs.linear(1, 6 * self.width, 2 * self.width) + costs.linear(1, 2 * self.width, 1)


class SlowFlow(Entry):
    """How far generated states lag behind their time is measured so: docs/slow-flow.md."""

    start: Annotated[float, Field(gt=0, lt=1), TEXT]  # of the reading whose trajectories start on real interpolants
    fit_images: Annotated[int, Field(ge=2), TEXT]  # whose mean and covariance the nulls and clocks have; all if fewer
    max_axes: Count  # latents of more numbers are looked at in so many of their coordinates, not on principal axes


class Arm(Entry):
    """A checkpoint in a figure."""

    checkpoint: str
    label: str


class Borders(Entry):
    """Borders of Slow Flow that were read from a picture."""

    upper: Annotated[tuple[Fraction, ...], LIST]
    lower: Annotated[tuple[Fraction, ...], LIST]


class PaperBorders(Entry):
    """The paper's own borders, at `times`."""

    origin: str
    times: Annotated[tuple[Fraction, ...], Field(min_length=1), LIST]
    borders: dict[str, Borders]  # by checkpoint

    @model_validator(mode="after")
    def _as_many(self) -> PaperBorders:
        for name, borders in self.borders.items():
            for side in ("upper", "lower"):
                if len(getattr(borders, side)) != len(self.times):
                    found = len(getattr(borders, side))
                    raise UserError(f"borders.{name}.{side}: {found} numbers for {len(self.times)} times: correct one")
        return self


class SlowFlowFigure(Entry):
    """Slow Flow of several checkpoints under one sampler, side by side."""

    title: str
    sampler: str
    arms: Annotated[tuple[Arm, ...], Field(min_length=1), LIST]
    paper: PaperBorders | None = None


# --- theory ----------------------------------------------------------------------------------------------------------


class Held(Entry):
    """What is held fixed where a figure's axis is something else."""

    dimension: Count
    gammas: Annotated[tuple[Fraction, ...], Field(min_length=1), LIST]  # a line for each; 0 is the exact field
    steps: Count


class Theory(Entry):
    """What is predicted for networks without any error of learning, on Gaussian data: docs/theory.md."""

    spectra: Annotated[dict[Name, Spectrum], Field(min_length=1)]
    dimensions: Annotated[tuple[Count, ...], Field(min_length=1), LIST]
    gammas: Annotated[tuple[Fraction, ...], Field(min_length=1), LIST]
    steps: Annotated[tuple[Count, ...], Field(min_length=1), LIST]
    held: Held
    numbers: Count  # drawn for each point that has no closed form: as many samples as they make
    seed: Seed

    @model_validator(mode="after")
    def _spikes_fit(self) -> Theory:
        smallest = min((*self.dimensions, self.held.dimension))
        for name, spectrum in self.spectra.items():
            if isinstance(spectrum, Spiked) and spectrum.num_spikes > smallest:
                raise UserError(
                    f"spectra.{name}.num_spikes: {spectrum.num_spikes} is more than the {smallest} dimensions of the "
                    "smallest case: lower it"
                )
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
    # The row of the same table that is this one's control, or several.
    against: str | Annotated[tuple[str, ...], Field(min_length=1), LIST] | None = None
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

    @property
    def controls(self) -> tuple[str, ...]:
        """The rows that this one is compared with."""
        return (self.against,) if isinstance(self.against, str) else self.against or ()

    def sampler_of(self, column: Column) -> str:
        """Return the sampler of this row's cell in a column."""
        assert column.sampler is not None, "only quoted rows do without samplers"
        return (self.samplers or {}).get(column.sampler, column.sampler)


class Replicates(Entry):
    """Seeds of training and of sampling: the i-th of both make the i-th replicate of every row, paired across rows."""

    training: Annotated[tuple[Seed, ...], Field(min_length=1), LIST]
    sampling: Annotated[tuple[Seed, ...], Field(min_length=1), LIST]

    @model_validator(mode="after")
    def _pairs(self) -> Replicates:
        if len(self.training) != len(self.sampling):
            raise UserError(
                f"training: {len(self.training)} seeds for {len(self.sampling)} of sampling, but each training is "
                "sampled once: write as many of both"
            )
        for kind, seeds in (("training", self.training), ("sampling", self.sampling)):
            if len(set(seeds)) < len(seeds):
                raise UserError(f"{kind}: {list(seeds)} holds a seed twice, which is no replicate: write others")
        return self


class Table(Entry):
    """Columns (sampler and metric), rows (checkpoints), and what is shown beside them."""

    title: str
    paper: Flag
    columns: Annotated[tuple[Column, ...], Field(min_length=1), LIST]
    rows: Annotated[tuple[Row, ...], Field(min_length=1), LIST]
    replicates: Replicates | None = None
    figures: Annotated[tuple[Literal["samples", "steps", "losses", "gamma", "variance"], ...], LIST] = ()
    notes: Annotated[tuple[str, ...], LIST] = ()


class Answer(Entry):
    """A question that one comparison of a table answers: a row against a control of its own, in one column."""

    asks: str
    table: str
    row: str
    against: str | None = None  # of several controls; the first where it is left out
    sampler: str  # of the column, whatever the row takes in its place
    metric: Literal[CLASSIFIER_METRICS, INCEPTION_METRICS, DINOV2_METRICS]


class Report(Entry):
    """The page that says what was asked and found, from the tables that there are."""

    title: str
    question: Annotated[tuple[str, ...], LIST]  # paragraphs: what is asked, and why
    made: Annotated[tuple[str, ...], LIST]  # tables that `snakemake report` makes first
    shown: Annotated[tuple[str, ...], LIST]  # tables that stand behind them as far as they are measured
    answers: Annotated[tuple[Answer, ...], LIST] = ()
    slow_flow: Annotated[tuple[str, ...], LIST] = ()  # figures of Slow Flow, as far as they are drawn

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables of the page, in order."""
        return (*self.made, *self.shown)


class Pair(NamedTuple):
    """A set of samples: who made it, and how."""

    checkpoint: str
    sampler: str
