"""DiT-DH: RAE's transformer with a wide, shallow head (Zheng et al. 2025, arXiv 2510.11690), with its key names.

Its own time runs from data (0) to noise (1), with velocity x0 - x1. Here, and only here, that is turned around:
`DiTDH.forward` takes paper time and returns x1 - x0.

Under bf16 autocast matrix products and attention are in bf16 (attention's logits and softmax are accumulated in float32
by every kernel behind `scaled_dot_product_attention`); the residual streams, norms, modulation, rotations and the
angles of t stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch
from timm.layers import GELUTanh
from timm.models.vision_transformer import Mlp, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from mixflow.models.network import VelocityNetwork
from mixflow.models.sit import LabelEmbedder, sincos_positions

TIME_FREQUENCIES = 256


class DiTDH(VelocityNetwork):
    """A trunk of tokens, conditioned on t and y, whose output conditions each token of a wide head.

    The trunk and the head read the same noisy latent, one token per pixel. Position table and time frequencies are
    frozen but in every file: released networks need theirs. Pairs are (trunk, head).
    """

    def __init__(
        self,
        *,
        input_size: int,  # height and width of the latent
        in_channels: int,
        hidden_size: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        num_classes: int,  # without the null class
        label_dropout: float = 0.1,  # probability of training without the label
        swiglu: bool = True,  # False: MLPs with GELU
        rms_norm: bool = True,  # False: LayerNorm without weights
        qk_norm: bool = False,  # normalise queries and keys, per head
        pos_embed: bool = True,  # sin-cos positions added to the trunk's tokens
    ) -> None:
        super().__init__()
        assert len(hidden_size) == len(depth) == len(num_heads) == 2
        self.options = dict(
            input_size=input_size,
            in_channels=in_channels,
            hidden_size=list(hidden_size),
            depth=list(depth),
            num_heads=list(num_heads),
            num_classes=num_classes,
            label_dropout=label_dropout,
            swiglu=swiglu,
            rms_norm=rms_norm,
            qk_norm=qk_norm,
            pos_embed=pos_embed,
        )
        self.label_dropout = label_dropout
        self.null_label = num_classes if label_dropout > 0 else None
        trunk, head = hidden_size

        self.s_embedder = PatchEmbed(input_size, 1, in_channels, trunk)
        self.x_embedder = PatchEmbed(input_size, 1, in_channels, head)
        self.t_embedder = FourierTimeEmbedder(trunk)
        self.y_embedder = LabelEmbedder(num_classes + (label_dropout > 0), trunk)
        self.pos_embed = nn.Parameter(torch.empty(1, input_size**2, trunk), requires_grad=False) if pos_embed else None
        self.enc_feat_rope, self.dec_feat_rope = (
            RotaryPositions(input_size, width // heads) for width, heads in zip(hidden_size, num_heads, strict=True)
        )
        self.s_projector = nn.Identity() if trunk == head else nn.Linear(trunk, head)
        self.blocks = nn.ModuleList(
            Block(width, heads, swiglu, rms_norm, qk_norm)
            for width, heads, blocks in zip(hidden_size, num_heads, depth, strict=True)
            for _ in range(blocks)
        )
        self.final_layer = FinalLayer(head, in_channels, rms_norm)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the peer does: torch's own linears, sin-cos positions, zero gates and head, so that v = 0."""
        for name, parameter in self.named_parameters():
            if name == "pos_embed":
                parameter.copy_(sincos_positions(self.options["input_size"], parameter.shape[-1]))
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear") or "embedder.proj.bias" in name:
                nn.init.zeros_(parameter)
            elif "embedder.proj.weight" in name:
                nn.init.xavier_uniform_(parameter.flatten(1))  # the patch convolution as the linear map it is
            elif name.startswith("y_embedder") or (name.startswith("t_embedder.mlp") and name.endswith("weight")):
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        x: Tensor,  # [B,C,H,W] x_t, in the dtype of the weights unless under autocast
        t: Tensor,  # [B] or 0-dim (the same for all), paper time in [0, 1]
        y: Tensor,  # [B] int64 class ids; null_label stands for no label
        drop: Tensor | None = None,  # [B] bool, labels to replace by null_label; None: random in train mode
    ) -> Tensor:  # [B,C,H,W] velocity x1 - x0
        full = self.t_embedder.W.dtype  # also under autocast
        t_embedding = self.t_embedder(1 - t)  # [B,D] or [1,D]
        # The peer takes the SiLU of both conditions twice; every block takes the second, so that it is taken here.
        c = F.silu(F.silu(t_embedding + self.y_embedder(self.drop_labels(y, drop))))[:, None]  # [B,1,D]
        s = self.s_embedder(x).to(full)  # [B,N,D]
        if self.pos_embed is not None:
            s = s + self.pos_embed
        for block in islice(self.blocks, self.options["depth"][0]):
            s = block(s, c, self.enc_feat_rope)
        s = F.silu(self.s_projector(F.silu(t_embedding[:, None] + s)))  # [B,N,D_head]
        tokens = self.x_embedder(x).to(full)
        for block in islice(self.blocks, self.options["depth"][0], None):
            tokens = block(tokens, s, self.dec_feat_rope)
        return -self.final_layer(tokens, s).mT.unflatten(2, x.shape[2:])


class FourierTimeEmbedder(nn.Module):
    """t -> sines and cosines of random frequencies -> two-layer MLP, [B] or 0-dim -> [B,D] or [1,D]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # A frozen parameter, not a buffer: the peer's files and EMA hold it.
        self.W = nn.Parameter(torch.randn(TIME_FREQUENCIES), requires_grad=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        # At least float32: lower precisions cannot tell neighbouring times apart.
        angles = t.reshape(-1, 1) * self.W.float() * (2 * math.pi)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.W.dtype))


class RotaryPositions(nn.Module):
    """Rotate pairs of channels by angles of their token's place: [B,heads,N,d] -> the same.

    The first half of the d channels turns by the row, the second by the column; the angles of one step are
    10000^(-4k/d) for the pairs k < d/4 of each half.
    """

    freqs_cos: Tensor  # [N,d], both channels of a pair alike
    freqs_sin: Tensor

    def __init__(self, grid: int, head_dim: int) -> None:
        super().__init__()
        assert head_dim % 4 == 0
        quarter = head_dim // 4
        frequencies = 10_000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        line = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies.repeat_interleave(2)  # [grid, d/2]
        angles = torch.cat([line.repeat_interleave(grid, dim=0), line.repeat(grid, 1)], dim=1)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.freqs_cos + torch.stack([-second, first], dim=-1).flatten(-2) * self.freqs_sin


class Block(nn.Module):
    """Transformer block with adaLN-Zero: x + gate * f(norm(x) * (1 + scale) + shift), f attention, then MLP.

    The condition c, its SiLU taken, is [B,1,D] or one of each token, [B,N,D].
    """

    def __init__(self, hidden_size: int, num_heads: int, swiglu: bool, rms_norm: bool, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = norm(hidden_size, rms_norm)
        self.attn = Attention(hidden_size, num_heads, rms_norm, qk_norm)
        self.norm2 = norm(hidden_size, rms_norm)
        hidden = 4 * hidden_size
        self.mlp = SwiGLU(hidden_size, int(2 / 3 * hidden)) if swiglu else Mlp(hidden_size, hidden, act_layer=GELUTanh)
        self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor, rope: RotaryPositions) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Attention(nn.Module):
    """Self-attention [B,N,D] -> [B,N,D] with rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int, rms_norm: bool, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        head_dim = hidden_size // num_heads
        self.q_norm, self.k_norm = (
            (nn.RMSNorm(head_dim, eps=1e-6) if rms_norm else nn.LayerNorm(head_dim)) if qk_norm else nn.Identity()
            for _ in "qk"
        )

    def forward(self, x: Tensor, rope: RotaryPositions) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B,heads,N,d]
        full = self.qkv.weight.dtype  # also under autocast
        q, k = rope(self.q_norm(q.to(full))), rope(self.k_norm(k.to(full)))
        heads = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(heads.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """MLP [...,D] -> [...,D] whose hidden layer is SiLU(gate) * value."""

    def __init__(self, hidden_size: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * hidden)
        self.w3 = nn.Linear(hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class FinalLayer(nn.Module):
    """Tokens [B,N,D] and their conditions, SiLU taken -> velocities [B,N,C]."""

    def __init__(self, hidden_size: int, channels: int, rms_norm: bool) -> None:
        super().__init__()
        self.norm_final = norm(hidden_size, rms_norm)
        self.linear = nn.Linear(hidden_size, channels)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def norm(width: int, rms_norm: bool) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-6) if rms_norm else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def modulation(width: int, parts: int) -> nn.Sequential:
    """Return the linear map that shifts, scales and gates come from. Its SiLU, for the key name, is taken by DiTDH."""
    return nn.Sequential(nn.Identity(), nn.Linear(width, parts * width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    # 1 + scale is not rounded to bf16 this way under autocast, for x is float32.
    return x + x * scale + shift
