"""Euler-Maruyama sampling: one network call per step (ours) against one each for drift and score (SiT's way).

The score is affine in the velocity, so both give the same samples up to rounding; the ratio shows what the second call
costs. `python benchmarks/sde_calls.py [--steps 20] [--batch 16]`
"""

from __future__ import annotations

import argparse
import itertools
import math
import time

import torch

from mixflow.flow import Linear
from mixflow.models import build_model, sit_options
from mixflow.sampling import sample, time_grid


def two_calls(velocity, x, times, noise_at):
    """x' = x + [v + w score] dt + sqrt(2 w dt) n with w = sigma, the last step without noise; v and score apart."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = build_model("sit", **sit_options("S/8"), input_size=32, in_channels=4, num_classes=10, learn_sigma=False)
    for parameter in network.parameters():  # the initial head is zero, which would hide every difference
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    network.eval().requires_grad_(False)
    labels = torch.arange(options.batch) % 10
    noise = torch.randn(options.batch, 4, 32, 32)
    steps = torch.randn(options.steps, options.batch, 4, 32, 32)
    times = time_grid(options.steps, last_step_size=0.04)

    def velocity(x, t):
        return network(x, t, labels)

    def ours():
        return sample(velocity, noise, solver="euler_maruyama", times=times, noise_at=lambda k: steps[k])

    def baseline():
        return two_calls(velocity, noise, times, lambda k: steps[k])

    with torch.inference_mode():
        ours(), baseline()  # warm up
        seconds = {}
        for name, run in (("two calls", baseline), ("one call", ours)):
            start = time.perf_counter()
            result = run()
            seconds[name] = (time.perf_counter() - start, result)
    difference = (seconds["two calls"][1] - seconds["one call"][1]).abs().max().item()
    ratio = seconds["two calls"][0] / seconds["one call"][0]
    for name, (time_taken, _) in seconds.items():
        print(f"{name:>10}: {time_taken:.2f} s")
    print(f"ratio {ratio:.2f}, largest difference of the samples {difference:.1e}")


if __name__ == "__main__":
    main()
