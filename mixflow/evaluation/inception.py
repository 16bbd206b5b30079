"""The Inception network of 2015-12-05, whose features FID, sFID, IS, precision and recall are made of.

Weights come under the key names of torch-fidelity (and pytorch-fid). The graph is written out here because importing
torch-fidelity takes longer than a small evaluation and its own loader runs code from the file; a test holds the two
together. It differs from torchvision's Inception in its weights, its 1008 outputs and its pools.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mixflow.evaluation.arrays import Array, as_tensor
from mixflow.evaluation.resize import resize_tf1
from mixflow.runtime.arithmetic import float32_products
from mixflow.runtime.errors import UserError

INPUT_SIZE = 299  # pixels
NUM_CLASSES = 1008
# sFID looks at 7 of the 192 channels of `mixed_6/conv` in TensorFlow's graph: 17 * 17 * 7 = 2023 numbers.
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
_BATCH_NORM_EPSILON = 1e-3
_SMALLEST_INPUT = 75  # pixels, of which one is left at the end

# Convolutions of each kind of block: name -> (output channels, kernel height, kernel width).
_A = {
    "branch1x1": (64, 1, 1),
    "branch5x5_1": (48, 1, 1),
    "branch5x5_2": (64, 5, 5),
    "branch3x3dbl_1": (64, 1, 1),
    "branch3x3dbl_2": (96, 3, 3),
    "branch3x3dbl_3": (96, 3, 3),
}
_B = {
    "branch3x3": (384, 3, 3),
    "branch3x3dbl_1": (64, 1, 1),
    "branch3x3dbl_2": (96, 3, 3),
    "branch3x3dbl_3": (96, 3, 3),
}
_D = {
    "branch3x3_1": (192, 1, 1),
    "branch3x3_2": (320, 3, 3),
    "branch7x7x3_1": (192, 1, 1),
    "branch7x7x3_2": (192, 1, 7),
    "branch7x7x3_3": (192, 7, 1),
    "branch7x7x3_4": (192, 3, 3),
}
_E = {
    "branch1x1": (320, 1, 1),
    "branch3x3_1": (384, 1, 1),
    "branch3x3_2a": (384, 1, 3),
    "branch3x3_2b": (384, 3, 1),
    "branch3x3dbl_1": (448, 1, 1),
    "branch3x3dbl_2": (384, 3, 3),
    "branch3x3dbl_3a": (384, 1, 3),
    "branch3x3dbl_3b": (384, 3, 1),
    "branch_pool": (192, 1, 1),
}


def _c(width: int) -> dict[str, tuple[int, int, int]]:
    return {
        "branch1x1": (192, 1, 1),
        "branch7x7_1": (width, 1, 1),
        "branch7x7_2": (width, 1, 7),
        "branch7x7_3": (192, 7, 1),
        "branch7x7dbl_1": (width, 1, 1),
        "branch7x7dbl_2": (width, 7, 1),
        "branch7x7dbl_3": (width, 1, 7),
        "branch7x7dbl_4": (width, 7, 1),
        "branch7x7dbl_5": (192, 1, 7),
        "branch_pool": (192, 1, 1),
    }


_BLOCKS = {
    "Mixed_5b": {**_A, "branch_pool": (32, 1, 1)},
    "Mixed_5c": {**_A, "branch_pool": (64, 1, 1)},
    "Mixed_5d": {**_A, "branch_pool": (64, 1, 1)},
    "Mixed_6a": _B,
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _D,
    "Mixed_7b": _E,
    "Mixed_7c": _E,
}
_CONVOLUTIONS = {
    "Conv2d_1a_3x3": (32, 3, 3),
    "Conv2d_2a_3x3": (32, 3, 3),
    "Conv2d_2b_3x3": (64, 3, 3),
    "Conv2d_3b_1x1": (80, 1, 1),
    "Conv2d_4a_3x3": (192, 3, 3),
    **{f"{block}.{name}": sizes for block, nodes in _BLOCKS.items() for name, sizes in nodes.items()},
}
_STRIDE_2 = {
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
}
_UNPADDED = _STRIDE_2 | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}
_CONVOLUTION_KEYS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


class Inception:
    """Inception in float32; batch norms are folded into the convolutions. Widths follow the weights."""

    num_features: int  # of pool_3: 2048
    num_classes: int  # 1008
    tf32: bool  # whether CUDA may round the factors of its products to TF32
    _classes: Tensor  # [num_classes, num_features]

    def __init__(
        self,
        state_dict: Mapping[str, Tensor],  # torch-fidelity's key names
        device: torch.device | str = "cpu",
        source: str = "the given state dict",  # what to call it in messages
        tf32: bool = False,  # let CUDA round the factors of products to TF32, as TensorFlow does; the CPU never does
    ) -> None:
        """Raises `UserError` for missing weights, or shapes that do not belong together."""
        self.device = torch.device(device)
        self.tf32 = tf32
        self._kernels: dict[str, tuple[Tensor, Tensor]] = {}
        names = [f"{node}.{key}" for node in _CONVOLUTIONS for key in _CONVOLUTION_KEYS]
        missing = [name for name in [*names, "fc.weight"] if name not in state_dict]
        if missing:
            raise UserError(
                f"{source} is not the Inception network of torch-fidelity ('{missing[0]}' and {len(missing) - 1} more "
                "are missing): give weights-inception-2015-12-05-6726825d.pth"
            )
        if not self._take_kernels(state_dict):
            raise UserError(f"the shapes in {source} make no Inception network: fetch the file again, or make it again")
        self._classes = self._classes.to(self.device)
        for node, (weight, bias) in self._kernels.items():
            self._kernels[node] = weight.to(self.device), bias.to(self.device)

    def _take_kernels(self, state_dict: Mapping[str, Tensor]) -> bool:
        """Fold batch norms into convolutions; return whether an image then passes through them all."""
        try:
            self._classes = state_dict["fc.weight"].float()
            self.num_classes, self.num_features = self._classes.shape
            for node in _CONVOLUTIONS:
                weight, gamma, beta, mean, variance = (
                    state_dict[f"{node}.{key}"].double() for key in _CONVOLUTION_KEYS
                )
                scale = gamma / (variance + _BATCH_NORM_EPSILON).sqrt()
                kernel = (weight * scale[:, None, None, None]).float().contiguous(memory_format=torch.channels_last)
                self._kernels[node] = kernel, (beta - mean * scale).float()
            with torch.inference_mode():
                pool, _ = self._forward(torch.zeros(1, 3, _SMALLEST_INPUT, _SMALLEST_INPUT))
        except (RuntimeError, IndexError, ValueError):
            return False
        spatial_channels = len(self._kernels["Mixed_6d.branch1x1"][1])
        return pool.shape[1] == self.num_features and spatial_channels >= SPATIAL_CHANNELS

    @torch.inference_mode()
    def __call__(self, images: Array) -> tuple[Tensor, Tensor, Tensor]:
        """Return `pool_3` [B, num_features], spatial features [B, 2023] and logits [B, 1008] of images, all float32.

        Spatial features are the first seven channels of `mixed_6/conv` after its ReLU, flattened as (height, width,
        channel); logits are without bias, as the Inception Score wants them. `images` are uint8 [B, H, W, 3], resized
        by `resize_tf1` to 299 pixels and scaled to [-1, 1). Raises `UserError` as `resize_tf1` does.
        """
        pixels = as_tensor(images).to(self.device, non_blocking=True)
        resized = resize_tf1(pixels, INPUT_SIZE).permute(0, 3, 1, 2)  # [B,3,299,299], channels last in memory
        with float32_products(self.tf32):
            pool, spatial = self._forward(resized.sub_(128).div_(128))
            return pool, spatial, pool @ self._classes.T

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._chain(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")  # [B,64,147,147]
        x = self._chain(_shrink(x), "Conv2d_3b_1x1", "Conv2d_4a_3x3")  # [B,192,71,71]
        x = _shrink(x)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._block(
                block,
                [x, "branch1x1"],
                [x, "branch5x5_1", "branch5x5_2"],
                [x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
                [_average(x), "branch_pool"],
            )  # [B,256 or 288,35,35]
        shrunk = _shrink(x)
        x = self._block("Mixed_6a", [x, "branch3x3"], [x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"])
        x = torch.cat([x, shrunk], dim=1)  # [B,768,17,17]
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._block(
                block,
                [x, "branch1x1"],
                [x, "branch7x7_1", "branch7x7_2", "branch7x7_3"],
                [x, *(f"branch7x7dbl_{i}" for i in range(1, 6))],
                [_average(x), "branch_pool"],
            )
            if block == "Mixed_6d":  # branch1x1 comes first
                spatial = _spatial(x)  # [B,2023]
        shrunk = _shrink(x)
        x = self._block("Mixed_7a", [x, "branch3x3_1", "branch3x3_2"], [x, *(f"branch7x7x3_{i}" for i in range(1, 5))])
        x = torch.cat([x, shrunk], dim=1)  # [B,1280,8,8]
        for block, pool in (("Mixed_7b", _average), ("Mixed_7c", _maximum)):
            forked = self._chain(x, f"{block}.branch3x3_1")
            twice = self._chain(x, f"{block}.branch3x3dbl_1", f"{block}.branch3x3dbl_2")
            x = self._block(
                block,
                [x, "branch1x1"],
                [forked, "branch3x3_2a"],
                [forked, "branch3x3_2b"],
                [twice, "branch3x3dbl_3a"],
                [twice, "branch3x3dbl_3b"],
                [pool(x), "branch_pool"],
            )  # [B,2048,8,8]
        return x.mean(dim=(2, 3)), spatial

    def _block(self, block: str, *branches: list) -> Tensor:
        """Concatenate branches, each an input and the names of the convolutions that it passes."""
        return torch.cat([self._chain(x, *(f"{block}.{name}" for name in names)) for x, *names in branches], dim=1)

    def _chain(self, x: Tensor, *nodes: str) -> Tensor:
        for node in nodes:
            x = F.relu_(self._convolution(x, node))
        return x

    def _convolution(self, x: Tensor, node: str) -> Tensor:
        weight, bias = self._kernels[node]
        padding = (0, 0) if node in _UNPADDED else (weight.shape[2] // 2, weight.shape[3] // 2)
        return F.conv2d(x, weight, bias, stride=2 if node in _STRIDE_2 else 1, padding=padding)


def _shrink(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _average(x: Tensor) -> Tensor:
    """TensorFlow leaves the padding out of the mean."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    """The last block of this network takes the maximum where its twin takes the mean."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _spatial(x: Tensor) -> Tensor:
    """Flatten the first seven channels of [B,C,17,17] as TensorFlow does, channel by channel within a position."""
    return x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(start_dim=1)


def load_inception(path: str | os.PathLike[str], device: torch.device | str = "cpu", tf32: bool = False) -> Inception:
    """Read a .pth file of torch-fidelity's, without running code from it. `UserError` for a missing or broken file."""
    source = f"weights file '{path}'"
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist: download it first, or correct the path") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise UserError(
            f"{source} is truncated or is no plain state dict ({type(error).__name__}): fetch it again"
        ) from error
    if not isinstance(state_dict, Mapping):
        raise UserError(f"{source} holds a {type(state_dict).__name__}, not a state dict: fetch the right file")
    return Inception(state_dict, device, source, tf32)


def tiny_inception_state_dict(seed: int, width_divisor: int = 16) -> dict[str, Tensor]:
    """Return random weights under the real key names with all widths divided, 2048 / 16 = 128 features, for stand-ins.

    The batch norms hold the statistics of noise images, so that features neither vanish nor explode.
    """
    generator = torch.Generator().manual_seed(seed)
    state_dict: dict[str, Tensor] = {}

    class Builder(Inception):
        """Makes each convolution when it is first reached, for only then the channels that come in are known."""

        def __init__(self) -> None:
            self._kernels = {}

        def _convolution(self, x: Tensor, node: str) -> Tensor:
            channels, *kernel = _CONVOLUTIONS[node]
            channels = max(channels // width_divisor, SPATIAL_CHANNELS if node == "Mixed_6d.branch1x1" else 1)
            weight = torch.randn(channels, x.shape[1], *kernel, generator=generator)
            self._kernels[node] = weight, torch.zeros(channels)
            out = super()._convolution(x, node)
            mean, variance = out.mean(dim=(0, 2, 3)), out.var(dim=(0, 2, 3)) + _BATCH_NORM_EPSILON
            new = (weight, torch.ones(channels), torch.zeros(channels), mean, variance)
            state_dict.update({f"{node}.{key}": value for key, value in zip(_CONVOLUTION_KEYS, new, strict=True)})
            return (out - mean[:, None, None]) / variance.sqrt()[:, None, None]

    sizes = (10, 40, 160)  # coarse and fine, as in images
    noise = [
        F.interpolate(torch.rand(4, 3, size, size, generator=generator), INPUT_SIZE, mode="bilinear") for size in sizes
    ]
    with torch.inference_mode():
        pool, _ = Builder()._forward(torch.stack(noise).sum(dim=0) - len(sizes) / 2)
    state_dict["fc.weight"] = torch.randn(NUM_CLASSES, pool.shape[1], generator=generator)
    state_dict["fc.bias"] = torch.zeros(NUM_CLASSES)
    return {name: tensor.clone() for name, tensor in state_dict.items()}  # ordinary tensors again
