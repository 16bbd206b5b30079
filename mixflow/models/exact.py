"""Velocity fields that are known exactly, as networks: of a Gaussian, and of a mixture of equal round Gaussians.

Either is E[x1 - x0 | x_t = y] on the linear path or, with a law of times under which the network is told t but fed x_m,
the exact minimiser of that training (field v_mix below):

    v_mix(y, t) = int q(m | t) p_m(y) v(y, m) dm / int q(m | t) p_m(y) dm

with q(m | t) the law of m given t, p_m the density of x_m and v the exact field; the integral is done by quadrature.
All is computed in float64, also under autocast, and returned in the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mixflow.flow import conditional_input_times
from mixflow.flow.gaussian import marginal_std, time_information, velocity_slope
from mixflow.models.network import VelocityNetwork
from mixflow.runtime.errors import UserError

LATEST = 1 - 1e-4  # no input is read as less noisy by a law of times: without variance the density would be infinite
PANEL_NODES = 16  # Gauss-Legendre nodes of a panel,
PANEL_WIDTH = 6.0  # which spans so many standard deviations of the time that an input tells
ROWS = 2**22  # numbers of an intermediate array at a time


class ExactField(VelocityNetwork):
    """What the exact fields share: options, laws of times, and the arithmetic's precision."""

    label_dropout = 0.0

    def _keep(self, **options: Any) -> None:
        self.options = options
        self.null_label = options["num_classes"]
        self.law, self.gamma = options["law"], options["gamma"]
        conditional_input_times(self.law, self.gamma, 0.5)  # both are known and fit together

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,  # [B,C,H,W]
        t: Tensor,  # [B] or 0-dim, paper time in [0, 1]
        y: Tensor,  # [B] int64 class ids; null_label stands for no label
        drop: Tensor | None = None,  # [B] bool, labels to replace by null_label
    ) -> Tensor:  # [B,C,H,W] velocity x1 - x0, in the dtype of x
        labels = self.drop_labels(y, drop)
        with torch.autocast(x.device.type, enabled=False):
            inputs, times = x.flatten(1).double(), t.double().expand(len(x))
            velocity = torch.empty_like(inputs)
            for rows, label, at in self._groups(labels, times):
                velocity[rows] = self._velocity(inputs[rows], label, at)
        return velocity.to(x.dtype).reshape(x.shape)

    def _groups(self, labels: Tensor, times: Tensor) -> Iterator[tuple[Tensor, int, _Times]]:
        """Yield (rows [n], their label, their input times): rows that share a label and, under a law, their time."""
        every = conditional_input_times(self.law, self.gamma, 0.5) is None
        for label in labels.unique().tolist():
            of_label = (labels == label).nonzero()[:, 0]
            if every:
                yield of_label, label, _Times(times[of_label, None], None)
                continue
            for t in times[of_label].unique().tolist():
                yield of_label[times[of_label] == t], label, self._input_times(t)

    def _input_times(self, t: float) -> _Times:
        """Return the times of inputs under the law for the label t."""
        known = conditional_input_times(self.law, self.gamma, t)
        assert known is not None
        bounds, density = known
        nodes, weights = _quadrature(bounds, self._information, self._device())
        # Where the interval has no length (t = 0), or lies beyond the latest time, there is one node.
        mass = torch.ones_like(nodes) if len(nodes) == 1 else weights * density(nodes)
        return _Times(nodes[None], mass.log()[None])

    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _information(self, t: Tensor) -> Tensor:
        """Return a bound on the Fisher information on t in an input, [J] for t [J]."""
        raise NotImplementedError

    def _velocity(self, x: Tensor, label: int, times: _Times) -> Tensor:
        """Return the velocity [n,d] at x [n,d], all of one label."""
        raise NotImplementedError


class _Times(NamedTuple):
    """Where inputs may have been taken: at one time each, or at the nodes of a quadrature."""

    at: Tensor  # [n,1], or [1,J]
    log_weight: Tensor | None  # [1,J]: log of q(m | t) dm


class GaussianField(ExactField):
    """The exact field of N(mean, basis diag(variances) basis^T), the same for every label.

    Without a basis the axes of the latents are its own. Variances may be 0.
    """

    mean: Tensor  # [C,H,W]
    variances: Tensor  # [d], d = C H W
    basis: Tensor | None  # [d,d], orthonormal columns

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,  # labels below it, and it itself for none, are taken and ignored
        axes: bool,  # whether the axes of the latents are the principal ones
        law: str = "uniform",  # of times, as in mixflow.flow; where m = t the field is the exact one
        gamma: float = 0.0,
    ) -> None:
        super().__init__()
        self._keep(
            input_size=input_size, in_channels=in_channels, num_classes=num_classes, axes=axes, law=law, gamma=gamma
        )
        size = in_channels * input_size**2
        self.register_buffer("mean", torch.zeros(in_channels, input_size, input_size))
        self.register_buffer("variances", torch.ones(size))
        self.register_buffer("basis", None if axes else torch.eye(size))

    @classmethod
    def from_spectrum(
        cls,
        mean: Tensor,  # [C,H,W]
        variances: Tensor,  # [d] >= 0
        basis: Tensor | None = None,  # [d,d]; None: the axes
        *,
        num_classes: int = 1,
        law: str = "uniform",
        gamma: float = 0.0,
    ) -> Self:
        """Return the field of a Gaussian with these moments. Raises `UserError` for negative variances."""
        channels, _, size = mean.shape
        if (variances < 0).any():
            raise UserError(f"a variance of a Gaussian is {float(variances.min())}: it must be at least 0")
        field = cls(
            input_size=size,
            in_channels=channels,
            num_classes=num_classes,
            axes=basis is None,
            law=law,
            gamma=gamma,
        )
        field.mean.copy_(mean)
        field.variances.copy_(variances)
        if basis is not None and field.basis is not None:
            field.basis.copy_(basis)
        return field.eval()

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, **options: Any) -> Self:
        """Return the field of N(mean [C,H,W], covariance [d,d]); `options` as in `from_spectrum`."""
        variances, basis = torch.linalg.eigh(covariance.double())
        return cls.from_spectrum(mean, variances.clamp(min=0), basis, **options)

    @classmethod
    def fit(cls, samples: Tensor, **options: Any) -> Self:
        """Return the field of the Gaussian with the mean and covariance of samples [N,C,H,W], in float64 sums."""
        mean = samples.mean(0, dtype=torch.float64)
        centred = (samples.double() - mean).flatten(1)
        return cls.from_moments(mean, centred.T @ centred / len(samples), **options)

    def _information(self, t: Tensor) -> Tensor:
        return time_information(self.variances.double(), self._rotated(self.mean.double().flatten()), t[:, None])

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.basis is None else x @ self.basis.double()

    def _velocity(self, x: Tensor, label: int, times: _Times) -> Tensor:
        variances, mean = self.variances.double(), self._rotated(self.mean.double().flatten())
        place, at = self._rotated(x), times.at
        if times.log_weight is None:
            velocity = mean + velocity_slope(variances, at) * (place - at * mean)
        else:
            # Directions of one variance act together: of a spiked spectrum two kinds are left.
            distinct, kind = variances.unique(return_inverse=True)  # [G], [d]
            nodes = at[0][:, None]  # [J,1]
            slopes = velocity_slope(distinct, nodes)  # [J,G]
            share = self._shares(place, mean, distinct, kind, times)  # [n,J]
            velocity = mean + (share @ slopes)[:, kind] * place - (share @ (slopes * nodes))[:, kind] * mean
        return velocity if self.basis is None else velocity @ self.basis.double().T

    def _shares(self, place: Tensor, mean: Tensor, distinct: Tensor, kind: Tensor, times: _Times) -> Tensor:
        """Return the posterior of the nodes given each input, [n,J]."""
        assert times.log_weight is not None

        def by_kind(values: Tensor) -> Tensor:  # [...,d] -> [...,G]
            return values.new_zeros(*values.shape[:-1], len(distinct)).index_add_(-1, kind, values)

        at = times.at[0][:, None]  # [J,1]
        std = marginal_std(distinct, at)
        precision = std.square().reciprocal()  # [J,G]
        fit = by_kind(place.square()) @ precision.T - 2 * by_kind(place * mean) @ (at * precision).T
        fit = fit + precision @ by_kind(mean.square()) * at[:, 0].square()
        fit = fit + 2 * std.log() @ by_kind(torch.ones_like(mean))
        return (times.log_weight - fit / 2).softmax(1)


class MixtureField(ExactField):
    """The exact field of sum_k w_k N(component_k, bandwidth^2 I): with a bandwidth of 0, of a finite set of points.

    A label selects the components of its class, the null label all of them.
    """

    components: Tensor  # [K,C,H,W]
    component_labels: Tensor  # int64 [K]
    log_weights: Tensor  # [K]
    bandwidth: Tensor  # 0-dim

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        num_classes: int,
        num_components: int,
        law: str = "uniform",
        gamma: float = 0.0,
    ) -> None:
        super().__init__()
        self._keep(
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            num_components=num_components,
            law=law,
            gamma=gamma,
        )
        self.register_buffer("components", torch.zeros(num_components, in_channels, input_size, input_size))
        self.register_buffer("component_labels", torch.zeros(num_components, dtype=torch.int64))
        self.register_buffer("log_weights", torch.zeros(num_components))
        self.register_buffer("bandwidth", torch.ones(()))

    @classmethod
    def fit(
        cls,
        components: Tensor,  # [K,C,H,W]
        labels: Tensor,  # int64 [K] in [0, num_classes)
        bandwidth: float,  # standard deviation of every component
        *,
        weights: Tensor | None = None,  # [K] > 0, in any unit; None: equal
        num_classes: int | None = None,  # None: one more than the largest label
        law: str = "uniform",
        gamma: float = 0.0,
    ) -> Self:
        """Return the field of the kernel density estimate of these points. `UserError` for a class without any."""
        classes = int(labels.max()) + 1 if num_classes is None else num_classes
        if missing := set(range(classes)) - set(labels.tolist()):
            raise UserError(f"class {min(missing)} has no component: give it one, or lower num_classes")
        if bandwidth < 0:
            raise UserError(f"the bandwidth is {bandwidth}: it must be at least 0")
        number, channels, _, size = components.shape
        field = cls(
            input_size=size,
            in_channels=channels,
            num_classes=classes,
            num_components=number,
            law=law,
            gamma=gamma,
        )
        field.components.copy_(components)
        field.component_labels.copy_(labels)
        if weights is not None:
            field.log_weights.copy_((weights / weights.sum()).log())
        field.bandwidth.fill_(bandwidth)
        return field.eval()

    def _information(self, t: Tensor) -> Tensor:
        size = self.components[0].numel()
        variances = self.bandwidth.double().square().expand(1)
        energies = self.components.flatten(1).square().sum(1, dtype=torch.float64)
        one = time_information(variances, torch.zeros_like(variances), t[:, None])
        return size * one + energies.max() / marginal_std(variances, t[:, None])[:, 0].square()

    def _velocity(self, x: Tensor, label: int, times: _Times) -> Tensor:
        chosen = slice(None) if label == self.null_label else self.component_labels == label
        centres = self.components[chosen].flatten(1).double()  # [K,d]
        energies, log_weights = centres.square().sum(1), self.log_weights[chosen].double()
        rows = max(1, ROWS // (len(centres) * times.at.shape[1]))
        velocity = torch.empty_like(x)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            at = times.at[part] if times.log_weight is None else times.at
            velocity[part] = self._of_rows(x[part], at, times.log_weight, centres, energies, log_weights)
        return velocity

    def _of_rows(
        self,
        x: Tensor,  # [n,d]
        at: Tensor,  # [n,1] or [1,J]
        log_weight: Tensor | None,  # [1,J]
        centres: Tensor,  # [K,d]
        energies: Tensor,  # [K], squared norms of the centres
        log_weights: Tensor,  # [K]
    ) -> Tensor:
        variances = self.bandwidth.double().square().expand(1)
        slope = velocity_slope(variances, at)  # [n,1] or [1,J], of every component and direction
        variance = marginal_std(variances, at).square()
        variance = torch.where(variance == 0, 1.0, variance)  # at a point at t=1 all agree
        overlaps = (x @ centres.T)[:, :, None]  # [n,K,1]
        times = at[:, None]  # [n,1,1] or [1,1,J]
        distances = x.square().sum(1)[:, None, None] - 2 * times * overlaps + times.square() * energies[:, None]
        logits = log_weights[:, None] - distances / (2 * variance[:, None])  # [n,K,J]
        if log_weight is not None:
            logits = logits + (log_weight - x.shape[1] / 2 * variance.log())[:, None]
        shares = logits.flatten(1).softmax(1).view_as(logits)
        # sum over k and m of share [c_k + a (x - m c_k)]
        of_centres = (shares * (1 - slope * at)[:, None]).sum(2)  # [n,K]
        of_place = (shares * slope[:, None]).sum((1, 2))  # [n]
        return of_centres @ centres + of_place[:, None] * x


def _quadrature(
    bounds: tuple[float, ...],  # ascending times between which the density of m is smooth
    information: Callable[[Tensor], Tensor],  # on t in an input
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return nodes and weights [J] on the span of `bounds`: Gauss-Legendre panels of equal length in -log(1 - m).

    In that variable the precision with which an input tells its time is bounded (null directions keep it constant), and
    panels are short enough for it to be resolved anywhere.
    """
    ends = [-math.log1p(-min(bound, LATEST)) for bound in bounds]
    if ends[-1] - ends[0] < 1e-12:
        return torch.full((1,), min(bounds[0], LATEST), device=device).double(), torch.ones(1, device=device).double()
    line = torch.linspace(ends[0], ends[-1], 65, dtype=torch.float64, device=device)
    sharpest = float((information(-torch.expm1(-line)).sqrt() * torch.exp(-line)).max())
    place, weight = np.polynomial.legendre.leggauss(PANEL_NODES)
    nodes, weights = [], []
    for low, high in pairwise(ends):
        panels = max(1, math.ceil((high - low) * sharpest / PANEL_WIDTH))
        edges = np.linspace(low, high, panels + 1)
        half = np.diff(edges)[:, None] / 2
        nodes.append((edges[:-1, None] + half * (1 + place)).ravel())
        weights.append((half * weight).ravel())
    found = torch.from_numpy(np.concatenate(nodes)).to(device)
    noise = torch.exp(-found)
    return 1 - noise, torch.from_numpy(np.concatenate(weights)).to(device) * noise  # dm = (1 - m) d(-log(1 - m))
