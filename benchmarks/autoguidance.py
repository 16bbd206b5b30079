"""Autoguided sampling of RAE's kind: ours against its own loop, which doubles the batch and keeps every state.

RAE appends a copy of the noise with the null label, as classifier-free guidance would want it, lets both networks work
on it, and throws that half away; torchdiffeq keeps the states of all 50 times. The samples are the same, which is
checked. A small pair of DiT-DH stands for XL and S on a CPU: latents of full size, the guide at about the same share of
the cost; on CUDA it is XL and S themselves. Memory is what a run adds to the peak: on a CPU of resident memory, in a
process that does nothing else; on CUDA of what torch had allocated.
`python benchmarks/autoguidance.py [--batch 2] [--points 50] [--device cuda] [--networks released]`
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchdiffeq import odeint

from mixflow.config import RAE_SIZES
from mixflow.models import build_model
from mixflow.sampling import autoguided_velocity, sample, time_grid

SCALE, SHIFT, END = 1.42, 48**0.5, 0.999  # of the released sampling config at 256 pixels
CHANNELS, SIZE, NUM_CLASSES = 768, 16, 10
PAIRS = {  # (main, guide)
    "small": (
        {"hidden_size": (128, 128), "depth": (12, 2), "num_heads": (4, 4)},
        {"hidden_size": (48, 128), "depth": (4, 2), "num_heads": (4, 4)},
    ),
    "released": (RAE_SIZES["DH-XL"], RAE_SIZES["DH-S"]),
}


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=125 if cuda else 2, help="images (default %(default)s)")
    parser.add_argument("--points", type=int, default=50, help="times of the grid, one more than steps")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest run of each counts")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--networks", choices=PAIRS, default="released" if cuda else "small")
    parser.add_argument("--measure", choices=("RAE", "ours"), help=argparse.SUPPRESS)  # memory, in a process of its own
    options = parser.parse_args()
    case = Case(options)
    runs = {"RAE": case.theirs, "ours": case.ours}
    with torch.inference_mode():
        if options.measure is not None:
            before = resident_peak()
            runs[options.measure]()
            print(resident_peak() - before)
            return
        seconds, results = compare(runs, options.repeats, case.device)
        cost = [flops(network, case) for network in (case.main, case.guide)]
        difference = (results["RAE"] - results["ours"]).abs().max().item()
        assert difference < 1e-3 * results["RAE"].std(), f"the samples differ by {difference}"
        memory = {name: peak_memory(name, run, case.device) for name, run in runs.items()}
    where = f"{torch.get_num_threads()} threads" if case.device.type == "cpu" else torch.cuda.get_device_name()
    print(
        f"{options.networks} DiT-DH pair of {cost[0] / 1e9:.1f} and {cost[1] / 1e9:.1f} GFLOP (ratio "
        f"{cost[0] / cost[1]:.1f}; XL and S: 3.3), {options.points - 1} steps, batch {options.batch}, float32, {where}"
    )
    for name, taken in seconds.items():
        speed = options.batch / taken
        print(f"{name:>5}: {taken:7.2f} s, {speed:6.2f} images/s, {memory[name] / 2**20:6.0f} MiB added to the peak")
    kept = 2 * options.points * case.noise.numel() * case.noise.element_size() / 2**20
    print(
        f"ratio {seconds['RAE'] / seconds['ours']:.2f}, largest difference of the samples {difference:.0e}; "
        f"{(memory['RAE'] - memory['ours']) / 2**20:.0f} MiB less, of which {options.points} states are {kept:.0f} MiB"
    )
    if case.device.type == "cuda":
        show_bf16(case, results["ours"], options.batch)


class Case:
    """The two networks, and one batch of noise and labels, for both ways of sampling."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.main, self.guide = (network.to(self.device) for network in map(build, PAIRS[options.networks]))
        self.noise = torch.randn(options.batch, CHANNELS, SIZE, SIZE).to(self.device)
        self.labels = (torch.arange(options.batch) % NUM_CLASSES).to(self.device)
        self.times = time_grid(options.points - 1, end=END, shift=SHIFT)

    def ours(self) -> Tensor:
        velocity = autoguided_velocity(self.main, self.guide, self.labels, SCALE)
        return sample(velocity, self.noise, solver="euler", times=self.times)

    def theirs(self) -> Tensor:
        """RAE's sampling loop, in its reversed time."""
        noise = torch.cat([self.noise, self.noise])
        labels = torch.cat([self.labels, torch.full_like(self.labels, self.main.null_label)])

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            at = 1 - torch.ones(len(x), device=x.device) * t
            strong, weak = -self.main(x, at, labels), -self.guide(x, at, labels)
            acts = ((at >= 0) & (at <= 1)).view(-1, 1, 1, 1)
            return torch.where(acts, weak + SCALE * (strong - weak), strong)

        states = odeint(velocity, noise, (1 - self.times).float().to(self.device), method="euler")
        return states[-1].chunk(2)[0]


def build(sizes: dict[str, tuple[int, int]]) -> nn.Module:
    network = build_model("rae", **sizes, input_size=SIZE, in_channels=CHANNELS, num_classes=NUM_CLASSES)
    for parameter in network.parameters():  # the initial head is zero, which would hide every difference
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def compare(
    runs: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the fewest seconds of each run, and its samples. They take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for _ in range(repeats):
        for name, run in runs.items():
            start = now(device)
            results[name] = run()
            seconds[name].append(now(device) - start)
    return {name: min(taken) for name, taken in seconds.items()}, results


def show_bf16(case: Case, expected: Tensor, batch: int) -> None:
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        seconds, results = compare({"bf16": case.ours}, 2, case.device)
    difference = (results["bf16"] - expected).square().mean().sqrt() / expected.std()
    print(
        f" bf16: {seconds['bf16']:7.2f} s, {batch / seconds['bf16']:6.2f} images/s, {difference:.1%} off float32 (RMS)"
    )


def flops(network: nn.Module, case: Case) -> int:
    """Count the matrix products of one call for one image."""
    with FlopCounterMode(display=False) as counter:
        network(case.noise[:1], torch.ones(1, device=case.device), case.labels[:1])
    return counter.get_total_flops()


def peak_memory(name: str, run: Callable[[], Tensor], device: torch.device) -> int:
    """Return bytes: see the head of this file."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    command = [sys.executable, *sys.argv, "--measure", name]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def resident_peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
