"""Precision and recall: ours (tiles, each pair once) at the size of a paper's table, and against whole rows.

First ours at full size, 10,000 reference points and 50,000 samples of 2048 features: seconds, and the largest resident
memory of the process, features and torch included. Then both at a smaller size, where whole rows end in reasonable
time: for a block of points the distances to all others at once, and no distance used twice.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
from torch import Tensor

from mixflow.evaluation import precision_recall


def features(n: int, d: int, seed: int, scale: float) -> Tensor:
    """Return non-negative features [n, d] of 32 intrinsic dimensions, as after a ReLU, block by block."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, d, generator=torch.Generator().manual_seed(0)) / 32**0.5
    points = torch.empty(n, d)
    for block in points.split(1000):
        noise = torch.randn(block.shape, generator=g) * 0.1
        block.copy_((torch.randn(len(block), 32, generator=g) @ mixing * scale + noise).relu_())
    return points


def by_whole_rows(reference: Tensor, samples: Tensor, k: int = 3, rows: int = 1000) -> tuple[float, float]:
    """Return precision and recall in float64, `rows` whole rows of distances at a time."""

    def distances(u: Tensor, v: Tensor) -> Tensor:
        u, v = u.double(), v.double()
        return (u.square().sum(dim=1)[:, None] - 2 * u @ v.T + v.square().sum(dim=1)).clamp(min=0)

    def radii(points: Tensor) -> Tensor:
        whole = [
            distances(block, points).topk(k + 1, dim=1, largest=False).values[:, k] for block in points.split(rows)
        ]
        return torch.cat(whole)

    real_radii, fake_radii = radii(reference), radii(samples)
    inside = [(distances(block, reference) <= real_radii).any(dim=1) for block in samples.split(rows)]
    reached = [(distances(block, samples) <= fake_radii).any(dim=1) for block in reference.split(rows)]
    return float(torch.cat(inside).double().mean()), float(torch.cat(reached).double().mean())


def timed(function, *arguments) -> tuple[float, tuple[float, float]]:
    start = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=int, default=10_000, help="reference points")
    parser.add_argument("--samples", type=int, default=50_000, help="samples")
    parser.add_argument("--dimension", type=int, default=2048, help="number of features")
    parser.add_argument("--mode", choices=("exact", "adm"), default="exact", help="arithmetic at full size")
    parser.add_argument("--baseline-reference", type=int, default=2000, help="reference points for whole rows")
    parser.add_argument("--baseline-samples", type=int, default=10_000, help="samples for whole rows")
    parser.add_argument("--repeats", type=int, default=2, help="of the smaller size; the fastest run of each counts")
    arguments = parser.parse_args()

    reference = features(arguments.reference, arguments.dimension, seed=1, scale=1.0)
    samples = features(arguments.samples, arguments.dimension, seed=2, scale=0.9)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.dimension} features")
    cpu_start = time.process_time()
    seconds, found = timed(lambda: precision_recall(reference, samples, mode=arguments.mode))
    cpu_seconds = time.process_time() - cpu_start  # of all threads: what other work on the machine does not lengthen
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"mixflow, {arguments.mode}, {len(reference):,} x {len(samples):,}: {seconds:.1f} s, {cpu_seconds:.1f} s of CPU"
    )
    print(f"peak resident memory {peak / 2**30:.2f} GiB, precision {found[0]:.4f}, recall {found[1]:.4f}")

    reference, samples = reference[: arguments.baseline_reference], samples[: arguments.baseline_samples]
    whole, ours = [], []
    for _ in range(arguments.repeats):
        ours.append(timed(lambda: precision_recall(reference, samples, mode="exact")))
        whole.append(timed(lambda: by_whole_rows(reference, samples)))
    size = f"{len(reference):,} x {len(samples):,}"
    print(f"whole rows, float64, {size}  {min(whole)[0]:8.2f} s   {whole[0][1]}")
    print(f"mixflow, exact, {size}       {min(ours)[0]:8.2f} s   {ours[0][1]}")
    print(f"ratio {min(whole)[0] / min(ours)[0]:.2f}, equal: {whole[0][1] == ours[0][1]}")


if __name__ == "__main__":
    main()
