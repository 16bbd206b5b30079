"""REPA's samplers: the same samples and the same network calls as its own code (tests/golden/repa_samplers)."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixflow.flow import INTERPOLANTS
from mixflow.models import load_model
from mixflow.sampling import CountedNetwork, guided_velocity, sample, time_grid

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = json.loads((GOLDEN / "repa_samplers" / "runs.json").read_text())
# The sin-cos features of t are float32 in the peer's float64 runs too, and CPUs differ in their last bit.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-7}
HEADS = {"a": 4, "b": 3}
NULL = 1000

golden = functools.cache(lambda: load_file(GOLDEN / "repa_samplers" / "samplers.safetensors"))


@functools.cache
def repa(model, dtype):
    path = GOLDEN / "repa" / f"model_{model}.safetensors"
    return load_model("repa", path, num_heads=HEADS[model], encoder_depth=2).to(dtype).requires_grad_(False)


def of_run(name):
    """What the name of a run says: (arguments, model, dtype of the network)."""
    return RUNS[name], name[0], torch.float32 if name.endswith("f32") else torch.float64


def ours(name, network):
    """The final state of a run, float64."""
    run, model, dtype = of_run(name)
    velocity = guided_velocity(
        network,
        golden()[f"{model}.y"],
        NULL,
        run["cfg_scale"],
        interval=(1 - run["guidance_high"], 1 - run["guidance_low"]),
        network_dtype=dtype,
    )
    steps, noise = run["num_steps"], golden()[f"{model}.z"].double()
    if "heun" in run:
        return sample(velocity, noise, solver="heun_repa" if run["heun"] else "euler", times=time_grid(steps))
    return sample(
        velocity,
        noise,
        solver="euler_maruyama",
        times=time_grid(steps, last_step_size=0.04),
        interpolant=INTERPOLANTS[{"linear": "linear", "cosine": "gvp"}[run["path_type"]]],
        diffusion="linear",  # REPA's 2 t is the square of the noise's coefficient on both of its paths
        noise_at=lambda step: golden()["noise"][step],
    )


def in_the_peers_time(name):
    """The same run written out in REPA's time and formulas: t=1 is noise, the velocity is noise - data."""
    run, model, dtype = of_run(name)
    y, x = golden()[f"{model}.y"], golden()[f"{model}.z"].double()
    network, scale = repa(model, dtype), run["cfg_scale"]

    def ask(x, t, labels):
        return -network(x.to(dtype), 1 - torch.full((len(x),), t, dtype=torch.float64).to(dtype), labels).double()

    def velocity(x, t, start):
        if scale == 1 or not run["guidance_low"] <= start <= run["guidance_high"]:
            return ask(x, t, y)
        cond, null = ask(x, t, y), ask(x, t, torch.full_like(y, NULL))
        return null + scale * (cond - null)

    steps = run["num_steps"]
    if "heun" in run:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        for k in range(steps):
            t, after = times[k], times[k + 1]
            v = velocity(x, t, t)
            if run["heun"] and k < steps - 1:
                v = 0.5 * v + 0.5 * velocity(x + (after - t) * v, after, t)
            x = x + (after - t) * v
        return x
    times = [*torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    for k in range(steps):
        t, dt = times[k], times[k + 1] - times[k]
        v = velocity(x, t, t)
        if run["path_type"] == "linear":
            noise, sigma = x + (1 - t) * v, t
        else:
            sigma = math.sin(math.pi * t / 2)
            noise = sigma * x + 2 / math.pi * math.cos(math.pi * t / 2) * v
        x = x + (v + t * noise / sigma) * dt  # v - g^2/2 score, g^2 = 2 t, score = -noise / sigma
        if k < steps - 1:
            x = x + math.sqrt(2 * t * -dt) * golden()["noise"][k]
    return x


@pytest.mark.parametrize("name", RUNS)
def test_samples_and_calls_are_the_peers(name):
    run, model, dtype = of_run(name)
    called = []

    def network(x, t, y):
        assert x.dtype == t.dtype == dtype
        called.append(len(x))
        return repa(model, dtype)(x, t, y)

    counted = CountedNetwork(network)
    x = ours(name, counted)
    assert x.dtype == torch.float64
    assert called == [int(digit) for digit in run["rows_per_call"]]
    assert (counted.calls, counted.rows) == (len(called), sum(called))
    torch.testing.assert_close(x, golden()[f"{name}.final"], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("b") and name.endswith("f64")])
def test_turning_time_around_costs_no_digits(name):
    _, model, dtype = of_run(name)
    torch.testing.assert_close(ours(name, repa(model, dtype)), in_the_peers_time(name), rtol=0, atol=1e-12)


def test_the_headline_protocol_guides_172_of_250_calls():
    name = next(name for name in RUNS if "N250" in name)
    assert (RUNS[name]["rows_per_call"].count("4"), len(RUNS[name]["rows_per_call"])) == (172, 250)
