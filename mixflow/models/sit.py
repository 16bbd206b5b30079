"""SiT: the flow transformer of Ma et al. 2024 (arXiv 2401.08740), with its authors' key names and numerics.

Its own time is the paper's time: t=0 noise, t=1 data, fed to the network without a factor of 1000.
"""

from __future__ import annotations

import math

import torch
from timm.layers import GELUTanh
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from mixflow.config import SIT_SHORTHANDS
from mixflow.models.network import VelocityNetwork
from mixflow.runtime.errors import UserError, did_you_mean

TIMESTEP_FEATURES = 256


def sit_options(size: str) -> dict[str, int]:
    """Return depth, hidden_size, num_heads and patch_size of a published size such as `XL/2`; else `UserError`."""
    if size not in SIT_SHORTHANDS:
        raise UserError(f"'{size}' is not a SiT size{did_you_mean(size, SIT_SHORTHANDS)}")
    return dict(SIT_SHORTHANDS[size])


class SiT(VelocityNetwork):
    """Velocity network v(x_t, t, y) on square latents, conditioned by adaLN-Zero.

    `null_label` is the class id that stands for "no label" (it is `num_classes`); with `label_dropout` 0 the label
    table has no such row and `null_label` is None. With `learn_sigma` the head has 2C output channels of which the
    peer throws the second half away, in training too; here that half is kept in the state dict and never computed.
    """

    def __init__(
        self,
        *,
        input_size: int,  # height and width of the latent
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,  # without the null class
        label_dropout: float = 0.1,  # probability of training without the label
        learn_sigma: bool,
    ) -> None:
        super().__init__()
        assert input_size % patch_size == 0
        assert hidden_size % num_heads == 0 == hidden_size % 4
        self.options = dict(
            input_size=input_size,
            in_channels=in_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            label_dropout=label_dropout,
            learn_sigma=learn_sigma,
        )
        self.label_dropout = label_dropout
        self.null_label = num_classes if label_dropout > 0 else None
        self.grid = input_size // patch_size

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (label_dropout > 0), hidden_size)
        # A frozen parameter, not a buffer: the peer's files and EMA hold it, and a file may differ from the table.
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels, learn_sigma)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the peer does: Xavier linears, sin-cos positions, and zero gates and head, so that v = 0."""
        for name, parameter in self.named_parameters():
            if name == "pos_embed":
                parameter.copy_(sincos_positions(self.grid, parameter.shape[-1]))
            elif name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))  # the patch convolution as the linear map it is

    def forward(
        self,
        x: Tensor,  # [B,C,H,W] x_t, in the dtype of the weights unless under autocast
        t: Tensor,  # [B] or 0-dim (the same for all), paper time in [0, 1]
        y: Tensor,  # [B] int64 class ids; null_label stands for no label
        drop: Tensor | None = None,  # [B] bool, labels to replace by null_label; None: random in train mode
    ) -> Tensor:  # [B,C,H,W] velocity x1 - x0
        tokens, c = self.embed(x, t, y, drop)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    def embed(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what the first block takes: tokens [B,N,D] and conditioning c [B,D]. `t` is as the network is fed."""
        tokens = self.x_embedder(x) + self.pos_embed
        return tokens, self.t_embedder(t) + self.y_embedder(self.drop_labels(y, drop))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, N, p*p*C], row-major in the grid and in the patch, channel fastest -> [B,C,H,W]."""
        p = self.x_embedder.patch_size[0]
        patches = tokens.reshape(len(tokens), self.grid, self.grid, p, p, -1)  # [B,h,w,p,q,C]
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, self.grid * p, self.grid * p)


class TimestepEmbedder(nn.Module):
    """t -> sinusoidal features -> two-layer MLP, [B] or 0-dim -> [B,D] or [1,D]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_features(t.reshape(-1)).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class ids [B] -> [B,D]. A module of its own for the sake of the key name."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Block(nn.Module):
    """Transformer block with adaLN-Zero: x + gate * f(LN(x) * (1 + scale) + shift), f attention, then MLP."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.attn.fused_attn = True  # type: ignore[misc]  # SDPA whatever TIMM_FUSED_ATTN says; final for TorchScript only
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, 4 * hidden_size, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # [B,1,D]
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens [B,N,D] -> velocity patches [B, N, p*p*C]."""

    def __init__(self, hidden_size: int, patch_size: int, channels: int, learn_sigma: bool) -> None:
        super().__init__()
        self.channels = channels
        self.head_channels = 2 * channels if learn_sigma else channels
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * self.head_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)  # [B,1,D]
        x = modulate(self.norm_final(x), shift, scale)
        return F.linear(x, self.velocity_rows(self.linear.weight), self.velocity_rows(self.linear.bias))

    def velocity_rows(self, rows: Tensor) -> Tensor:
        """[p*p*head_channels, ...] -> [p*p*C, ...]. The rows left out get zero gradient, as in the peer."""
        return rows.unflatten(0, (-1, self.head_channels))[:, : self.channels].flatten(0, 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def timestep_features(t: Tensor) -> Tensor:
    """Sinusoidal features [B,256] of t [B]: 128 cosines, then 128 sines, of frequencies 10000^(-k/128).

    Always float32: lower precisions cannot tell neighbouring times apart, and the peer's float64 runs do the same.
    """
    half = TIMESTEP_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(grid: int, width: int) -> Tensor:
    """Sin-cos table [1, grid*grid, width] for tokens in row-major order, computed in float64, returned in float32.

    The first half of the channels encodes the column, the second the row; in each half sines precede cosines, of
    frequencies 10000^(-k/(width/4)).
    """
    quarter = width // 4
    frequencies = 10_000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width/2]
    return torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)], dim=1).float()[None]
