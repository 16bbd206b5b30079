"""Representation autoencoders (RAE; Zheng et al., 2025): a frozen image encoder and a decoder trained for its tokens.

Files: the encoder's as transformers reads them (see `rae_encoder`), the decoder's model.pt, and stat.pt with the mean
and variance of every latent value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mixflow.autoencoders.quantise import quantise_unit
from mixflow.autoencoders.rae_decoder import Decoder, load_decoder
from mixflow.autoencoders.rae_encoder import KINDS, Encoder, load_encoder
from mixflow.runtime.arithmetic import float32_products
from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.torch_file import read_torch_file

__all__ = ["RAE", "Decoder"]

PRECISIONS = ("fp32", "bf16")
# Tokens that pass through a network at once: 128 images of 16 x 16, half a gigabyte in the decoder's widest layer.
CHUNK_TOKENS = 1 << 15
_EPS = 1e-5  # added to variances, as the peer does


class RAE:
    """Stores the encoder's tokens as they are, in float16, so that other statistics ask for no other encoding.

    Latents are these tokens with zero mean and unit variance at every position and channel. Of its files only those
    need be given that are used: "encoder/..." to encode, "decoder" to decode, "statistics" for whatever has latents.
    """

    is_random = False

    def __init__(
        self,
        files: Mapping[str, Path],  # "encoder/config.json", "encoder/model.safetensors", "decoder", "statistics"
        device: torch.device | str = "cpu",
        *,
        encoder_size: int,  # pixels that images are resized to before they are encoded
        encoder_patch: int,  # pixels
        decoder_heads: int,
        channels: int,
        downsampling: int,  # pixels of an image to one latent
        precision: str,  # of both networks: fp32, or bf16 (autocast)
        encoder_kind: str = "dinov2_with_registers",  # of KINDS, as the encoder's config.json names it
        mirrors: bool = False,  # whether `encode` gives the mirror image too
    ) -> None:
        """Raises `UserError` where files do not fit the settings."""
        if precision not in PRECISIONS:
            raise UserError(f"autoencoder precision '{precision}' is not known: use one of {', '.join(PRECISIONS)}")
        if encoder_kind not in KINDS:
            raise UserError(f"encoder_kind '{encoder_kind}' is not known{did_you_mean(encoder_kind, KINDS)}")
        if encoder_size % encoder_patch:
            raise UserError(
                f"encoder_size {encoder_size} is no multiple of encoder_patch {encoder_patch}: correct either"
            )
        self.device, self.precision, self.mirrors = torch.device(device), precision, mirrors
        self.channels, self.downsampling, self.grid = channels, downsampling, encoder_size // encoder_patch
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None] for values in KINDS[encoder_kind].normalisation
        )
        self._pixel_mean, self._pixel_std = mean, std
        self._encoder: Encoder | None = None
        self._decoder: Decoder | None = None
        self._statistics: tuple[Tensor, Tensor] | None = None  # mean and standard deviation, [C,h,w]
        self._folder = _encoder_folder(files)
        if self._folder is not None:
            self._encoder = load_encoder(self._folder, encoder_kind, encoder_size, encoder_patch, channels).to(
                self.device
            )
        if "decoder" in files:
            self._decoder = load_decoder(
                files["decoder"],
                num_heads=decoder_heads,
                num_channels=channels,
                grid=self.grid,
                patch_size=downsampling,
            ).to(self.device)
        if "statistics" in files:
            mean, std = _load_statistics(files["statistics"], (channels, self.grid, self.grid))
            self._statistics = mean.to(self.device), std.to(self.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B,H,W,3] -> stored float16 [B,C,h,w], or [B,2,C,h,w] with both mirrors, un-normalised.

        Raises `UserError` where a value is not finite. Otherwise float16 holds them: a norm is no larger than sqrt(C).
        """
        views = []
        for pixels in self._pixels(images):
            tokens = self._tokens(pixels)
            views.append(torch.stack([tokens, self._tokens(pixels.flip(-1))], dim=1) if self.mirrors else tokens)
        tokens = torch.cat(views)
        bad = ~torch.isfinite(tokens)
        if bad.any():
            fix = "set precision to fp32" if self.precision != "fp32" else "fetch its files again"
            raise UserError(
                f"the encoder in '{self._folder}' gave {int(bad.sum()):,} values that are not finite in "
                f"{self.precision}: {fix}"
            )
        return tokens.to(torch.float16)

    def latents(self, stored: Tensor, noise: Tensor | None = None) -> Tensor:
        """Stored [B,C,h,w] of one mirror -> latents float32 [B,C,h,w]; there is nothing random about them."""
        mean, std = self._need_statistics()
        # One pass after another over the same memory: this runs for every training batch.
        return stored.to(self.device, torch.float32, copy=True).sub_(mean).div_(std)

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        """Images uint8 [B,H,W,3] -> latents float32 [B,C,h,w], as training takes them without a cache."""
        mean, std = self._need_statistics()
        return torch.cat([(self._tokens(pixels) - mean) / std for pixels in self._pixels(images)])

    @torch.no_grad()
    def decode(self, latents: Tensor, to_uint8: str = "round") -> Tensor:
        """Latents [B,C,h,w] -> images uint8 [B,H,W,3] on the decoder's device; `to_uint8` as in `quantise_unit`."""
        return torch.cat([quantise_unit(self._decoded(part), to_uint8) for part in self._chunks(latents)])

    def compile(self) -> None:
        """Compile the networks that there are, with torch.compile; it takes effect at the first batch."""
        for network in (self._encoder, self._decoder):
            if network is not None:
                network.compile()

    def _pixels(self, images: Tensor) -> Iterator[Tensor]:
        """Images uint8 [B,H,W,3] -> float32 [b,3,H,W] in [0,1] on the device, in chunks."""
        side = self.grid * self.downsampling
        if images.shape[1:3] != (side, side):
            raise UserError(
                f"autoencoder rae takes images of {side} x {side} pixels ({self.grid} latents of {self.downsampling} "
                f"pixels), not {images.shape[2]} x {images.shape[1]}: correct the dataset's size or encoder_size"
            )
        for chunk in self._chunks(images):
            yield chunk.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255.0

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Pixels in [0,1], [b,3,H,W] -> the encoder's tokens, float32 [b,C,h,w]."""
        if self._encoder is None:
            raise UserError("autoencoder rae encodes with its encoder only: give the record of the encoder's download")
        with self._arithmetic():
            tokens = self._encoder(pixels)
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def _decoded(self, latents: Tensor) -> Tensor:
        """Latents [b,C,h,w] -> pixels of [0,1] before they are clamped, float32 [b,3,H,W]."""
        if self._decoder is None:
            raise UserError("autoencoder rae decodes with its decoder only: give the record of the decoder's download")
        mean, std = self._need_statistics()
        tokens = (latents.to(self.device, torch.float32) * std + mean).flatten(2).transpose(1, 2)
        with self._arithmetic():
            pixels = self._decoder(tokens)
        return pixels.float() * self._pixel_std + self._pixel_mean

    def _need_statistics(self) -> tuple[Tensor, Tensor]:
        if self._statistics is None:
            raise UserError("autoencoder rae has latents with its statistics only: give the record of their download")
        return self._statistics

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The autoencoder's own precision, whatever the caller's network runs in: strict float32 or bf16 autocast."""
        with float32_products(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def _chunks(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Split into as few parts as may be, of equal sizes, for a compiled network is compiled for each."""
        parts = max(1, -(-len(batch) * self.grid**2 // CHUNK_TOKENS))
        return batch.split(-(-len(batch) // parts))


def _encoder_folder(files: Mapping[str, Path]) -> Path | None:
    """Return where the encoder's files lie, None if there are none."""
    given = {name.removeprefix("encoder/"): path for name, path in files.items() if name.startswith("encoder/")}
    if given and "config.json" not in given:
        raise UserError(f"the encoder's download has no config.json among {', '.join(given)}: add it to its files")
    return given["config.json"].parent if given else None


def _load_statistics(path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents, float32 [C,h,w] each. Raises `UserError`."""
    source = f"latent statistics '{path}'"
    told = read_torch_file(path, source)
    if not isinstance(told, Mapping) or not {"mean", "var"} & told.keys():
        raise UserError(f"{source} hold neither mean nor var: name the peer's stat.pt of this autoencoder")
    mean, variance = (told.get(name) for name in ("mean", "var"))  # the published files have no mean
    for name, values in (("mean", mean), ("var", variance)):
        found = tuple(values.shape) if isinstance(values, Tensor) else values
        if found is not None and found != shape:
            raise UserError(
                f"{source} have a {name} of shape {found} where the autoencoder's latents are {shape}: name the "
                "statistics of this encoder at this resolution, or correct encoder_size and channels"
            )
    mean = torch.zeros(shape) if mean is None else mean.float()
    std = torch.sqrt((torch.ones(shape) if variance is None else variance.float()) + _EPS)
    if not (torch.isfinite(mean) & torch.isfinite(std)).all():
        raise UserError(f"{source} hold values that are not finite, or negative variances: download them again")
    return mean, std
