"""Stable Diffusion's autoencoder (Rombach et al., 2022): what SiT and REPA train on.

The network is diffusers' AutoencoderKL, read from a folder with `config.json` and `diffusion_pytorch_model.safetensors`
as `stabilityai/sd-vae-ft-ema` and `-mse` have them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixflow.autoencoders.quantise import quantise
from mixflow.runtime.arithmetic import float32_products
from mixflow.runtime.errors import UserError

FILES = ("config.json", "diffusion_pytorch_model.safetensors")
PRECISIONS = ("fp32", "bf16")
# Pixels that pass through the network at once: 16 images of 256x256, some gigabytes of activations in float32.
CHUNK_PIXELS = 1 << 20
# As in diffusers' DiagonalGaussianDistribution.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0
MAX_FLOAT16 = torch.finfo(torch.float16).max


class SDVae:
    """Stores the posterior of every image and of its mirror image: mean and log-variance, unscaled, in float16.

    Both mirrors, because mirroring the latents is not the same as encoding the mirror image. Without `folder` it can
    only turn stored values into latents, which is all that training needs.
    """

    mirrors = True
    is_random = True

    def __init__(
        self,
        folder: Path | None,  # of FILES
        device: torch.device | str = "cpu",
        *,
        scale: float,  # latents = scale * posterior sample
        channels: int,
        downsampling: int,
        precision: str,  # of the network: fp32, or bf16 (autocast)
    ) -> None:
        """Raises `UserError` where the folder is incomplete or holds another network than the settings say."""
        if precision not in PRECISIONS:
            raise UserError(f"autoencoder precision '{precision}' is not known: use one of {', '.join(PRECISIONS)}")
        self.folder, self.device = folder, torch.device(device)
        self.scale, self.channels, self.downsampling, self.precision = scale, channels, downsampling, precision
        self._vae = None if folder is None else _load(folder, channels, downsampling).to(self.device)

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [B,H,W,3] -> stored float16 [B,2,2C,h,w]: image and mirror image; mean then log-variance.

        Raises `UserError` where a value is not finite, or too large for float16.
        """
        stored = []
        for chunk in images.split(self._chunk(images.shape[1] * images.shape[2])):
            pixels = chunk.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # [b,3,H,W]
            both = torch.stack([self._moments(pixels), self._moments(pixels.flip(-1))], dim=1)  # [b,2,2C,h,w]
            halves = both.to(torch.float16)
            if not torch.isfinite(halves).all():
                raise self._unfit(both)
            stored.append(halves)
        return torch.cat(stored)

    def latents(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """Stored [B,2C,h,w] of one mirror -> latents float32 [B,C,h,w] = scale (mean + exp(log-variance / 2) noise).

        `noise` is standard normal, [B,C,h,w]; None takes the mean.
        """
        mean, log_variance = stored.chunk(2, dim=1)
        if noise is None:
            return mean.float() * self.scale
        # One pass after another over the same memory: this runs for every training batch.
        std = log_variance.to(torch.float32, copy=True).mul_(0.5).exp_()
        return std.mul_(noise).add_(mean).mul_(self.scale)

    @torch.no_grad()
    def decode(self, latents: Tensor, to_uint8: str = "round") -> Tensor:
        """Latents [B,C,h,w] -> images uint8 [B,H,W,3] on the network's device; `to_uint8` as in `quantise`."""
        chunk = self._chunk(latents.shape[2] * latents.shape[3] * self.downsampling**2)
        images = []
        for part in latents.split(chunk):
            with self._arithmetic():
                decoded = self._network().decode(part.to(self.device, torch.float32) / self.scale, return_dict=False)[0]
            images.append(quantise(decoded, to_uint8))
        return torch.cat(images)

    @torch.no_grad()
    def _moments(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1,1], [b,3,H,W] -> posterior mean and log-variance, float32 [b,2C,h,w]."""
        with self._arithmetic():
            posterior = self._network().encode(pixels, return_dict=False)[0]
        mean, log_variance = posterior.parameters.float().chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)], dim=1)

    def _network(self) -> Any:
        if self._vae is None:
            raise UserError(
                "autoencoder sd_vae encodes and decodes with its files only: give the record of its download"
            )
        return self._vae

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The autoencoder's own precision, whatever the caller's network runs in: strict float32 or bf16 autocast."""
        with float32_products(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def _chunk(self, pixels_per_image: int) -> int:
        return max(1, CHUNK_PIXELS // pixels_per_image)

    def _unfit(self, moments: Tensor) -> UserError:
        bad = ~torch.isfinite(moments)
        if bad.any():
            fix = "set precision to fp32" if self.precision != "fp32" else "fetch its files again"
            return UserError(
                f"the autoencoder in '{self.folder}' gave {int(bad.sum()):,} values that are not finite in "
                f"{self.precision}: {fix}"
            )
        return UserError(
            f"the autoencoder in '{self.folder}' gave a value of {moments.abs().max().item():,.0f}, but the cache "
            f"keeps float16, which ends at {MAX_FLOAT16:,.0f}: fetch its files again, or name another autoencoder"
        )


def _load(folder: Path, channels: int, downsampling: int) -> Any:
    """Return diffusers' AutoencoderKL of `folder` in float32, for inference."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"autoencoder '{folder}' lacks {' and '.join(missing)}: download it again, or name its folder")
    # Imported here, and by its narrowest path: it takes seconds, and the trainer does without.
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        # Files of 2022 name the attention query, key, value, proj_attn; diffusers renames them.
        vae, info = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # whatever diffusers, safetensors or the JSON parser say of broken files
        reason = " ".join(str(error).split())
        raise UserError(f"autoencoder '{folder}' cannot be read ({reason}): download it again") from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if wrong:
        raise UserError(
            f"the weights in autoencoder '{folder}' do not fit its config.json ({len(wrong)} tensors, such as "
            f"'{wrong[0]}'): download it again"
        )
    found = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if found != (channels, downsampling):
        raise UserError(
            f"autoencoder '{folder}' has {found[0]} channels and downsampling {found[1]} where its entry says "
            f"{channels} and {downsampling}: correct channels and downsampling, or name another download"
        )
    return vae.eval().requires_grad_(False)
