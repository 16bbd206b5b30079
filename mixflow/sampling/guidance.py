"""Classifier-free guidance (arXiv 2207.12598) and autoguidance (arXiv 2406.02507), computed only where they act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mixflow.runtime.errors import UserError

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [B,C,H,W], t [B], y [B] -> velocity [B,C,H,W]

# A time that linspace has rounded still lies on the edge of the interval that it was meant to.
EDGE = 1e-6


class GuidedVelocity(Protocol):
    """A velocity with guidance; solvers that know nothing of guidance call it with x and t alone.

    One t holds for the whole batch, so that where guidance acts is decided once per call and on the host; only what the
    network is told may differ between samples, and then `decided_at` has to be given.
    """

    def __call__(
        self,
        x: Tensor,  # [B,C,H,W]
        t: Tensor,  # 0-dim, or [B] on the device of x
        decided_at: Tensor | None = None,  # 0-dim, the time that must lie in the interval; None: t itself
    ) -> Tensor: ...


def guided_velocity(
    network: Network,
    labels: Tensor,  # [B] int64
    null_label: int | None,  # class id that stands for no label; None where the network has none
    scale: float,  # 1 is off
    *,
    channels: int | None = None,  # guide the first so many channels, the others stay conditional (SiT: 3); None: all
    interval: tuple[float, float] = (0.0, 1.0),  # guide for t in [low, high], paper time (arXiv 2404.07724)
    network_dtype: torch.dtype | None = None,  # in which the network is handed x and t; None: that of x
) -> GuidedVelocity:
    """Return velocity(x [B,C,H,W], t 0-dim) = v(null) + scale (v(label) - v(null)), [B,C,H,W] in the dtype of x.

    One call of the network on 2B rows where guidance acts, on B rows elsewhere. Raises `UserError` for guidance without
    a null label, an empty interval, and more channels than there are.
    """
    if channels is not None and channels < 1:
        raise UserError(f"guidance channels is {channels}: it must be at least 1, or None for all")
    acts_at = _interval_test(interval)

    def conditional(x: Tensor, t: Tensor, decided_at: Tensor | None = None) -> Tensor:
        return _call(network, x, t, labels, network_dtype)

    if scale == 1:
        return conditional

    if null_label is None:
        raise UserError(f"guidance scale is {scale} but the network has no null label: use scale 1")
    labels_and_null = torch.cat([labels, torch.full_like(labels, null_label)])

    def velocity(x: Tensor, t: Tensor, decided_at: Tensor | None = None) -> Tensor:
        if not acts_at(t if decided_at is None else decided_at):
            return conditional(x, t)
        if channels is not None and channels > x.shape[1]:
            raise UserError(f"guidance channels is {channels} but the latents have {x.shape[1]}: lower it, or use None")
        cond, null = _call(network, torch.cat([x, x]), t, labels_and_null, network_dtype).chunk(2)
        guided = _extrapolate(null, cond, scale)
        return guided if channels is None else torch.cat([guided[:, :channels], cond[:, channels:]], dim=1)

    return velocity


def autoguided_velocity(
    network: Network,
    guide: Network,  # a smaller or less trained network of the same latents and labels
    labels: Tensor,  # [B] int64, told to both
    scale: float,  # 1 is off: the guide is never called
    *,
    interval: tuple[float, float] = (0.0, 1.0),  # guide for t in [low, high], paper time
    network_dtype: torch.dtype | None = None,  # in which the networks are handed x and t; None: that of x
) -> GuidedVelocity:
    """Return velocity(x [B,C,H,W], t 0-dim) = v(guide) + scale (v(network) - v(guide)), [B,C,H,W] in the dtype of x.

    Autoguidance is defined for denoisers; at given x and t a denoiser is affine in its velocity, so this is the same.
    Each network is called on B rows, the guide only where guidance acts. Raises `UserError` for an empty interval.
    """
    acts_at = _interval_test(interval)

    def velocity(x: Tensor, t: Tensor, decided_at: Tensor | None = None) -> Tensor:
        strong = _call(network, x, t, labels, network_dtype)
        if scale == 1 or not acts_at(t if decided_at is None else decided_at):
            return strong
        return _extrapolate(_call(guide, x, t, labels, network_dtype), strong, scale)

    return velocity


class CountedNetwork:
    """A network or clock that counts what it is asked: `rows` over the number of images is the cost of one image."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self.calls = 0
        self.rows = 0

    def __call__(self, x: Tensor, *told: Tensor) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        return self.network(x, *told)


def _interval_test(interval: tuple[float, float]) -> Callable[[Tensor], bool]:
    """Return the test whether guidance acts at a time (0-dim, on the CPU). Raises `UserError` for an empty interval."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"the guidance interval is [{low}, {high}]: it must satisfy 0 <= low <= high <= 1")
    return lambda t: low - EDGE <= float(t) <= high + EDGE


def _call(network: Network, x: Tensor, t: Tensor, y: Tensor, network_dtype: torch.dtype | None) -> Tensor:
    inputs = x if network_dtype is None else x.to(network_dtype)
    if t.ndim:
        at = t.to(inputs.dtype).repeat(len(inputs) // len(t))  # guided inputs stand there twice
    else:
        # Filled from a host number: solvers keep t on the CPU, so that no step waits for the device.
        at = torch.full((len(inputs),), float(t), dtype=inputs.dtype, device=inputs.device)
    return network(inputs, at, y).to(x.dtype)


def _extrapolate(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    # In the precision of the state, for the scale magnifies the rounding of the difference.
    return weak + scale * (strong - weak)
