"""Where images come from and how they are encoded: the entries of downloads, datasets, autoencoders and latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from mixflow.config import costs
from mixflow.config.values import LIST, Count, Entry, Flag, NonNegative, Positive, Seed, Sha256
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


Use = Literal["encode", "latents", "decode"]  # pixels -> stored; stored -> latents; latents -> pixels
HALF_PRECISION, FULL_PRECISION = 2, 4  # bytes
NUM_REGISTERS = 4
NUM_DIGITS = 1797

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

    @property
    def num_images(self) -> int:
        return NUM_DIGITS

    @property
    def num_training_images(self) -> int:
        return NUM_DIGITS - self.num_held_out

    @property
    def references(self) -> tuple[str, ...]:
        return (self.reference, *self.further_references)

    @model_validator(mode="after")
    def _fits_the_data(self) -> Digits:
        if self.num_held_out >= NUM_DIGITS:
            raise UserError(
                f"num_held_out: {self.num_held_out} leaves none of the {NUM_DIGITS} digits: write a smaller number"
            )
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

    @property
    def num_training_images(self) -> int:
        return self.num_images

    @property
    def references(self) -> tuple[str, ...]:
        return (self.reference, *self.further_references)


class Flat(Entry):
    """The same variance along every direction."""

    kind: Literal["flat"]
    variance: NonNegative

    def variances(self, size: int) -> list[float]:
        """Return the variances of `size` directions, the largest first."""
        return [self.variance] * size


class Spiked(Entry):
    """A few directions of one variance among many of another, which may be 0: data on a plane in many dimensions."""

    kind: Literal["spiked"]
    num_spikes: Count
    spike: Positive  # variance
    rest: NonNegative  # variance

    def variances(self, size: int) -> list[float]:
        """Return the variances of `size` directions, the largest first."""
        return [self.spike] * self.num_spikes + [self.rest] * (size - self.num_spikes)


class PowerLaw(Entry):
    """The i-th variance is in proportion to i^-exponent, as those of natural images about are."""

    kind: Literal["power_law"]
    exponent: Positive
    mean: Positive  # of the variances

    def variances(self, size: int) -> list[float]:
        """Return the variances of `size` directions, the largest first."""
        powers = [number**-self.exponent for number in range(1, size + 1)]
        return [self.mean * size * power / sum(powers) for power in powers]


Spectrum = Annotated[Flat | Spiked | PowerLaw, Field(discriminator="kind")]
_SPECTRUM: TypeAdapter[Flat | Spiked | PowerLaw] = TypeAdapter(Spectrum)


def spectrum_variances(spectrum: Mapping[str, Any], size: int) -> list[float]:
    """Return the variance of each of `size` coordinates, from a spectrum as slices hold it."""
    return _SPECTRUM.validate_python(dict(spectrum)).variances(size)


class Gaussian(Entry):
    """Draws [channels, resolution, resolution] of a Gaussian with mean 0 whose principal axes are its coordinates.

    They are no images, and have no reference: what is known of them is exact.
    """

    kind: Literal["gaussian"]
    channels: Count
    resolution: Count
    num_classes: Count
    num_images: Count
    spectrum: Spectrum
    seed: Seed

    @property
    def num_channels(self) -> int:
        return self.channels

    @property
    def num_training_images(self) -> int:
        return self.num_images

    @property
    def references(self) -> tuple[str, ...]:
        return ()

    @model_validator(mode="after")
    def _fits_itself(self) -> Gaussian:
        if self.num_classes != 1:
            raise UserError(f"num_classes: {self.num_classes}, but draws of one Gaussian are of one class: write 1")
        size = self.channels * self.resolution**2
        if isinstance(self.spectrum, Spiked) and self.spectrum.num_spikes > size:
            raise UserError(
                f"spectrum.num_spikes: {self.spectrum.num_spikes} is more than the {size} dimensions: lower it"
            )
        return self


class NoAutoencoder(Entry):
    """Latents are what the dataset holds."""

    def files_for(self, *uses: Use) -> dict[str, str]:
        """Return the downloads that these uses need, by role: none."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return what decides the latents, apart from the files."""
        return self.dump()

    def latent_shape(self, dataset: Dataset) -> tuple[int, int]:
        """Return (channels, size) of the square latents of a dataset."""
        return dataset.num_channels, dataset.resolution

    def flops(self, use: Use, dataset: Dataset) -> int:
        """Return the FLOPs of this use on an image: none."""
        return 0

    def file_bytes(self, role: str, dataset: Dataset) -> int:
        """Return the size of one of its files: there are none."""
        return 0


class Pixels(NoAutoencoder):
    """No autoencoder: latents are the pixels, scaled to [-1, 1]."""

    kind: Literal["pixels"]

    def bytes_per_image(self, dataset: Dataset, mirrors: bool | None) -> int:
        """Return what a cache keeps of an image: its pixels."""
        return dataset.num_channels * dataset.resolution**2


class Identity(NoAutoencoder):
    """No autoencoder, for datasets of numbers that are no pixels: latents are what is drawn."""

    kind: Literal["identity"]

    def bytes_per_image(self, dataset: Dataset, mirrors: bool | None) -> int:
        """Return what a cache keeps of a draw: its numbers, in single precision."""
        return FULL_PRECISION * dataset.num_channels * dataset.resolution**2


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

    def files_for(self, *uses: Use) -> dict[str, str]:
        """Return the downloads that these uses need, by role."""
        return {"network": self.download} if {"encode", "decode"} & set(uses) else {}

    def settings(self) -> dict[str, Any]:
        """Return what decides the latents, apart from the files."""
        return self.dump("download")

    def bytes_per_image(self, dataset: Dataset, mirrors: bool | None) -> int:
        """Return what a cache keeps of an image: mean and log-variance of both mirror images, in half precision."""
        return 2 * 2 * self.channels * self.latent_shape(dataset)[1] ** 2 * HALF_PRECISION

    def flops(self, use: Use, dataset: Dataset) -> int:
        """Return the FLOPs of this use on an image (to encode: on it or its mirror image), for the released sizes."""
        pixels, latents = dataset.resolution**2, self.latent_shape(dataset)[1] ** 2
        if use == "encode":
            return costs.sd_vae_encoder(pixels, latents)
        return costs.sd_vae_decoder(pixels, latents) if use == "decode" else 0

    def file_bytes(self, role: str, dataset: Dataset) -> int:
        """Return about how large the released file is."""
        return FULL_PRECISION * costs.SD_VAE_PARAMETERS


class RAE(Entry):
    """A representation autoencoder (arXiv 2510.11690): an image encoder's tokens, and a decoder for them.

    Its files are an encoder of transformers (config.json, model.safetensors), RAE's decoder (model.pt), and the mean
    and variance of the tokens (stat.pt). Images are resized to `encoder_size` pixels first.
    """

    kind: Literal["rae"]
    encoder_kind: Literal["dinov2_with_registers", "vit_mae", "siglip"]  # the model_type in the encoder's config.json
    encoder: str
    decoder: str
    statistics: str
    encoder_size: Count
    encoder_patch: Count  # pixels
    decoder_heads: Count
    channels: Count
    downsampling: Count
    precision: Literal["fp32", "bf16"]

    @model_validator(mode="after")
    def _whole_patches(self) -> RAE:
        if self.encoder_size % self.encoder_patch:
            raise UserError(
                f"encoder_size: {self.encoder_size} is no multiple of encoder_patch {self.encoder_patch}: RAE "
                "takes 224 pixels for images of 256, 448 for 512"
            )
        return self

    def files_for(self, *uses: Use) -> dict[str, str]:
        """Return the downloads that these uses need, by role."""
        roles = {"encode": ("encoder",), "latents": ("statistics",), "decode": ("decoder", "statistics")}
        needed = dict.fromkeys(role for use in uses for role in roles[use])
        return {role: getattr(self, role) for role in needed}

    def settings(self) -> dict[str, Any]:
        """Return what decides the latents, apart from the files."""
        return self.dump("encoder", "decoder", "statistics")

    def latent_shape(self, dataset: Dataset) -> tuple[int, int]:
        """Return (channels, size) of the square latents of a dataset's images."""
        return self.channels, dataset.resolution // self.downsampling

    def bytes_per_image(self, dataset: Dataset, mirrors: bool | None) -> int:
        """Return what a cache keeps of an image: its tokens, perhaps those of the mirror image too."""
        return (2 if mirrors else 1) * self.channels * self.latent_shape(dataset)[1] ** 2 * HALF_PRECISION

    def flops(self, use: Use, dataset: Dataset) -> int:
        """Return the FLOPs of this use on an image, for DINOv2 with registers and RAE's ViT-XL decoder."""
        tokens = self.latent_shape(dataset)[1] ** 2
        if use == "encode":
            return costs.dinov2(self.channels, tokens, prefix=1 + NUM_REGISTERS, patch=self.encoder_patch)
        return costs.rae_decoder(self.channels, tokens) if use == "decode" else 0

    def file_bytes(self, role: str, dataset: Dataset) -> int:
        """Return about how large the released file of a role is."""
        tokens = self.latent_shape(dataset)[1] ** 2
        numbers = {
            "encoder": costs.dinov2_parameters(self.channels),
            "decoder": costs.rae_decoder_parameters(self.channels, tokens),
            "statistics": 2 * self.channels * tokens,
        }
        return FULL_PRECISION * numbers[role]


class Latents(Entry):
    """A dataset, encoded by an autoencoder: once, into files, or (RAE) image by image while a network is trained."""

    dataset: str
    autoencoder: str
    shard_size: Count | None = None  # images per file of the cache
    mirrors: Flag | None = None  # RAE: whether the cache also holds the tokens of each mirror image
    encoded_from: str | None = None  # latents that hold the pixels; instead of a cache of their own

    @model_validator(mode="after")
    def _cached_or_not(self) -> Latents:
        if (self.shard_size is None) == (self.encoded_from is None):
            raise UserError(
                "latents have either 'shard_size' (they are cached) or 'encoded_from' (they are encoded while training)"
                ": write one of the two, null for the other"
            )
        if self.encoded_from is not None and self.mirrors is not None:
            raise UserError("mirrors: says what a cache holds, but with 'encoded_from' there is none: leave it out")
        return self


Dataset = Annotated[Digits | ImageNet | Gaussian, Field(discriminator="kind")]
Autoencoder = Annotated[Pixels | Identity | SDVAE | RAE, Field(discriminator="kind")]
