"""A small image classifier; its penultimate layer is the feature space where Inception knows nothing of the images."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixflow.evaluation.arrays import Array, as_tensor
from mixflow.runtime.errors import UserError
from mixflow.runtime.own_weights import read_own_weights, write_own_weights

# Random shifts in training, so that features do not hinge on single pixels.
_MAX_SHIFT_PIXELS = 2


class Classifier(nn.Module):
    """Three strided convolutions, global average pool, features, class scores. Any resolution from 8 pixels up."""

    def __init__(
        self,
        in_channels: int,  # 1 (grey) or 3
        num_classes: int,
        width: int = 32,  # channels of the second convolution; half as many in the first, twice as many in the third
        num_features: int = 64,  # size of the space in which Fréchet distances are measured
    ) -> None:
        super().__init__()
        self.settings = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "width": width,
            "num_features": num_features,
        }
        half = (width + 1) // 2
        self.conv1 = nn.Conv2d(in_channels, half, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(half, width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(1, half)
        self.norm2 = nn.GroupNorm(1, width)
        self.norm3 = nn.GroupNorm(1, 2 * width)
        self.features = nn.Linear(2 * width, num_features)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, num_features] and logits [B, num_classes] of `x` [B, in_channels, H, W] in [-1, 1]."""
        # SiLU and not ReLU: a feature that is never active would make every covariance singular.
        x = F.silu(self.norm1(self.conv1(x)))  # [B,w/2,H/2,W/2]
        x = F.silu(self.norm2(self.conv2(x)))  # [B,w,H/4,W/4]
        x = F.silu(self.norm3(self.conv3(x)))  # [B,2w,H/8,W/8]
        features = F.silu(self.features(x.mean(dim=(2, 3))))
        return features, self.head(features)

    @torch.no_grad()
    def features_and_logits(self, images: Array) -> tuple[Tensor, Tensor]:
        """Return float32 features [B, num_features] and logits [B, num_classes], bias included.

        `images` are uint8 [B, H, W, 1 or 3], on any device; a network of grey images averages the channels, one of
        colour images repeats a single channel. Raises `UserError` for another shape or type.
        """
        pixels = checked_images(images).to(self.head.weight.device)
        return self(self.network_input(pixels))

    def network_input(self, pixels: Tensor) -> Tensor:
        """Return uint8 `pixels` [B, H, W, 1 or 3] as float32 [B, in_channels, H, W] in [-1, 1]."""
        x = pixels.float().permute(0, 3, 1, 2) / 127.5 - 1
        in_channels = self.settings["in_channels"]
        if x.shape[1] != in_channels:
            x = x.mean(dim=1, keepdim=True).expand(-1, in_channels, -1, -1)
        return x.contiguous(memory_format=torch.channels_last)


def checked_images(images: Array) -> Tensor:
    """Return `images` as a uint8 tensor [B, H, W, 1 or 3], or raise `UserError`."""
    pixels = as_tensor(images)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise UserError(
            f"images must be uint8 of shape [B, H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}: "
            "convert them to 0..255 first"
        )
    return pixels


def train_classifier(
    images: Array,  # uint8 [N, H, W, 1 or 3]; the network is trained on the device they lie on
    labels: Array,  # integers [N] in 0..num_classes-1
    *,
    width: int,
    num_features: int,
    num_steps: int,
    batch_size: int,
    learning_rate: float,  # the first step's; falls to zero along half a cosine
    seed: int,
    num_classes: int,
) -> Classifier:
    """Train a `Classifier` with AdamW on randomly shifted images; return it in eval mode.

    Initial weights, data order and shifts follow from `seed` alone, and the global random state is left as it was. Grey
    images, also those stored with three equal channels, get a network of one input channel.

    Raises `UserError` for images or labels of the wrong shape, type or range.
    """
    pixels = checked_images(images)
    targets = as_tensor(labels).long().to(pixels.device)
    if targets.shape != pixels.shape[:1] or len(pixels) == 0:
        raise UserError(
            f"{len(pixels)} images need as many labels, got labels of shape {list(targets.shape)}: give one per image"
        )
    if int(targets.min()) < 0 or int(targets.max()) >= num_classes:
        raise UserError(
            f"labels reach from {int(targets.min())} to {int(targets.max())} where num_classes = {num_classes} allows "
            f"0 to {num_classes - 1}: correct num_classes or the labels"
        )
    is_grey = torch.equal(pixels, pixels[..., :1].expand_as(pixels))
    pixels = pixels[..., :1] if is_grey else pixels
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators as well.
        torch.default_generator.manual_seed(seed)
        classifier = Classifier(1 if is_grey else 3, num_classes, width, num_features)
    classifier.to(pixels.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    # Drawn on the CPU, so that every device sees the same data.
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        index = torch.randint(len(pixels), (batch_size,), generator=generator).to(pixels.device)
        batch = _shifted(pixels[index], generator)
        _, logits = classifier(classifier.network_input(batch))
        loss = F.cross_entropy(logits, targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval()


def _shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image of `pixels` [B, H, W, C] by up to two pixels either way; edges are repeated."""
    batch, height, width, _ = pixels.shape
    shifts = torch.randint(-_MAX_SHIFT_PIXELS, _MAX_SHIFT_PIXELS + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + shifts[0]).clamp(0, height - 1).to(pixels.device)  # [B,H]
    columns = (torch.arange(width) + shifts[1]).clamp(0, width - 1).to(pixels.device)  # [B,W]
    image = torch.arange(batch, device=pixels.device)[:, None, None]
    return pixels[image, rows[:, :, None], columns[:, None, :]]


def save_classifier(path: str | os.PathLike[str], classifier: Classifier) -> None:
    """Write weights and sizes as `write_own_weights` does."""
    write_own_weights(path, "classifier", classifier.state_dict(), classifier.settings)


def load_classifier(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Classifier:
    """Read what `save_classifier` wrote, in eval mode. Raises `UserError` as `read_own_weights` does."""
    weights, settings = read_own_weights(path, "classifier", "train-extractor")
    classifier = Classifier(**settings)
    classifier.load_state_dict(weights)
    return classifier.to(device).eval()
