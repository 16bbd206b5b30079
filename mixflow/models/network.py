"""What every family of networks offers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class VelocityNetwork(nn.Module):
    """A velocity network v(x_t, t, y) on square latents, called as `net(x, t, y, drop=None)`, in paper time.

    x [B,C,H,W] in the dtype of the weights unless under autocast; t [B] or 0-dim (the same for all) in [0, 1]; y [B]
    int64 class ids, where null_label stands for no label; drop [B] bool, the labels to replace by it (None: random in
    train mode). Returns the velocity x1 - x0, [B,C,H,W].
    """

    options: dict[str, Any]  # the constructor's, spelled out
    label_dropout: float  # probability of training without the label
    null_label: int | None  # the class id that stands for "no label", None where the label table has no such row

    def drop_labels(self, y: Tensor, drop: Tensor | None) -> Tensor:
        """Return the labels [B] with those under the mask replaced by the null class (classifier-free guidance)."""
        if drop is None and self.training and self.label_dropout > 0:
            drop = torch.rand(len(y), device=y.device) < self.label_dropout
        if drop is None:
            return y
        assert self.null_label is not None, "a network with label_dropout 0 has no null class"
        return torch.where(drop, self.null_label, y)
