"""REPA's guided SDE: ours against REPA's own loop, with guidance everywhere and in the published interval.

Both keep a float64 state and give the same samples. REPA's network puts out its projections in sampling too; ours does
not. Its default of unfused attention is not held against it: both attend by the same kernel. The last line shows that
guidance costs nothing outside its interval: a call there takes as long as one of an unguided run.
`python benchmarks/repa_sde.py [--size S/8] [--steps 25] [--batch 8]`
"""

from __future__ import annotations

import argparse
import time

import torch
from peers import repa_sde

from mixflow.models import build_model, sit_options
from mixflow.sampling import guided_velocity, sample, time_grid

SCALE = 1.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="S/8", help="of the backbone, such as S/2 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest run of each counts")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = build_model(
        "repa",
        **sit_options(options.size),
        input_size=32,
        in_channels=4,
        num_classes=10,
        encoder_depth=8,
        z_dims=[768],
    )
    for parameter in network.parameters():  # the initial head is zero, which would hide every difference
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    network.eval().requires_grad_(False)
    labels = torch.arange(options.batch) % 10
    noise = torch.randn(options.batch, 4, 32, 32)
    draws = torch.randn(options.steps, options.batch, 4, 32, 32, dtype=torch.float64)
    times = time_grid(options.steps, last_step_size=0.04)
    call_seconds: dict[int, list[float]] = {}  # rows of a call -> how long it took

    def timed(x, t, y):
        start = time.perf_counter()
        result = network(x, t, y)
        call_seconds.setdefault(len(x), []).append(time.perf_counter() - start)
        return result

    def ours(scale, high):
        velocity = guided_velocity(
            timed, labels, network.null_label, scale, interval=(1 - high, 1.0), network_dtype=torch.float32
        )
        return sample(
            velocity,
            noise.double(),
            solver="euler_maruyama",
            times=times,
            diffusion="linear",
            noise_at=lambda k: draws[k],
        )

    def theirs(scale, high):
        return repa_sde(
            network,
            noise,
            labels,
            scale=scale,
            interval=(0.0, high),
            num_steps=options.steps,
            noise_at=lambda k: draws[k],
        )

    print(f"REPA-{options.size}, {options.steps} steps, batch {options.batch}, {torch.get_num_threads()} threads")
    with torch.inference_mode():
        theirs(1.0, 1.0), ours(1.0, 1.0)  # warm up
        per_call = {}
        for title, scale, high in (
            ("unguided", 1.0, 1.0),
            (f"guided {SCALE}, t <= 0.7", SCALE, 0.7),
            (f"guided {SCALE}", SCALE, 1.0),
        ):
            call_seconds.clear()
            seconds: dict[str, list[float]] = {"REPA": [], "ours": []}
            results = {}
            for _ in range(options.repeats):
                for name, run in (("REPA", theirs), ("ours", ours)):
                    start = time.perf_counter()
                    results[name] = run(scale, high)
                    seconds[name].append(time.perf_counter() - start)
            per_call[title] = {rows: min(taken) for rows, taken in call_seconds.items()}
            peer, own = min(seconds["REPA"]), min(seconds["ours"])
            difference = (results["REPA"] - results["ours"]).abs().max().item()
            print(
                f"{title:>20}: REPA {peer:6.2f} s, ours {own:6.2f} s, ratio {peer / own:.2f}, "
                f"largest difference {difference:.0e}"
            )
    unguided = per_call["unguided"][options.batch]
    outside = per_call[f"guided {SCALE}, t <= 0.7"][options.batch]
    inside = per_call[f"guided {SCALE}, t <= 0.7"][2 * options.batch]
    print(
        f"a call of ours: unguided run {1e3 * unguided:.1f} ms, guided run outside the interval {1e3 * outside:.1f} ms "
        f"(ratio {outside / unguided:.2f}), inside {1e3 * inside:.1f} ms (ratio {inside / unguided:.2f})"
    )


if __name__ == "__main__":
    main()
