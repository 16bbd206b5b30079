"""A small network that reads the time off a state: the learned clock of latents (time-conditioning is not needed)."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixflow.runtime.own_weights import read_own_weights, write_own_weights


class Clock(nn.Module):
    """g(x_t) -> t: three convolutions, spatial means of features and of their squares, two linear layers.

    Trained with squared error on true interpolants x_t, t ~ U[0, 1], it is E[t | x_t]. Latents of any size. No
    normalisation: the amplitude of x is what it reads.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.options = {"in_channels": in_channels, "width": width}
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.hidden = nn.Linear(6 * width, 2 * width)
        self.head = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the time in [0, 1], float32 [B], of states x [B,C,H,W] of any floating dtype.

        In float32 also under autocast: bfloat16 would tell times to two digits.
        """
        with torch.autocast(x.device.type, enabled=False):
            pooled, h = [], x.float()
            for conv in (self.conv1, self.conv2, self.conv3):
                h = F.silu(conv(h))
                pooled += [h.mean(dim=(2, 3)), h.square().mean(dim=(2, 3))]
            return self.head(F.silu(self.hidden(torch.cat(pooled, dim=1))))[:, 0].sigmoid()


def save_clock(path: str | os.PathLike[str], weights: dict[str, Tensor], options: dict[str, int]) -> None:
    """Write a clock's state dict and options as `write_own_weights` does."""
    write_own_weights(path, "clock", weights, options)


def load_clock(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Clock:
    """Read what `save_clock` wrote, in eval mode. Raises `UserError` as `read_own_weights` does."""
    weights, options = read_own_weights(path, "clock", "train-clock")
    clock = Clock(**options)
    clock.load_state_dict(weights)
    return clock.to(device).eval().requires_grad_(False)
