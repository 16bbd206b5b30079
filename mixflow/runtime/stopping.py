"""Stop in time: a time budget, and SIGTERM (preemption), both asked between two steps of work."""

from __future__ import annotations

import signal
import time
from types import FrameType

# EX_TEMPFAIL of sysexits.h: "try again"; the queue's retry then continues from the saved state.
EXIT_UNFINISHED = 75


class Unfinished(Exception):
    """Work was saved and stopped before its end; the same command continues it."""


class StopRequest:
    """True once the time budget is used up or SIGTERM has arrived."""

    def __init__(self, time_budget_minutes: float | None = None, reserve: float = 0.1) -> None:
        """Stop at (1 - reserve) of the budget, at most 10 minutes before its end, so that saving still fits in."""
        self.deadline: float | None = None
        if time_budget_minutes is not None:
            budget = 60.0 * time_budget_minutes
            self.deadline = time.monotonic() + budget - min(reserve * budget, 600.0)
        self.reason: str | None = None
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = "SIGTERM arrived"

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "the time budget is used up"
        return self.reason is not None
