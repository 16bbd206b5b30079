"""What others do to a sampler against exposure bias, on top of any velocity, on the linear path.

Each acts on the velocity that the solver follows, so that under guidance it sees the guided one. With h = t' - t, x the
state at t and v the velocity there: the noise estimate is e = x - t v, the data estimate D = x + (1 - t) v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from mixflow.sampling.guidance import GuidedVelocity

EDGE = 1e-6  # a time that linspace has rounded still lies on the edge that it was meant to, as in guidance


def epsilon_scaled(
    velocity: GuidedVelocity,
    factor: float,  # l, by which the predicted noise is divided; 1 is none
    start: float,  # acts for t >= start > 0: at t = 0 it has no finite value
) -> GuidedVelocity:
    """Return v + (1 - 1/l) e / t, which is what v is when e/l takes the place of e.

    Epsilon scaling (Ning et al., arXiv 2308.15321) divides the noise that a network predicts. With the data estimate
    that belongs to it, D = (x - (1 - t) e/l) / t, the velocity is D - e/l = (x - e/l) / t, where v is (x - e) / t.
    Under Euler, which on this path is DDIM, that is the published sampler.
    """

    def scaled(x: Tensor, t: Tensor, decided_at: Tensor | None = None) -> Tensor:
        v = velocity(x, t, decided_at)
        if float(t) < start - EDGE:
            return v
        return v + (1 - 1 / factor) / float(t) * (x - float(t) * v)

    return scaled


def time_shifted(
    velocity: GuidedVelocity,
    clock: Callable[[Tensor], Tensor],  # states [B,C,H,W] -> the time that they look like, [B]
    window: float,  # w: labels stay within w/2 of t; 0 is none
    interval: tuple[float, float],  # acts for t in [low, high]
) -> GuidedVelocity:
    """Return v(x, told) with `told` the clock's reading of each x, held in [t - w/2, t + w/2] and in [0, 1].

    The time-shift sampler (Li et al., arXiv 2305.15583, algorithm 3) tells the network, within a window around the next
    time, the one whose variance is nearest to the state's, and none so near to the data. On the linear path the
    variance does not tell times apart (it falls and rises again), so a learned clock reads them. The steps stay as they
    are: the label alone moves. Guidance is decided by t, and its two calls are told the same.
    """
    low, high = interval

    def shifted(x: Tensor, t: Tensor, decided_at: Tensor | None = None) -> Tensor:
        if not low - EDGE <= float(t) <= high + EDGE:
            return velocity(x, t, decided_at)
        now = float(t)
        read = clock(x).to(t.dtype).clamp(now - window / 2, now + window / 2)
        return velocity(x, read.clamp(0, 1), t if decided_at is None else decided_at)

    return shifted


Correction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x', D [B,C,H,W], t 0-dim) -> the corrected x'


def differential_correction(
    band: Literal["low", "pixel"],
    strength: float,  # c; 0 is none
) -> Correction:
    """Return what is done after each step to x': it is pushed away from the data estimate D of the step's last call.

    DCW, "differential correction in wavelet domain" (arXiv 2604.16044 and its code). "pixel": x' + c (x' - D), which
    for Euler is a step shorter by c (1 - t'), since x' - D = -(1 - t') v. "low": the same on the low band of a Haar
    transform of one level, with c (1 - t) for c, the noise level at the step's start over its largest. That band of a
    difference is its mean over blocks of 2x2, which has to be added to each pixel of a block: sizes must be even.
    """

    def corrected(x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        difference = x - denoised
        if band == "pixel":
            return x + strength * difference
        means = F.avg_pool2d(difference, 2)
        return x + strength * (1 - float(t)) * F.interpolate(means, scale_factor=2, mode="nearest")

    return corrected
