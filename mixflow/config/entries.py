"""The entries of config.yaml, section by section; those of samplers are next door."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

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
    Sha256,
    from_text,
)
from mixflow.runtime.errors import UserError, did_you_mean

# --- downloads -------------------------------------------------------------------------------------------------------


class Download(Entry):
    """Files that others publish: in a Hugging Face repository, behind an address, or in a folder of this machine.

    A name in `files` may hold * and ? and must then fit exactly one file. Without `sha256` the first download is
    recorded in results/locks/, and later ones must equal it.
    """

    repo: Annotated[str | None, Field(pattern="^[^/]+/[^/]+$")] = None
    revision: str | None = None  # of the repo: a commit, a tag or a branch
    url: Annotated[str | None, Field(pattern="^https?://")] = None
    folder: str | None = None
    files: Annotated[tuple[str, ...], Field(min_length=1), LIST]
    sha256: dict[str, Sha256] | None = None  # file -> its hash

    @property
    def address(self) -> str:
        """Where the files come from, for people."""
        return f"{self.repo or self.url or self.folder} ({', '.join(self.files)})"

    @model_validator(mode="after")
    def _one_source(self) -> Download:
        sources = [name for name in ("repo", "url", "folder") if getattr(self, name) is not None]
        if len(sources) != 1:
            held = " and ".join(sources) or "none of them"
            raise UserError(
                f"a download has one of 'repo', 'url' and 'folder', here {held}: write one, set others null"
            )
        if (self.repo is None) != (self.revision is None):
            raise UserError("revision: goes with 'repo', so that a moving repository is noticed: write both or neither")
        if self.url is not None and len(self.files) != 1:
            raise UserError(f"files: a 'url' is one file, here {len(self.files)}: make an entry for each")
        for name in self.sha256 or ():
            if name not in self.files:
                raise UserError(f"sha256.{name}: is not one of the files{did_you_mean(name, self.files)}")
        return self


class StandIns(Entry):
    """Small random files in the peers' formats, which the pipeline makes itself: the rehearsal has no others.

    Whatever image folder or download lies below `folder` is made, in the sizes that the entries around it ask for.
    """

    folder: str
    seed: Seed


# --- datasets, autoencoders, latents ---------------------------------------------------------------------------------


class Digits(Entry):
    """scikit-learn's handwritten digits."""

    kind: Literal["digits"]
    resolution: Count
    num_classes: Count
    num_held_out: Count
    seed: Seed
    reference: str
    further_references: Annotated[tuple[str, ...], LIST] = ()

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


class ImageNet(Entry):
    """A folder train/<class>/<image>: class ids follow the sorted folder names. Centre-cropped as by ADM."""

    kind: Literal["imagenet"]
    folder: str
    resolution: Count
    num_classes: Count
    num_images: Count  # what must be there
    reference: str
    further_references: Annotated[tuple[str, ...], LIST] = ()  # for metrics of other extractors

    @property
    def num_channels(self) -> int:
        return 3


class Pixels(Entry):
    """No autoencoder: latents are the pixels, scaled to [-1, 1]."""

    kind: Literal["pixels"]

    @property
    def download(self) -> None:
        return None  # there is nothing to load

    def latent_shape(self, dataset: Dataset) -> tuple[int, int]:
        """Return (channels, size) of the square latents of a dataset's images."""
        return dataset.num_channels, dataset.resolution


class SDVAE(Entry):
    """Stable Diffusion's autoencoder (diffusers' AutoencoderKL): 4 channels, 8 times smaller."""

    kind: Literal["sd_vae"]
    download: str  # config.json and diffusion_pytorch_model.safetensors
    channels: Count
    downsampling: Count
    scale: Positive  # latents are the posterior's values times this
    precision: Literal["fp32", "bf16"]

    def latent_shape(self, dataset: Dataset) -> tuple[int, int]:
        """Return (channels, size) of the square latents of a dataset's images."""
        return self.channels, dataset.resolution // self.downsampling


class Latents(Entry):
    """A dataset, encoded once by an autoencoder."""

    dataset: str
    autoencoder: str
    shard_size: Count


Dataset = Annotated[Digits | ImageNet, Field(discriminator="kind")]
Autoencoder = Annotated[Pixels | SDVAE, Field(discriminator="kind")]

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


class Backbone(Entry):
    """What SiT and REPA share; `size: XL/2` stands for hidden_size, depth, num_heads and patch_size."""

    model_config = ConfigDict(json_schema_extra=_offer_size)

    hidden_size: Count
    depth: Count
    num_heads: Count
    patch_size: Count
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
    def _divisible(self) -> Self:
        for divisor, needed_by in ((self.num_heads, "num_heads"), (4, "its position embedding")):
            if self.hidden_size % divisor:
                raise UserError(f"hidden_size: {self.hidden_size} is not divisible by {needed_by} ({divisor})")
        return self


class SiT(Backbone):
    """A SiT network (arXiv 2401.08740)."""

    family: Literal["sit"]
    learn_sigma: Flag


class REPA(Backbone):
    """A SiT with projectors on the output of one block (arXiv 2410.06940)."""

    family: Literal["repa"]
    encoder_depth: Count  # the block whose output is aligned, counted from 1
    z_dims: Annotated[tuple[Count, ...], Field(min_length=1), LIST]  # widths of the encoders' features
    projector_dim: Count
    qk_norm: Flag

    @model_validator(mode="after")
    def _aligned_block(self) -> REPA:
        if self.encoder_depth > self.depth:
            raise UserError(f"encoder_depth: {self.encoder_depth} is beyond the {self.depth} blocks: lower it")
        return self


Model = Annotated[SiT | REPA, Field(discriminator="family")]
Interpolant = Literal["linear", "gvp"]
SLOWED_LAWS = ("mixflow", "matched", "blind", "uniform_slowed")  # the laws whose m differs from the plain t, by gamma


class Align(Entry):
    """REPA's alignment: the network's projections follow an image encoder's patch features."""

    encoder: str
    images: str  # latents of the same dataset that hold its pixels
    coefficient: Positive


class Encoder(Entry):
    """An image encoder whose patch features REPA aligns with: a DINOv2 in timm's or Meta's file format."""

    kind: Literal["dinov2"]
    download: str
    num_features: Count


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
    gradient_clip: Annotated[float | None, Field(gt=0), TEXT] = None
    ema_decay: BelowOne
    horizontal_flip: Flag
    precision: Precision
    compile: Flag
    align: Align | None = None
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
