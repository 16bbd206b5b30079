"""Flow matching, with the slowed input of MixFlow."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mixflow.flow.interpolants import Interpolant


def flow_matching_loss(
    network: Callable[[Tensor, Tensor], Tensor],  # (x [B,...], t [B]) -> velocity [B,...]; labels already bound
    noise: Tensor,  # [B,...] x0
    data: Tensor,  # [B,...] x1
    t: Tensor,  # [B] what the network is told
    m: Tensor,  # [B] where its input is taken; m = t is plain flow matching
    interpolant: Interpolant,
) -> Tensor:
    """Return the squared error || v(x_m, t) - u_t ||^2 of each sample, averaged over its elements, float32 [B].

    arXiv 2512.19311, Algorithm 1. On the linear path u is x1 - x0 at every time. On a curved path (GVP) the target is
    that of t, not of m: the paper tries both and finds that t converges about five times faster; the authors' RAE code
    does the same.
    """
    target = interpolant.velocity(noise, data, t)
    velocity = network(interpolant.interpolate(noise, data, m), t)
    return (velocity.float() - target.float()).square().flatten(1).mean(dim=1)
