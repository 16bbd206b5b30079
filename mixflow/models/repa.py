"""REPA: a SiT trained to align with an image encoder (Yu et al. 2024, arXiv 2410.06940), with its authors' key names.

Its own time runs from data (0) to noise (1), with velocity x0 - x1. Here, and only here, that is turned around:
`REPA.forward` takes paper time and returns x1 - x0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from mixflow.models.sit import SiT
from mixflow.runtime.errors import UserError


class REPA(SiT):
    """SiT with a head of C channels, and projectors from one block's tokens to the features of target encoders.

    Sampling needs no projectors and never computes them; a network of `z_dims` [] has none. Training without alignment
    gives them no gradient, which DistributedDataParallel refuses: freeze them, `projectors.requires_grad_(False)`.
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
        encoder_depth: int,  # the block whose output is projected, counted from 1
        z_dims: Sequence[int],  # widths of the target encoders' features
        projector_dim: int = 2048,  # hidden width of the projectors
        qk_norm: bool = False,  # LayerNorm of queries and keys, per head
    ) -> None:
        super().__init__(
            input_size=input_size,
            in_channels=in_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            label_dropout=label_dropout,
            learn_sigma=False,
        )
        assert 1 <= encoder_depth <= depth
        del self.options["learn_sigma"]
        self.options |= dict(
            encoder_depth=encoder_depth, z_dims=list(z_dims), projector_dim=projector_dim, qk_norm=qk_norm
        )
        self.encoder_depth = encoder_depth
        if qk_norm:
            for attention in [module for module in self.modules() if isinstance(module, Attention)]:
                # Put in by hand: versions of timm differ in how, and with which norm, their attention is asked for it.
                attention.q_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-5)
                attention.k_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-5)
        self.projectors = nn.ModuleList([projector(hidden_size, projector_dim, z_dim) for z_dim in z_dims])

    def forward(
        self,
        x: Tensor,  # [B,C,H,W] x_t, in the dtype of the weights unless under autocast
        t: Tensor,  # [B] or 0-dim (the same for all), paper time in [0, 1]
        y: Tensor,  # [B] int64 class ids; null_label stands for no label
        drop: Tensor | None = None,  # [B] bool, labels to replace by null_label; None: random in train mode
        with_projections: bool = False,
    ) -> Any:  # [B,C,H,W] velocity x1 - x0; with_projections: (velocity, [[B,N,z] for z in z_dims])
        projections = []
        tokens, c = self.embed(x, 1 - t, y, drop)
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, c)
            if with_projections and number == self.encoder_depth:
                projections = [project(tokens) for project in self.projectors]
        velocity = -self.unpatchify(self.final_layer(tokens, c))
        return (velocity, projections) if with_projections else velocity


def projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """Return the MLP [..., width] -> [..., out], with the peer's initial weights."""
    layers = nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )
    for name, parameter in layers.named_parameters():
        (nn.init.zeros_ if name.endswith("bias") else nn.init.xavier_uniform_)(parameter)
    return layers


def check_projectors(network: nn.Module, widths: Sequence[int], source: str) -> None:
    """Check that `network`, called `source`, can be aligned with encoders of these widths. Raises `UserError`."""
    if not isinstance(network, REPA):
        raise UserError(
            f"{source} is a {type(network).__name__}, which has no projectors to align: use the family 'repa'"
        )
    if not network.projectors:
        raise UserError(
            f"{source} has no projectors (keys 'projectors.*'), as files stripped for sampling: train it without "
            "align, or start from weights that have them"
        )
    if network.options["z_dims"] != list(widths):
        raise UserError(
            f"{source} has projectors to {network.options['z_dims']} features where the encoders have {list(widths)}: "
            "align with the encoders it was trained with"
        )
