"""A float32 training step on the CPU: the loop of this package against the loop of SiT's script.

Same network, initial weights, data and draws, and the same losses. SiT's loop has AdamW as it comes (on a CPU one
parameter after the other), an EMA update for each parameter, and reads the loss after every step. Ours has fused AdamW,
one EMA pass for all, and leaves the loss where it is; it draws its noise, times and dropped labels within the timed
step, SiT's loop is given them. The two alternate in blocks. On a busy machine set OMP_NUM_THREADS=1.
`python benchmarks/training_step.py [--size S/2] [--batch 8] [--steps 3] [--blocks 3]`
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peers import SitTraining

from mixflow.flow import Linear, flow_matching_loss, time_pair
from mixflow.models import build_model, sit_options
from mixflow.runtime.devices import start_accelerator
from mixflow.runtime.seeds import Stream, normal, uniform
from mixflow.training import Recipe, train

SEED, SHAPE, NUM_CLASSES, LABEL_DROPOUT = 0, (4, 32, 32), 1000, 0.1


class Batches:
    """The draws of a step, from counters, and images from a small set in memory."""

    def __init__(self, batch_size: int, device: torch.device | str = "cpu", num_images: int = 64) -> None:
        everything = torch.arange(num_images, device=device)
        self.batch_size, self.device = batch_size, device
        self.latents = normal(SEED, Stream.POSTERIOR, 0, everything, SHAPE)
        self.labels = everything * 7 % NUM_CLASSES

    def __call__(self, step: int, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (noise, data, t, labels, drop) of a step."""
        positions = positions.to(self.device, non_blocking=True)
        chosen = (step * self.batch_size + positions) % len(self.latents)
        t, _ = time_pair(uniform(SEED, Stream.TIME, step, positions, 3).T, "uniform")
        drop = uniform(SEED, Stream.LABEL_DROPOUT, step, positions)[:, 0] < LABEL_DROPOUT
        noise = normal(SEED, Stream.NOISE, step, positions, SHAPE)
        return noise, self.latents[chosen], t, self.labels[chosen], drop


def recipe(num_steps: int, batch_size: int) -> Recipe:
    return Recipe(
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        warmup_steps=0,
        gradient_clip=None,
        ema_decay=0.9999,
    )


def loss_function(batches: Batches, at_step=lambda step: None):
    """The loss of mixflow.training.train; `at_step` is told when a step begins."""

    def loss(wrapped, step, positions):
        at_step(step)
        noise, data, t, labels, drop = batches(step, positions)
        return flow_matching_loss(lambda x, t: wrapped(x, t, labels, drop=drop), noise, data, t, t, Linear())

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="S/2", help="of the SiT (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a block; one more warms it up")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each loop; the fastest step of each counts")
    options = parser.parse_args()
    torch.manual_seed(0)
    initial = build_model(
        "sit", **sit_options(options.size), input_size=32, in_channels=4, num_classes=NUM_CLASSES, learn_sigma=True
    )
    accelerator = start_accelerator("fp32")
    batches, everyone = Batches(options.batch), torch.arange(options.batch)
    num_steps = options.steps + 1
    seconds: dict[str, list[float]] = {"SiT": [], "ours": []}
    losses: dict[str, list[float]] = {}

    def theirs():
        loop = SitTraining(copy.deepcopy(initial))
        begins, losses["SiT"] = [], []
        for step in range(num_steps):
            draws = batches(step, everyone)
            begins.append(time.perf_counter())
            losses["SiT"].append(loop.step(*draws))
        return [*begins[1:], time.perf_counter()]

    def ours():
        begins = []
        with tempfile.TemporaryDirectory() as folder:
            _, history = train(
                accelerator,
                copy.deepcopy(initial),
                loss_function(batches, lambda step: begins.append(time.perf_counter())),
                recipe(num_steps + 1, options.batch),  # one more, whose beginning is the end of the last timed one
                Path(folder) / "resume.pt",
                log_every=num_steps,
                save_every_seconds=1e9,
            )
        losses["ours"] = history["loss"][:1]
        return begins[1:]

    for _ in range(options.blocks):
        for name, run in (("SiT", theirs), ("ours", ours)):
            marks = run()
            seconds[name] += [after - before for before, after in itertools.pairwise(marks)]
    difference = abs(sum(losses["SiT"]) / num_steps - losses["ours"][0])
    print(f"SiT-{options.size}, batch {options.batch}, float32, {torch.get_num_threads()} threads")
    best = {name: min(taken) for name, taken in seconds.items()}
    for name, taken in seconds.items():
        print(f"{name:>10}: fastest of {len(taken)} steps {best[name]:.3f} s, median {statistics.median(taken):.3f} s")
    medians = statistics.median(seconds["SiT"]) / statistics.median(seconds["ours"])
    print(f"ratio {best['SiT'] / best['ours']:.2f}, of the medians {medians:.2f}, losses differ by {difference:.0e}")


if __name__ == "__main__":
    main()
