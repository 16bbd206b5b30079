"""Paths from noise (t=0) to data (t=1): x_t = alpha(t) x1 + sigma(t) x0, with x0 noise and x1 data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Interpolant(ABC):
    """A path. `t` is [B] or 0-dim, in [0, 1]; noise, data, x and velocity are [B,...]."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor: ...

    def interpolate(self, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha x1 + sigma x0, [B,...]."""
        t = _expand(t, data)
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """Return u_t = alpha' x1 + sigma' x0, [B,...]: the regression target of flow matching."""
        t = _expand(t, data)
        return self.alpha_dot(t) * data + self.sigma_dot(t) * noise

    def denoised(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return E[x1 | x_t = x], [B,...], given E[u_t | x_t = x]. Also the end of a Tweedie step."""
        t = _expand(t, x)
        return (self.sigma(t) * velocity - self.sigma_dot(t) * x) / self._wronskian(t)

    def score(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return grad log p_t(x) = -E[x0 | x_t = x] / sigma, [B,...], given E[u_t | x_t = x]. Infinite at t=1."""
        t = _expand(t, x)
        return (self.alpha(t) * velocity - self.alpha_dot(t) * x) / (self.sigma(t) * self._wronskian(t))

    def _wronskian(self, t: Tensor) -> Tensor:
        # Determinant of the linear map (x1, x0) -> (x_t, u_t), so that it inverts without dividing by alpha or alpha'.
        return self.alpha_dot(t) * self.sigma(t) - self.alpha(t) * self.sigma_dot(t)


class Linear(Interpolant):
    """Straight path x_t = t x1 + (1 - t) x0; its velocity x1 - x0 does not depend on t."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


class GVP(Interpolant):
    """Generalised variance-preserving path of SiT (arXiv 2401.08740): alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(0.5 * math.pi * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * torch.cos(0.5 * math.pi * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)


INTERPOLANTS: dict[str, Interpolant] = {"linear": Linear(), "gvp": GVP()}


def _expand(t: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B,1,...,1] as x has axes. 0-dim stays: it broadcasts without raising the dtype of x."""
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t
