"""Counter-based random numbers: every draw is a pure function of (seed, stream, step, index), on any device.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in
tensor operations. There is no state to save, and nothing to keep in step between processes: sample 17 has the same
noise on one CPU and on eight GPUs (up to the last bit of the device's logarithm and cosine).
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """What a draw is for. Streams never overlap; the numbers are part of every result, so they never change."""

    NOISE = 0  # x0, the noise end of the path
    TIME = 1  # uniforms behind (t, m)
    LABEL_DROPOUT = 2
    FLIP = 3
    POSTERIOR = 4  # sampling the autoencoder's posterior
    LABELS = 5  # class of a generated image
    SOLVER = 6  # noise of SDE steps
    DATA_ORDER = 7
    SPLIT = 8  # which images are held out
    INIT = 9  # initial weights
    PERTURBATION = 10  # of the input's noise, in input perturbation
    COORDINATES = 20  # which coordinates of large latents are looked at
    DATA = 30  # x1, where the dataset is drawn


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words; returns four tensors of 32-bit words."""
    c0, c1, c2, c3 = (word.clone() for word in torch.broadcast_tensors(*counter))
    k0, k1 = key
    for _ in range(10):
        # 64-bit products wrap around in int64; masks recover the unsigned low and high words. In place, because on
        # small batches the allocations would cost more than the arithmetic.
        product0, product1 = c0.mul_(_MULTIPLIERS[0]), c2.mul_(_MULTIPLIERS[1])
        low0, low1 = product0 & _MASK, product1 & _MASK
        high0 = product0.bitwise_right_shift_(32).bitwise_and_(_MASK)
        high1 = product1.bitwise_right_shift_(32).bitwise_and_(_MASK)
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0), low1
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1), low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int, stream: Stream, step: int, indices: Tensor, num_words: int) -> Tensor:
    """Return uniform 32-bit words, int64 [n, num_words]; row i is a function of (seed, stream, step, indices[i])."""
    indices = indices.to(torch.int64)[:, None]  # [n,1]
    blocks = torch.arange(-(-num_words // 4), dtype=torch.int64, device=indices.device)[None, :]  # [1,ceil(w/4)]
    # The step may pass 2^32 only in theory; its high bits share a word with the stream.
    purpose = torch.full_like(indices, (int(stream) << 16) | ((step >> 32) & 0xFFFF))
    counter = (blocks, indices & _MASK, torch.full_like(indices, step & _MASK), purpose)
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).flatten(1)[:, :num_words]


def uniform(seed: int, stream: Stream, step: int, indices: Tensor, num: int = 1) -> Tensor:
    """Return float32 [n, num] uniforms on a grid of 2^-24 in [0, 1)."""
    return (random_words(seed, stream, step, indices, num) >> 8).to(torch.float32) * 2.0**-24


def normal(seed: int, stream: Stream, step: int, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return float32 [n, *shape] standard normal draws (Box and Muller, 1958)."""
    num = math.prod(shape)
    num_pairs = -(-num // 2)
    words = random_words(seed, stream, step, indices, 2 * num_pairs)
    # Half a grid step keeps the logarithm finite: the tails end at sqrt(2 ln 2^25) = 5.9 standard deviations.
    radius = (((words[:, :num_pairs] >> 8).to(torch.float32) + 0.5) * 2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (words[:, num_pairs:] >> 8).to(torch.float32) * (2.0 * math.pi * 2.0**-24)
    draws = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :num]
    return draws.reshape(len(words), *shape)


def permutation(seed: int, stream: Stream, epoch: int, num: int) -> np.ndarray:
    """Return an int64 permutation of range(num) that depends on (seed, stream, epoch) alone."""
    bits = np.random.Philox(key=np.array([seed, (int(stream) << 48) | epoch], dtype=np.uint64))
    return np.random.Generator(bits).permutation(num)
