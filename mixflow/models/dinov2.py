"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193), from a local weights file: REPA's targets and FD-DINOv2's features."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.layers import Mlp, SwiGLUPacked, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mixflow.models.weights import check_fit, read_weights
from mixflow.runtime.arithmetic import float32_products
from mixflow.runtime.errors import UserError

PATCH = 14  # pixels
HEAD_WIDTH = 64  # of every published size
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLASS_GRID = 16  # rows and columns of patches where the class token is wanted: 224 pixels
_META_OFFSET = 0.1  # patches, which Meta adds to the grid that positions are resampled to
_RESIZING_THREADS = 4  # one takes 0.2 s for 64 images of 512 pixels, half of that for 256

_KEYS = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")


class DINOv2(nn.Module):
    """uint8 images -> normalised patch tokens [B, grid * grid, width], frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: VisionTransformer, grid: int) -> None:
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.grid = grid
        self.width: int = vit.embed_dim
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # uint8 [B,H,W,3] or [B,3,H,W]
        tokens = self.vit.forward_features(self.preprocess(images))
        return tokens[:, self.vit.num_prefix_tokens :]

    def preprocess(self, images: Tensor) -> Tensor:
        """Return what the transformer takes, float32 [B,3,S,S] with S = 14 grid: normalised first, then resized."""
        assert images.dtype == torch.uint8, "images are uint8, 0 to 255"
        if images.shape[1] != 3:
            images = images.permute(0, 3, 1, 2)
        return F.interpolate(self.normalise(images), size=(PATCH * self.grid,) * 2, mode="bicubic")

    def normalise(self, images: Tensor) -> Tensor:
        """Return uint8 [B,3,H,W] as float32, with ImageNet's means of 0 and deviations of 1."""
        return (images.float() / 255 - self.mean) / self.std


class DINOv2Class:
    """uint8 images -> class token after the last norm [B, num_features], float32 without TF32: FD-DINOv2's features.

    As Stein et al. 2023 (arXiv 2306.04675) define them, whose code (dgm-eval) runs Meta's ViT-L/14 on images squeezed
    to 224x224 by PIL's bicubic filter, which averages where it shrinks and rounds to whole grey levels.
    EDM2's code, which makes the statistics that it publishes, takes PyTorch's antialiased bicubic by default, neither
    rounded nor clipped. Its authors call that almost the same; in small random networks it moved the features
    of smooth images by 1 % of their spread, and what it does to FD-DINOv2 was not measured with the real weights.
    """

    def __init__(self, encoder: DINOv2, device: torch.device | str = "cpu") -> None:
        assert encoder.grid == CLASS_GRID
        self.device = torch.device(device)
        self.num_features = encoder.width
        self._encoder = encoder.to(self.device)
        self._pool = ThreadPoolExecutor(_RESIZING_THREADS, thread_name_prefix="resize")

    @torch.inference_mode()
    def __call__(self, images: Tensor | np.ndarray) -> Tensor:  # uint8 [B,H,W,3] in the host's memory
        pixels = self._resized(images).to(self.device, non_blocking=True)
        with float32_products():
            tokens = self._encoder.vit.forward_features(self._encoder.normalise(pixels.permute(0, 3, 1, 2)))
        return tokens[:, 0].clone()  # a view would keep all tokens in memory

    def _resized(self, images: Tensor | np.ndarray) -> Tensor:  # uint8 [B,224,224,3], pinned for a GPU
        # A call returns before the GPU is done, so that this goes on while the GPU has the images of the last call.
        array = images.cpu().numpy() if isinstance(images, Tensor) else images
        assert array.dtype == np.uint8, "images are uint8, 0 to 255"
        size = PATCH * CLASS_GRID
        resized = torch.empty((len(array), size, size, 3), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        rows = resized.numpy()

        def resize(index: int) -> None:
            rows[index] = Image.fromarray(array[index]).resize((size, size), Image.Resampling.BICUBIC)

        list(self._pool.map(resize, range(len(array))))
        return resized


def load_dinov2(
    weights: str | os.PathLike[str],  # timm's vit_*_patch14_dinov2 or Meta's dinov2_vit*14_pretrain.pth
    grid: int,  # rows and columns of patches: that of the network to align, 16 for SiT-*/2 at 256 pixels
) -> DINOv2:
    """Return the encoder in float32 on the CPU. Sizes come from shapes; positions are resampled to the grid by timm.

    Raises `UserError` for an unreadable file, another architecture, and variants with registers.
    """
    return _load(weights, grid, lambda positions: resample_abs_pos_embed(positions, [grid, grid]))


def load_dinov2_class(
    weights: str | os.PathLike[str],  # as for `load_dinov2`; FD-DINOv2 is measured with ViT-L/14
    device: torch.device | str = "cpu",
) -> DINOv2Class:
    """Return the network whose class token FD-DINOv2 compares. Raises `UserError` as `load_dinov2` does."""
    return DINOv2Class(_load(weights, CLASS_GRID, lambda positions: _metas_positions(positions, CLASS_GRID)), device)


def _metas_positions(positions: Tensor, grid: int) -> Tensor:
    """Return the positions [1, 1 + grid * grid, width] that Meta's own forward pass makes from [1, 1 + n * n, width].

    It is for networks without registers: bicubic without antialiasing, by a factor a little larger than grid / n, which
    also moves the points that are looked at. timm's rule, which REPA follows, antialiases between whole grids.
    """
    n = math.isqrt(positions.shape[1] - 1)
    if n == grid:
        return positions
    patches = positions[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)  # [1,width,n,n]
    patches = F.interpolate(patches, scale_factor=(grid + _META_OFFSET) / n, mode="bicubic")
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def _load(
    weights: str | os.PathLike[str],
    grid: int,
    resample: Callable[[Tensor], Tensor],  # positions [1, 1 + n * n, width] -> [1, 1 + grid * grid, width]
) -> DINOv2:
    read = read_weights(weights)
    # Meta names the linears of the gated MLP in its own way, and keeps a token for masked training.
    tensors = {
        name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensor
        for name, tensor in read.tensors.items()
        if name != "mask_token"
    }
    if "register_tokens" in tensors or "reg_token" in tensors:
        raise UserError(f"{read.source} holds a DINOv2 with registers, which is not supported: give one without")
    missing = [name for name in _KEYS if name not in tensors]
    width, _, *patch = tensors[_KEYS[0]].shape if not missing else (0, 0)
    positions = list(tensors["pos_embed"].shape) if not missing else []
    fault = None
    if missing:
        fault = f"'{missing[0]}' is missing"
    elif patch != [PATCH, PATCH] or width % HEAD_WIDTH:
        fault = f"it has patches {patch} and width {width}"
    elif len(positions) != 3 or math.isqrt(max(positions[1] - 1, 0)) ** 2 != positions[1] - 1:
        fault = f"its positions {positions} are not those of a square grid and a class token"
    if fault:
        raise UserError(
            f"{read.source} cannot be loaded as DINOv2, for {fault}: give timm's vit_*_patch14_dinov2 or Meta's "
            "dinov2_vit*14_pretrain.pth"
        )
    hidden = len(tensors["blocks.0.mlp.fc1.weight"])
    gated = tensors["blocks.0.mlp.fc2.weight"].shape[-1] != hidden  # as in the giant
    mlp_layer: Any = SwiGLUPacked if gated else Mlp
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    vit = VisionTransformer(
        img_size=PATCH * grid,
        patch_size=PATCH,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=width // HEAD_WIDTH,
        mlp_ratio=(hidden + 0.5) / width,  # timm rounds down
        init_values=1e-5,  # there is a layer scale
        weight_init="skip",
        mlp_layer=mlp_layer,
        act_layer=nn.SiLU if gated else nn.GELU,
    )
    tensors["pos_embed"] = resample(tensors["pos_embed"])
    check_fit(read._replace(tensors=tensors), vit, f"a DINOv2 of width {width} and depth {depth}")
    vit.load_state_dict(tensors)
    return DINOv2(vit, grid)
