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

EDGE = 1e-6  # a rounded time still lies on the edge that it was meant to, as in mixflow.sampling


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise UserError(f"{list(interval)} is in the wrong order: write [{interval[1]}, {interval[0]}]")
    return interval


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
        return _ascending(interval)

    def acts_at(self, t: float) -> bool:
        return self.scale != 1 and self.interval[0] - EDGE <= t <= self.interval[1] + EDGE

    @property
    def description(self) -> str:
        if self.scale == 1:
            return ""
        channels = "" if self.channels == "all" else f" on {self.channels} channels"
        interval = "" if self.interval == (0, 1) else f" for t in [{self.interval[0]:g}, {self.interval[1]:g}]"
        kind = "guidance" if self.guide is None else "autoguidance"
        return f", {kind} {self.scale:g}{channels}{interval}"


class EpsilonScaling(Entry):
    """The noise that the network predicts is divided by a factor: see mixflow.sampling.epsilon_scaled."""

    factor: Positive  # 1 is none
    start: Annotated[float, Field(gt=0, le=1), TEXT]  # acts from this time on


class TimeShift(Entry):
    """The network is told the time that a learned clock reads off the state: see mixflow.sampling.time_shifted.

    The clock is that of the checkpoint's latents.
    """

    window: Fraction  # labels stay within half of it of the time; 0 is none
    interval: Annotated[tuple[Fraction, Fraction], LIST]  # acts for t in it

    @field_validator("interval")
    @classmethod
    def _ascending(cls, interval: tuple[float, float]) -> tuple[float, float]:
        return _ascending(interval)

    def acts_at(self, t: float) -> bool:
        return self.interval[0] - EDGE <= t <= self.interval[1] + EDGE


class DifferentialCorrection(Entry):
    """After each step the state is pushed away from the data estimate: see mixflow.sampling.differential_correction."""

    band: Literal["low", "pixel"]
    strength: Annotated[float, Field(allow_inf_nan=False), TEXT]  # 0 is none; below 0 towards the estimate


CORRECTIONS = ("epsilon_scaling", "time_shift", "differential_correction")  # keys of FixedStep


class AnySampler(Entry):
    """What all samplers share."""

    guidance: Guidance
    labels: Literal["balanced", "balanced_shuffled", "random"]
    num_images: Annotated[int, Field(ge=2), TEXT]
    to_uint8: Literal["round", "truncate"]
    state: Literal["float32", "float64"]
    precision: Precision
    seed: Seed

    @model_validator(mode="before")
    @classmethod
    def _corrections_go_with_fixed_steps(cls, values: Any) -> Any:
        for key in CORRECTIONS if isinstance(values, dict) else ():
            if values.get(key) is not None and key not in cls.model_fields:
                raise UserError(
                    f"{key}: is defined for ODE solvers of fixed steps, not for {values.get('solver')}: take euler or "
                    "heun, or leave it out"
                )
        return values

    @property
    def protocol(self) -> str:
        """What a header has no room for, though the numbers depend on it."""
        pixels = "" if self.to_uint8 == "round" else ", pixel values truncated"
        labels = self.labels.replace("_", " and ")
        guide = "" if self.guidance.guide is None else f", guided by {self.guidance.guide}"
        return f"{self.num_images:,} images, {labels} labels, {self.precision}{pixels}{guide}, {self.seed_text}"

    @property
    def seed_text(self) -> str:
        """How `protocol` says the seed."""
        return f"seed {self.seed}"


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
    epsilon_scaling: EpsilonScaling | None = None
    time_shift: TimeShift | None = None
    differential_correction: DifferentialCorrection | None = None

    @model_validator(mode="after")
    def _correction_goes_with_solver(self) -> FixedStep:
        if self.differential_correction is not None and self.solver not in ("euler", "heun"):
            raise UserError(
                f"differential_correction: is defined for euler and heun, not for {self.solver}: take one of them, or "
                "leave it out"
            )
        return self

    @property
    def clock_times(self) -> list[float]:
        """The times of the calls whose label the clock reads; none without a time shift."""
        return [] if self.time_shift is None else [t for t in self._evaluated_at() if self.time_shift.acts_at(t)]

    @property
    def corrections(self) -> str:
        """What is done against exposure bias, for headers."""
        found = []
        if (scaling := self.epsilon_scaling) is not None:
            found.append(f", noise / {scaling.factor:g} from t = {scaling.start:g}")
        if (shift := self.time_shift) is not None:
            low, high = shift.interval
            found.append(f", labels by the clock within {shift.window / 2:g} for t in [{low:g}, {high:g}]")
        if (correction := self.differential_correction) is not None:
            found.append(f", {correction.band} correction {correction.strength:g}")
        return "".join(found)

    @property
    def description(self) -> str:
        titles = {"euler": "Euler", "heun": "Heun", "heun_repa": "REPA's Heun", "midpoint": "midpoint", "rk4": "RK4"}
        title = titles[self.solver]
        return f"{title} {self.num_steps}{self.guidance.description}{self.corrections}"

    @property
    def call_times(self) -> list[float] | None:
        """Paper time by which each velocity evaluation decides on guidance."""
        # The corrector of heun_repa goes by the step's start.
        return self._evaluated_at(repa_corrector=0.0)

    def _evaluated_at(self, repa_corrector: float = 1.0) -> list[float]:
        """Paper time of each velocity evaluation."""
        stages = {
            "euler": (0.0,),
            "heun": (0.0, 1.0),
            "heun_repa": (0.0, repa_corrector),
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
