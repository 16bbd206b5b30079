"""Euler-Maruyama sampling: one network call per step (ours) against one each for drift and score (SiT's way).

The score is affine in the velocity, so both give the same samples up to rounding; the ratio shows what the second call
costs. `python benchmarks/sde_calls.py [--size S/2] [--steps 20] [--batch 16]`
"""

from __future__ import annotations

import argparse
import time

import torch
from peers import sit_sde

from mixflow.models import build_model, sit_options
from mixflow.sampling import sample, time_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="S/8", help="of the SiT, such as S/2 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest run of each counts")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = sit_options(options.size)
    network = build_model("sit", **sizes, input_size=32, in_channels=4, num_classes=10, learn_sigma=False)
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

    def two_calls():
        return sit_sde(velocity, noise, times, lambda k: steps[k])

    seconds: dict[str, list[float]] = {"two calls": [], "one call": []}
    results = {}
    with torch.inference_mode():
        velocity(noise, times[0])  # warm up
        for _ in range(options.repeats):
            for name, run in (("two calls", two_calls), ("one call", ours)):
                start = time.perf_counter()
                results[name] = run()
                seconds[name].append(time.perf_counter() - start)
    best = {name: min(taken) for name, taken in seconds.items()}
    difference = (results["two calls"] - results["one call"]).abs().max().item()
    print(
        f"SiT-{options.size}, {options.steps} steps, batch {options.batch}, float32, {torch.get_num_threads()} threads"
    )
    for name, taken in best.items():
        print(f"{name:>10}: {taken:.2f} s")
    print(f"ratio {best['two calls'] / best['one call']:.2f}, largest difference of the samples {difference:.1e}")


if __name__ == "__main__":
    main()
