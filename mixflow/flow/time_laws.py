"""Which time the network is told (t), and which time its input is taken from (m): the heart of MixFlow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixflow.runtime.errors import UserError, did_you_mean

# law -> (t, m) before the shift; slowed(t) is U[(1 - gamma) t, t]
LAWS = (
    "uniform",  #         t ~ U[0,1]                    m = t           flow matching
    "logit_normal",  #    t = sigmoid(z), z ~ N(0,1)    m = t           Stable Diffusion 3
    "beta",  #            t ~ Beta(2,1)                 m = t           MixFlow's t alone
    "mixflow",  #         t ~ Beta(2,1)                 m = slowed(t)   the paper
    "matched",  #         t = m                         m as mixflow's  MixFlow's inputs, told their true time
    "blind",  #           t ~ Beta(2,1)                 m as mixflow's, independent of t
    "uniform_slowed",  #  t ~ U[0,1]                    m = slowed(t)   the paper's ablation of the law of t
    "uniform_any",  #     t ~ U[0,1]                    m ~ U[0,1], independent: its ablation of the range of m
    "beta_any",  #        t ~ Beta(2,1)                 m ~ U[0,1], independent: both
)


def time_pair(
    uniforms: Tensor,  # [3,n] in [0, 1): behind t, behind the slowing, and behind an m that is independent of t
    law: str,  #         one of LAWS
    gamma: float = 0.0,  # largest slowing, in [0, 1]; acts in `mixflow`, `matched`, `blind` and `uniform_slowed`
    shift: float = 1.0,  # see shift_time
) -> tuple[Tensor, Tensor]:
    """Return (t, m), float32 [n] each, in paper time: t is what the network is told, x_m is what it is fed.

    MixFlow draws t ~ Beta(2,1) and m ~ U[(1 - gamma) t, t] (arXiv 2512.19311, Algorithm 1), which makes all admissible
    pairs equally likely. With a shift the order is law, shift, slowing: m is drawn below the shifted t (as the authors'
    RAE code has it). Raises `UserError` for an unknown law, gamma outside [0, 1] and shift <= 0.
    """
    _check_law(law, gamma)
    u_t, u_m, u_other = uniforms
    t = shift_time(_label_time(u_t, law), shift)
    if law in ("uniform", "logit_normal", "beta"):
        m = t
    elif law in ("mixflow", "matched", "uniform_slowed"):
        m = t * (1 - gamma * u_m)
    elif law in ("uniform_any", "beta_any"):
        m = shift_time(u_other, shift)
    else:
        m = shift_time(_label_time(u_other, law), shift) * (1 - gamma * u_m)
    if law == "matched":
        t = m
    return t.float(), m.float()


def draw_time_pair(
    n: int,
    *,
    law: str,
    gamma: float = 0.0,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return n draws of `time_pair`, float32 [n] each. All laws use up the same random numbers."""
    uniforms = torch.rand(3, n, generator=generator, device=device)
    return time_pair(uniforms, law, gamma, shift)


def input_time_density(m: Tensor, gamma: float) -> Tensor:
    """Return the density of MixFlow's m on [0, 1], without a shift: 2/gamma (min(1, m / (1 - gamma)) - m).

    Its mean is (2/3) (1 - gamma / 2). gamma lies in (0, 1].
    """
    ceiling = torch.ones_like(m) if gamma == 1 else (m / (1 - gamma)).clamp(max=1)
    return 2 / gamma * (ceiling - m)


def conditional_input_times(
    law: str, gamma: float, t: float
) -> tuple[tuple[float, ...], Callable[[Tensor], Tensor]] | None:
    """Return the law of m given what the network is told, t, without a shift; None where m = t.

    It is a pair: ascending times between which the density q(m | t) is smooth and beyond which it is 0, and the density
    up to a factor.
    Raises `UserError` as `time_pair` does, and for a law with slowing and gamma 0.
    """
    _check_law(law, gamma)
    if law in ("uniform", "logit_normal", "beta", "matched"):
        return None
    if law in ("uniform_any", "beta_any"):
        return (0.0, 1.0), torch.ones_like
    if gamma == 0:
        raise UserError(f"gamma is 0 under the law '{law}', which slows by it: give one above 0, or take law beta")
    if law == "blind":
        return (0.0, *([1 - gamma] if gamma < 1 else []), 1.0), lambda m: input_time_density(m, gamma)
    return ((1 - gamma) * t, t), torch.ones_like


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return shifted paper time, in [0, 1] like t; shift > 1 moves mass towards noise, 1 leaves all as it is.

    Stable Diffusion 3 (arXiv 2403.03206, eq. 23) and RAE write s r / (1 + (s - 1) r) in the reversed time r = 1 - t; in
    paper time that is t / (s - (s - 1) t). Raises `UserError` for shift <= 0.
    """
    if not shift > 0:
        raise UserError(f"shift is {shift}: it must be positive, where 1 is no shift")
    return t / (1 + (shift - 1) * (1 - t))


def _check_law(law: str, gamma: float) -> None:
    if law not in LAWS:
        raise UserError(f"'{law}' is not a law of time{did_you_mean(law, LAWS)}")
    if not 0 <= gamma <= 1:
        raise UserError(f"gamma is {gamma}: it must lie in [0, 1], where 0 is no slowing (the paper uses 0.8 for SiT)")


def _label_time(u: Tensor, law: str) -> Tensor:
    """Uniforms [n] -> t [n] by the inverse distribution function."""
    if law.startswith("uniform"):
        return u
    if law == "logit_normal":
        return torch.special.ndtri(u).sigmoid()
    return u.sqrt()  # Beta(2,1): P(t <= q) = q^2
