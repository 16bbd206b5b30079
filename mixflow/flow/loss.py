"""Flow matching, with the slowed input of MixFlow, and the losses of what it is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixflow.flow.interpolants import Interpolant
from mixflow.flow.time_laws import shift_time

Network = Callable[[Tensor, Tensor], Tensor]  # (x [B,...], t [B]) -> velocity [B,...]; labels already bound


def flow_matching_loss(
    network: Network,
    noise: Tensor,  # [B,...] x0
    data: Tensor,  # [B,...] x1
    t: Tensor,  # [B] what the network is told
    m: Tensor,  # [B] where its input is taken; m = t is plain flow matching
    interpolant: Interpolant,
    *,
    perturbation: Tensor | None = None,  # [B,...] added to the noise of the input, not to that of the target
    min_remaining: float | None = None,  # None: the target is u_t; else `endpoint_target` with this
) -> Tensor:
    """Return the squared error || v(x_m, t) - u_t ||^2 of each sample, averaged over its elements, float32 [B].

    arXiv 2512.19311, Algorithm 1. On the linear path u is x1 - x0 at every time. On a curved path (GVP) the target is
    that of t, not of m: the paper tries both and finds that t converges about five times faster; the authors' RAE code
    does the same.

    With a perturbation of 0.1 xi, xi ~ N(0, I), it is input perturbation (Ning et al., arXiv 2301.11706): the
    input has the noise x0 + 0.1 xi, the target has x0. With `min_remaining` the target leads from the input to the
    data: MixFlow's loss for a network that predicts the data (docs/arms.md).
    """
    x = interpolant.interpolate(noise if perturbation is None else noise + perturbation, data, m)
    target = (
        interpolant.velocity(noise, data, t) if min_remaining is None else endpoint_target(x, data, t, min_remaining)
    )
    return _squared_error(network(x, t), target)


def self_rollout_loss(
    network: Network,
    noise: Tensor,  # [B,...] x0
    data: Tensor,  # [B,...] x1
    t: Tensor,  # [B] what the network is told where the step has arrived
    interpolant: Interpolant,
    *,
    step_size: float,  # h, before the shift
    shift: float,  # of the times, as in shift_time
    min_remaining: float,  # see `endpoint_target`
) -> Tensor:
    """Return || v(xh, t) - (x1 - xh) / (1 - t) ||^2 of each sample, averaged over its elements, float32 [B].

    xh = x_s + (t - s) v(x_s, s) is one Euler step of the network itself from the true x_s at s = max(t - h, 0), through
    which no gradient flows. One point of SOAR without guidance and without its fresh noise (arXiv 2604.12617; the input
    is that of SDSS): the network sees its own errors, and is told to mend them. On the linear path alone.

    The step is taken by the weights that are being trained, with the labels (dropped or not) that `network` holds, and
    in train mode: apart from labels that they drop themselves, these networks do the same in either mode.
    """
    s = shift_time((shift_time(t, 1 / shift) - step_size).clamp_min(0), shift)
    x = interpolant.interpolate(noise, data, s)
    with torch.no_grad():
        x = x + _expand(t - s, x) * network(x, s).float()
    return _squared_error(network(x, t), endpoint_target(x, data, t, min_remaining))


def endpoint_target(
    x: Tensor,  # [B,...] where the network is
    data: Tensor,  # [B,...] x1
    t: Tensor,  # [B] what it is told
    min_remaining: float,  # smallest 1 - t to divide by, for the target has no bound at t = 1
) -> Tensor:
    """Return (x1 - x) / max(1 - t, min_remaining), [B,...]: the constant velocity that reaches the data at t = 1.

    At x = x_t of the linear path it is x1 - x0, up to rounding, as long as 1 - t is not below `min_remaining`.
    """
    return (data - x) / _expand((1 - t).clamp_min(min_remaining), x)


def _squared_error(velocity: Tensor, target: Tensor) -> Tensor:
    return (velocity.float() - target.float()).square().flatten(1).mean(dim=1)


def _expand(t: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B,1,...,1] as x has axes."""
    return t.reshape(-1, *[1] * (x.ndim - 1))
