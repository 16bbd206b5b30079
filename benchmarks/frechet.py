"""Fréchet distance: ours (Cholesky, eigvalsh) against scipy's matrix square root, same covariances, one run.

At the default 2048 features (Inception) the square root takes about a minute of a laptop core.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import scipy.linalg
import torch

from mixflow.evaluation import covariance_factor, frechet_distance, moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dimension", type=int, default=2048, help="number of features")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest run of each counts")
    arguments = parser.parse_args()

    d = arguments.dimension
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(d, d)) / d**0.5
    # Correlated, non-negative features, as after a ReLU: four images per feature, so that no covariance is singular.
    mu1, sigma1 = (x.numpy() for x in moments(np.maximum(rng.normal(size=(4 * d, d)) @ mixing, 0)))
    mu2, sigma2 = (x.numpy() for x in moments(np.maximum(rng.normal(size=(4 * d, d)) @ mixing + 0.1, 0)))

    def by_square_root() -> float:
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
        return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)

    def ours() -> float:
        return frechet_distance(mu1, sigma1, mu2, sigma2)

    factor = covariance_factor(sigma1)

    def ours_again() -> float:
        return frechet_distance(mu1, sigma1, mu2, sigma2, factor=factor)

    seconds: dict[str, float] = {}
    values = {}
    for _ in range(arguments.repeats):  # in turn, so that other work on the machine meets all of them
        for name, function in (("sqrtm", by_square_root), ("ours", ours), ("again", ours_again)):
            start = time.perf_counter()
            values[name] = function()
            seconds[name] = min(time.perf_counter() - start, seconds.get(name, math.inf))
    print(f"{d} features, {torch.get_num_threads()} threads, scipy {scipy.__version__}, torch {torch.__version__}")
    print(f"scipy.linalg.sqrtm                         {seconds['sqrtm']:8.3f} s   {values['sqrtm']:.12f}")
    for name, what in (("ours", "frechet_distance"), ("again", "the same, factor of the reference cached")):
        difference = (values[name] - values["sqrtm"]) / values["sqrtm"]
        print(
            f"{what:<42} {seconds[name]:8.3f} s   {values[name]:.12f}   "
            f"ratio {seconds['sqrtm'] / seconds[name]:.1f}, difference {difference:+.1e} relative"
        )


if __name__ == "__main__":
    main()
