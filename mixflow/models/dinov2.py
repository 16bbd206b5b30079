"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193) as a source of REPA's alignment targets, from a local weights file."""

from __future__ import annotations

import os
from typing import Any

import torch
from timm.layers import Mlp, SwiGLUPacked, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mixflow.models.weights import check_fit, read_weights
from mixflow.runtime.errors import UserError

PATCH = 14  # pixels
HEAD_WIDTH = 64  # of every published size
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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
        x = (images.float() / 255 - self.mean) / self.std
        return F.interpolate(x, size=(PATCH * self.grid,) * 2, mode="bicubic")


def load_dinov2(
    weights: str | os.PathLike[str],  # timm's vit_*_patch14_dinov2 or Meta's dinov2_vit*14_pretrain.pth
    grid: int,  # rows and columns of patches: that of the network to align, 16 for SiT-*/2 at 256 pixels
) -> DINOv2:
    """Return the encoder in float32 on the CPU. Sizes come from shapes; positions are resampled to the grid.

    Raises `UserError` for an unreadable file, another architecture, and variants with registers.
    """
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
    if missing or patch != [PATCH, PATCH] or width % HEAD_WIDTH:
        fault = f"'{missing[0]}' is missing" if missing else f"it has patches {patch} and width {width}"
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
    tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], [grid, grid])
    check_fit(read._replace(tensors=tensors), vit, f"a DINOv2 of width {width} and depth {depth}")
    vit.load_state_dict(tensors)
    return DINOv2(vit, grid)
