"""Sampler entries: a solver, its steps and guidance, and the times at which it asks the network."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mixflow.config.values import (
    LIST,
    TEXT,
    BelowOne,
    Count,
    Entry,
    Fraction,
    NonNegative,
    Positive,
    Precision,
    Seed,
    from_text,
)
from mixflow.runtime.errors import UserError


def _number_of_channels(value: Any) -> Any:
    value = from_text(value)
    if value != "all" and (type(value) is not int or value < 1):
        raise UserError(f"{value!r} is not a number of channels: write a whole number above 0, or all")
    return value


class Guidance(Entry):
    """Classifier-free guidance: null + scale (class - null) on the first `channels`, for t in `interval`.

    With a `guide`, a weaker checkpoint that is told the class too, autoguidance: guide + scale (network - guide).
    """

    scale: NonNegative
    channels: Annotated[int | Literal["all"], BeforeValidator(_number_of_channels)]
    interval: Annotated[tuple[Fraction, Fraction], LIST]
    guide: str | None = None

    @model_validator(mode="after")
    def _guide_acts(self) -> Guidance:
        if self.guide is not None and self.scale == 1:
            raise UserError("guide: has no effect at scale 1.0: leave it out, or write another scale")
        if self.guide is not None and self.channels != "all":
            raise UserError(f"channels: {self.channels}, but a guide acts on all channels: write all")
        return self

    @field_validator("interval")
    @classmethod
    def _ascending(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if interval[0] > interval[1]:
            raise UserError(f"{list(interval)} is in the wrong order: write [{interval[1]}, {interval[0]}]")
        return interval

    def acts_at(self, t: float) -> bool:
        edge = 1e-6  # a rounded time still lies on the edge that it was meant to, as in mixflow.sampling
        return self.scale != 1 and self.interval[0] - edge <= t <= self.interval[1] + edge

    @property
    def description(self) -> str:
        if self.scale == 1:
            return ""
        channels = "" if self.channels == "all" else f" on {self.channels} channels"
        interval = "" if self.interval == (0, 1) else f" for t in [{self.interval[0]:g}, {self.interval[1]:g}]"
        kind = "guidance" if self.guide is None else "autoguidance"
        return f", {kind} {self.scale:g}{channels}{interval}"


class AnySampler(Entry):
    """What all samplers share."""

    guidance: Guidance
    labels: Literal["balanced", "balanced_shuffled", "random"]
    num_images: Annotated[int, Field(ge=2), TEXT]
    to_uint8: Literal["round", "truncate"]
    state: Literal["float32", "float64"]
    precision: Precision
    seed: Seed

    @property
    def protocol(self) -> str:
        """What a header has no room for, though the numbers depend on it."""
        pixels = "" if self.to_uint8 == "round" else ", pixel values truncated"
        labels = self.labels.replace("_", " and ")
        guide = "" if self.guidance.guide is None else f", guided by {self.guidance.guide}"
        return f"{self.num_images:,} images, {labels} labels, {self.precision}{pixels}{guide}, seed {self.seed}"


class Grid(Entry):
    """Times that are not evenly spaced over [0, 1]: evenly spaced over [0, `end`], and shifted towards noise then."""

    shift: Positive  # s in t / (1 + (s - 1) (1 - t)), as in training; 1 is none
    end: Annotated[float, Field(gt=0, le=1), TEXT]

    def time(self, fraction: float) -> float:
        """Return paper time after this fraction of the steps."""
        t = fraction * self.end
        return t / (1 + (self.shift - 1) * (1 - t))


class FixedStep(AnySampler):
    """An ODE solver with `num_steps` steps, of equal size where there is no `grid`."""

    solver: Literal["euler", "heun", "heun_repa", "midpoint", "rk4"]
    num_steps: Count
    grid: Grid | None = None

    @property
    def description(self) -> str:
        titles = {"euler": "Euler", "heun": "Heun", "heun_repa": "REPA's Heun", "midpoint": "midpoint", "rk4": "RK4"}
        title = titles[self.solver]
        return f"{title} {self.num_steps}{self.guidance.description}"

    @property
    def call_times(self) -> list[float] | None:
        """Paper time by which each velocity evaluation decides on guidance."""
        stages = {
            "euler": (0.0,),
            "heun": (0.0, 1.0),
            "heun_repa": (0.0, 0.0),  # its corrector goes by the step's start
            "midpoint": (0.0, 0.5),
            "rk4": (0.0, 1 / 3, 2 / 3, 1.0),
        }
        grid = self.grid or Grid(shift=1.0, end=1.0)
        ends = [grid.time(step / self.num_steps) for step in range(self.num_steps + 1)]
        times = [low + stage * (high - low) for low, high in pairwise(ends) for stage in stages[self.solver]]
        return times[:-1] if self.solver == "heun_repa" else times  # whose last step has no corrector

    @property
    def protocol(self) -> str:
        """What a header has no room for, though the numbers depend on it."""
        if self.grid is None:
            return super().protocol
        return f"{super().protocol}, times shifted by {self.grid.shift:.4g} that end at {self.grid.time(1):.4f}"


class Dopri5(AnySampler):
    """The adaptive Dormand-Prince ODE solver."""

    solver: Literal["dopri5"]
    atol: Positive
    rtol: Positive

    @property
    def description(self) -> str:
        return f"dopri5 ({self.atol:g}, {self.rtol:g}){self.guidance.description}"

    @property
    def call_times(self) -> None:
        return None  # it chooses its steps while it runs


class Diffusion(Entry):
    """The diffusion coefficient w(t) of the SDE, and its factor."""

    form: Literal["sigma", "linear", "decreasing", "constant", "sin2"]
    norm: Positive


class EulerMaruyama(AnySampler):
    """The SDE solver: `num_steps` steps, of which the last has its own size (0: that of the others) and rule."""

    solver: Literal["euler_maruyama"]
    num_steps: Annotated[int, Field(ge=2), TEXT]
    diffusion: Diffusion
    last_step: Literal["mean", "euler", "tweedie", "none"]
    last_step_size: BelowOne

    @model_validator(mode="after")
    def _no_last_step_has_no_size(self) -> EulerMaruyama:
        if self.last_step == "none" and self.last_step_size != 0:
            raise UserError(f"last_step_size: {self.last_step_size} contradicts last_step: none: write 0.0")
        return self

    @property
    def description(self) -> str:
        return f"SDE {self.num_steps}{self.guidance.description}"

    @property
    def call_times(self) -> list[float] | None:
        """Paper time by which each velocity evaluation decides on guidance."""
        if self.last_step_size == 0:
            return [step / self.num_steps for step in range(self.num_steps)]
        return [(1 - self.last_step_size) * step / (self.num_steps - 1) for step in range(self.num_steps)]


Sampler = Annotated[FixedStep | Dopri5 | EulerMaruyama, Field(discriminator="solver")]
