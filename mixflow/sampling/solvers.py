"""Solvers of the probability-flow ODE dx = v dt and of the SDEs that share its marginals, from noise to data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixflow.flow import INTERPOLANTS, Interpolant
from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.sampling.corrections import Correction

Velocity = Callable[..., Tensor]  # (x [B,...], t 0-dim) -> [B,...]; `heun_repa` adds a third argument
Step = Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]  # (velocity, x, t, t_next) -> the state at t_next
Callback = Callable[[int, Tensor, Tensor], object]  # (k, x_k, t_k) for k = 0 (the noise) ... N (the result)


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,  # [B,...] float32 or float64, the state at times[0]; the dtype is kept throughout
    *,
    solver: str = "heun",  # one of SOLVERS
    times: Tensor,  # [N+1] ascending, paper time
    **options: Any,  # the solver's own: see `fixed_step`, `heun_repa`, `dopri5` and `euler_maruyama`
) -> Tensor:
    """Return the state [B,...] at times[-1]; only the last state is kept.

    `velocity` is called with t as a 0-dim tensor on the CPU, in the dtype of the noise, so that looking at t never
    waits for the device. Raises `UserError` for an unknown solver or times that do not ascend.
    """
    if solver not in SOLVERS:
        raise UserError(f"'{solver}' is not a solver{did_you_mean(solver, SOLVERS)}")
    times = times.to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not (times.diff() > 0).all():
        raise UserError(f"times is {times.tolist()}: it must be a list of at least two ascending times")
    return SOLVERS[solver](velocity, noise, times, **options)


def fixed_step(
    step: Step,
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    *,
    correction: Correction | None = None,  # of the state after each step
    callback: Callback | None = None,
) -> Tensor:
    """One `step` per interval. A sample does not depend on the others in its batch."""
    velocity = _at_state_dtype(velocity)
    if correction is not None:
        step = _corrected(step, correction)
    for k in range(len(times) - 1):
        if callback:
            callback(k, x, times[k])
        x = step(velocity, x, times[k], times[k + 1])
    if callback:
        callback(len(times) - 1, x, times[-1])
    return x


def _corrected(step: Step, correction: Correction) -> Step:
    """Return the step with its end corrected, given the data estimate of its last call on the linear path."""

    def corrected_step(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        estimates = []

        def watched(x: Tensor, at: Tensor) -> Tensor:
            slope = v(x, at)
            estimates.append(x + (1 - at) * slope)
            return slope

        x_next = step(watched, x, t, t_next)
        return correction(x_next, estimates[-1], t)

    return corrected_step


def euler_step(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    return x + (t_next - t) * v(x, t)


def heun_step(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    h = t_next - t
    k1 = v(x, t)
    k2 = v(x + h * k1, t_next)
    return x + h * (k1 + k2) / 2


def midpoint_step(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    h = t_next - t
    return x + h * v(x + h / 2 * v(x, t), t + h / 2)


def rk4_step(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Kutta's 3/8 rule, which is what torchdiffeq calls rk4."""
    h = t_next - t
    k1 = v(x, t)
    k2 = v(x + h * k1 / 3, t + h / 3)
    k3 = v(x + h * (k2 - k1 / 3), t + h * 2 / 3)
    k4 = v(x + h * (k1 - k2 + k3), t_next)
    return x + h * (k1 + 3 * (k2 + k3) + k4) / 8


def heun_repa(velocity: Velocity, x: Tensor, times: Tensor, *, callback: Callback | None = None) -> Tensor:
    """Heun as REPA's sampler has it: 2N - 1 calls, for the last of N steps is Euler's.

    In the corrector guidance is decided by the time at which the step started: there `velocity` is called as
    velocity(x, t_next, t), and `guided_velocity` looks at t for its interval.
    """

    def step(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        if t_next == times[-1]:
            return euler_step(v, x, t, t_next)
        h = t_next - t
        k1 = v(x, t)
        k2 = v(x + h * k1, t_next, t)
        return x + h * (k1 + k2) / 2

    return fixed_step(step, velocity, x, times, callback=callback)


def dopri5(velocity: Velocity, x: Tensor, times: Tensor, *, atol: float = 1e-6, rtol: float = 1e-3) -> Tensor:
    """Adaptive Dormand-Prince 5(4). Only times[0] and times[-1] matter.

    For comparison with SiT, whose default it is. Step sizes follow from the error of the whole batch, so a sample
    depends on the others in it. torchdiffeq steps beyond times[-1] and interpolates back: `velocity` is called at
    t > 1 too, and the error of the result can exceed the tolerance. Here t is on the device of x.
    """
    from torchdiffeq import odeint  # it imports much of SciPy, which no other solver needs

    ends = times[[0, -1]].to(x.device)
    return odeint(lambda t, x: velocity(x, t), x, ends, method="dopri5", atol=atol, rtol=rtol)[-1]


# w(t), the strength of the noise, over its norm c (SiT, arXiv 2401.08740, section 3.3)
DIFFUSIONS: dict[str, Callable[[Interpolant, Tensor, float], Tensor]] = {
    "sigma": lambda path, t, c: c * path.sigma(t),
    "linear": lambda path, t, c: c * (1 - t),
    "constant": lambda path, t, c: c * torch.ones_like(t),
    "decreasing": lambda path, t, c: 0.25 * (c * torch.cos(math.pi * t) + 1) ** 2,
    "sin2": lambda path, t, c: c * torch.sin(math.pi * t) ** 2,
}
LAST_STEPS = ("mean", "euler", "tweedie", "none")


def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    *,
    noise_at: Callable[[int], Tensor],  # standard normal draws of step k, like x
    interpolant: Interpolant = INTERPOLANTS["linear"],
    diffusion: str = "sigma",  # one of DIFFUSIONS
    norm: float = 1.0,
    last_step: str = "mean",  # over times[-2] .. times[-1]; "none": a noisy step like the others
    callback: Callback | None = None,
) -> Tensor:
    """dx = (v + w score) dt + sqrt(2 w) dW, which has the marginals of the ODE for every w(t) >= 0.

    The score is affine in the velocity, so a step costs one network call. The last step adds no noise: "mean" keeps
    the drift of the SDE, "euler" follows the ODE, "tweedie" jumps to E[x1 | x_t]. Raises `UserError` for an unknown
    diffusion or last step.
    """
    if diffusion not in DIFFUSIONS:
        raise UserError(f"'{diffusion}' is not a diffusion{did_you_mean(diffusion, DIFFUSIONS)}")
    if last_step not in LAST_STEPS:
        raise UserError(f"'{last_step}' is not a last step{did_you_mean(last_step, LAST_STEPS)}")
    velocity = _at_state_dtype(velocity)
    num_steps = len(times) - 1
    for k in range(num_steps):
        t, h = times[k], times[k + 1] - times[k]
        if callback:
            callback(k, x, t)
        v = velocity(x, t)
        w = DIFFUSIONS[diffusion](interpolant, t, norm)
        ending = last_step if k == num_steps - 1 else "none"
        if ending == "tweedie":
            x = interpolant.denoised(v, x, t)
        elif ending == "euler":
            x = x + h * v
        else:
            x = x + h * (v + w * interpolant.score(v, x, t))
            if ending == "none":
                x = x + torch.sqrt(2 * w * h) * noise_at(k)
    if callback:
        callback(num_steps, x, times[-1])
    return x


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "euler": functools.partial(fixed_step, euler_step),
    "heun": functools.partial(fixed_step, heun_step),
    "heun_repa": heun_repa,
    "midpoint": functools.partial(fixed_step, midpoint_step),
    "rk4": functools.partial(fixed_step, rk4_step),
    "dopri5": dopri5,
    "euler_maruyama": euler_maruyama,
}


def _at_state_dtype(velocity: Velocity) -> Velocity:
    # Times stay float64 in the solver: differences of float32 times have lost digits.
    return lambda x, *times: velocity(x, *(t.to(x.dtype) for t in times))
