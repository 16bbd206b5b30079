"""On a GPU: SiT-XL/2 training step and sampling, ours against the peers' loops, with model FLOPs and peak memory.

Not run so far: the project was written on machines without a GPU. It refuses to start where no CUDA is visible.

Training: float32 with TF32, AdamW and EMA as SiT's script has them, against bf16, torch.compile and this package's
loop. Sampling: SiT's SDE (two doubled calls per step, noise from the CPU) and REPA's (guidance for t <= 0.7, with
projections), float32 with TF32, against one call per step in bf16, compiled. The samples of the two differ by the
rounding of bf16, which is printed. MFU is the matrix products of the model over the peak of dense bf16 arithmetic.
`python benchmarks/gpu.py [--peak-tflops 989] [--batch 64] [--part training] [--part sampling]`
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import SitTraining, repa_sde, sit_sde
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training_step import NUM_CLASSES, SHAPE, Batches, loss_function, recipe

from mixflow.models import build_model, sit_options
from mixflow.runtime.devices import start_accelerator
from mixflow.sampling import guided_velocity, sample, time_grid
from mixflow.training import train

WARM_UP = 5  # steps that are not timed: compilation, the allocator, the clocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="XL/2", help="of the network (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images per training step")
    parser.add_argument("--steps", type=int, default=20, help="timed training steps")
    parser.add_argument("--images", type=int, default=64, help="images sampled together")
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16; H100 and H200 SXM 989, A100 312")
    parser.add_argument("--part", choices=("training", "sampling"), action="append", help="default: both")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures on a GPU but no CUDA device is visible: run it on a machine that has one")
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    start_accelerator("bf16")  # before the peers' loops, which set their own TF32
    if options.part is None or "training" in options.part:
        measure_training(device, options)
    if options.part is None or "sampling" in options.part:
        measure_sampling(device, options)


def measure_training(device: torch.device, options: argparse.Namespace) -> None:
    network = build_network("sit", options.size, device, learn_sigma=True)
    batches = Batches(options.batch, device)
    flops = training_flops(copy.deepcopy(network), Batches(1, device))  # of one image
    print(f"training step, SiT-{options.size}, batch {options.batch}, {flops / 1e12:.2f} TFLOP per image")
    speeds = {}
    for name, run in (("SiT, TF32", train_as_sit), ("ours, bf16", train_as_we_do)):
        reset(device)
        seconds = run(copy.deepcopy(network), batches, options.steps, device)
        speeds[name] = options.batch / seconds
        mfu = speeds[name] * flops / (options.peak_tflops * 1e12)
        report(name, speeds[name], device, f", MFU {100 * mfu:.1f}%")
    print(f"ratio {speeds['ours, bf16'] / speeds['SiT, TF32']:.2f}")


def train_as_sit(network: nn.Module, batches: Batches, num_steps: int, device: torch.device) -> float:
    """Seconds per step. Times are drawn on the CPU, as there; noise and dropped labels on the device."""
    allow_tf32(True)
    loop, everyone = SitTraining(network), torch.arange(batches.batch_size)
    start = 0.0
    for step in range(WARM_UP + num_steps):
        if step == WARM_UP:
            start = now(device)
        chosen = (step * batches.batch_size + everyone.to(device)) % len(batches.latents)
        data, labels = batches.latents[chosen], batches.labels[chosen]
        t = torch.rand(len(data)).to(device)
        drop = torch.rand(len(data), device=device) < 0.1
        loop.step(torch.randn_like(data), data, t, labels, drop)
    return (now(device) - start) / num_steps


def train_as_we_do(network: nn.Module, batches: Batches, num_steps: int, device: torch.device) -> float:
    """Seconds per step."""
    accelerator = start_accelerator("bf16")
    network.compile()
    marks = {}

    def at_step(step: int) -> None:
        if step in (WARM_UP, WARM_UP + num_steps):
            marks[step] = now(device)

    with tempfile.TemporaryDirectory() as folder:
        train(
            accelerator,
            network,
            loss_function(batches, at_step),
            recipe(WARM_UP + num_steps + 1, batches.batch_size),
            Path(folder) / "resume.pt",
            save_every_seconds=1e9,
        )
    return (marks[WARM_UP + num_steps] - marks[WARM_UP]) / num_steps


def measure_sampling(device: torch.device, options: argparse.Namespace) -> None:
    steps, num_images = options.sampling_steps, options.images
    times = time_grid(steps, last_step_size=0.04)
    labels = torch.arange(num_images, device=device) % NUM_CLASSES
    noise = torch.randn(num_images, *SHAPE, device=device)
    draws = torch.randn(steps, num_images, *SHAPE)  # on the CPU, from where SiT copies them in every step
    draws_on_device = draws.to(device)

    sit = build_network("sit", options.size, device, learn_sigma=True)
    repa = build_network("repa", options.size, device, encoder_depth=8, z_dims=[768])

    def sit_as_it_is() -> Tensor:
        twice, null = torch.cat([labels, labels]), torch.full_like(labels, sit.null_label)

        def velocity(x: Tensor, t: Tensor) -> Tensor:  # of the doubled batch, channel 3 not guided
            half = x[:num_images]
            at = torch.full((len(x),), float(t), device=device)
            v = sit(torch.cat([half, half]), at, torch.cat([twice[:num_images], null]))
            cond, uncond = v.chunk(2)
            guided = torch.cat([uncond[:, :3] + 1.5 * (cond - uncond)[:, :3], cond[:, 3:]], dim=1)
            return torch.cat([guided, guided])

        doubled = torch.cat([noise, noise])
        return sit_sde(velocity, doubled, times, lambda k: draws[k].to(device).repeat(2, 1, 1, 1))[:num_images]

    def sit_as_we_do(network: Callable[..., Tensor]) -> Tensor:
        velocity = guided_velocity(network, labels, sit.null_label, 1.5, channels=3)
        return sample(velocity, noise, solver="euler_maruyama", times=times, noise_at=lambda k: draws_on_device[k])

    def repa_as_it_is() -> Tensor:
        return repa_sde(
            repa, noise, labels, scale=1.8, interval=(0.0, 0.7), num_steps=steps,
            noise_at=lambda k: draws_on_device[k].double(),
        )  # fmt: skip

    def repa_as_we_do(network: Callable[..., Tensor]) -> Tensor:
        velocity = guided_velocity(
            network, labels, repa.null_label, 1.8, interval=(0.3, 1.0), network_dtype=torch.float32
        )
        return sample(
            velocity, noise.double(), solver="euler_maruyama", times=times, diffusion="linear",
            noise_at=lambda k: draws_on_device[k].double(),
        )  # fmt: skip

    for family, network, theirs, ours in (
        ("SiT", sit, sit_as_it_is, sit_as_we_do),
        ("REPA", repa, repa_as_it_is, repa_as_we_do),
    ):
        print(f"sampling, {family}-{options.size}, SDE of {steps} steps, {num_images} images, guided")
        allow_tf32(True)
        peer_seconds, expected = timed(theirs, device)
        report(f"{family}, TF32", num_images / peer_seconds, device)
        allow_tf32(False)
        compiled = torch.compile(network, dynamic=False)  # guided and unguided calls differ in their rows
        with torch.autocast(device.type, torch.bfloat16):
            own_seconds, found = timed(lambda run=ours, network=compiled: run(network), device)
        report("ours, bf16", num_images / own_seconds, device)
        difference = (found - expected).abs().max().item() / expected.std().item()
        print(f"ratio {peer_seconds / own_seconds:.2f}, largest difference {difference:.0e} standard deviations")


def timed(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Return the seconds of the second run, and its result."""
    with torch.inference_mode():
        run()
        reset(device)
        start = now(device)
        result = run()
        return now(device) - start, result


def report(name: str, images_per_second: float, device: torch.device, more: str = "") -> None:
    peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
    print(f"{name:>12}: {images_per_second:8.2f} images/s, peak memory {peak_gib:.1f} GiB{more}")


def build_network(family: str, size: str, device: torch.device, **options: object) -> nn.Module:
    torch.manual_seed(0)
    network = build_model(
        family, **sit_options(size), input_size=SHAPE[1], in_channels=SHAPE[0], num_classes=NUM_CLASSES, **options
    )
    for parameter in network.parameters():  # the initial head is zero, which would hide every difference
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return network.to(device).eval()


def training_flops(network: nn.Module, one_image: Batches) -> int:
    """Count the matrix products of forward and backward pass for one image."""
    with FlopCounterMode(display=False) as counter:
        loss_function(one_image)(network, 0, torch.arange(1)).sum().backward()
    return counter.get_total_flops()


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def now(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()


def reset(device: torch.device) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


if __name__ == "__main__":
    main()
