"""REPA's alignment: the network's tokens are pulled towards an image encoder's (arXiv 2410.06940, eq. 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixflow.flow import Interpolant, flow_matching_loss


def alignment_loss(
    projections: Sequence[Tensor],  # one [B,N,D_j] per encoder, what the network says
    targets: Sequence[Tensor],  # one [B,N,D_j] per encoder, its patch features
) -> Tensor:
    """Return minus the cosine similarity of each sample, averaged over tokens and encoders, float32 [B], in [-1, 1].

    Cast before it is normalised: in float16 the squared norm overflows, the cause of the peer's NaN losses.
    """
    assert len(projections) == len(targets) > 0
    cosines = [_cosine(p, z).mean(dim=1) for p, z in zip(projections, targets, strict=True)]
    return -torch.stack(cosines).mean(dim=0)


def aligned_flow_matching_loss(
    network: Callable[[Tensor, Tensor], tuple[Tensor, Sequence[Tensor]]],  # (x, t) -> velocity, projections; as in REPA
    noise: Tensor,  # [B,...] x0
    data: Tensor,  # [B,...] x1
    t: Tensor,  # [B] what the network is told
    m: Tensor,  # [B] where its input is taken
    interpolant: Interpolant,
    targets: Sequence[Tensor],  # one [B,N,D_j] per encoder: the features of the image behind `data`
    coefficient: float,  # 0.5 in the paper
    **options: Any,  # of flow_matching_loss
) -> Tensor:
    """Return flow_matching_loss + coefficient * alignment_loss of each sample, float32 [B], from one network call."""
    projections: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        velocity, found = network(x, t)
        projections.extend(found)
        return velocity

    denoising = flow_matching_loss(velocity, noise, data, t, m, interpolant, **options)
    return denoising + coefficient * alignment_loss(projections, targets)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """[B,N,D], [B,N,D] -> [B,N]."""
    assert first.shape == second.shape
    return (F.normalize(first.float(), dim=-1) * F.normalize(second.float(), dim=-1)).sum(dim=-1)
