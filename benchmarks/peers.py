"""What the peers' loops do, for the benchmarks to time: written from their behaviour, in terms of this package."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixflow.flow import Linear


class SitTraining:
    """SiT's training step: AdamW as it comes, EMA parameter by parameter, the loss read after every step."""

    def __init__(self, network: nn.Module, learning_rate: float = 1e-4, ema_decay: float = 0.9999) -> None:
        self.network, self.ema_decay = network.train(), ema_decay
        self.ema = copy.deepcopy(network).requires_grad_(False)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0)

    def step(self, noise: Tensor, data: Tensor, t: Tensor, labels: Tensor, drop: Tensor) -> float:
        """Train on one batch [B,C,H,W] and return its loss."""
        path = Linear()
        velocity = self.network(path.interpolate(noise, data, t), t, labels, drop=drop)
        loss = (velocity - path.velocity(noise, data, t)).square().mean(dim=(1, 2, 3)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._update_ema()
        return loss.item()

    @torch.no_grad()
    def _update_ema(self) -> None:
        averages = dict(self.ema.named_parameters())
        for name, parameter in self.network.named_parameters():
            averages[name].mul_(self.ema_decay).add_(parameter, alpha=1 - self.ema_decay)


def sit_sde(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, noise_at: Callable[[int], Tensor]
) -> Tensor:
    """SiT's SDE: x' = x + [v + w score] dt + sqrt(2 w dt) n with w = sigma, the last step without noise.

    Drift and score each ask the network.
    """
    path = Linear()
    for step, (t, t_next) in enumerate(itertools.pairwise(times)):
        dt, w = float(t_next - t), float(path.sigma(t))
        at = t.to(x.dtype)
        drift = velocity(x, at)
        score = path.score(velocity(x, at), x, at)
        x = x + (drift + w * score) * dt
        if step < len(times) - 2:
            x = x + math.sqrt(2 * w * dt) * noise_at(step)
    return x


def repa_sde(
    network: nn.Module,
    x: Tensor,  # [B,C,H,W] float32
    labels: Tensor,  # [B]
    *,
    scale: float,
    interval: tuple[float, float],  # in REPA's time, t=1 noise and t=0 data, where its guidance acts
    num_steps: int,
    noise_at: Callable[[int], Tensor],  # float64
) -> Tensor:
    """REPA's SDE: num_steps points from 1 to 0.04, then a step to 0 without noise, float64 state, float32 network.

    Its network puts out the projections in sampling too, which nobody looks at.
    """
    dtype, x = x.dtype, x.double()
    null = torch.full_like(labels, network.null_label)
    times = [*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]
    for step, (t, t_next) in enumerate(itertools.pairwise(times)):
        guided = scale > 1 and interval[0] <= t <= interval[1]
        inputs, y = (torch.cat([x, x]), torch.cat([labels, null])) if guided else (x, labels)
        at = torch.full((len(inputs),), t, dtype=torch.float64, device=x.device).to(dtype)
        v = -network(inputs.to(dtype), 1 - at, y, with_projections=True)[0].double()
        if guided:
            cond, uncond = v.chunk(2)
            v = uncond + scale * (cond - uncond)
        dt = t_next - t
        x = x + ((2 - t) * v + x) * dt
        if step < num_steps - 1:
            x = x + math.sqrt(2 * t * -dt) * noise_at(step)
    return x
