"""The processes of a stage, as far as sharing work out goes: one process needs nothing but torch."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Protocol

import torch

from mixflow.runtime.errors import UserError


class Processes(Protocol):
    """What a stage asks of its processes; accelerate's Accelerator has it too."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""

    @property
    def process_index(self) -> int:
        """Which one this is, from 0."""

    @property
    def num_processes(self) -> int:
        """How many there are."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one that writes."""

    def wait_for_everyone(self) -> None:
        """Return when all processes are here."""

    def main_process_first(self) -> Any:
        """Return a context that the others enter when the main process has left it."""

    def end_training(self) -> None:
        """Let the others go."""


class OneProcess:
    """A process by itself."""

    process_index, num_processes, is_main_process = 0, 1, True

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def wait_for_everyone(self) -> None:
        pass

    def main_process_first(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def end_training(self) -> None:
        pass


def start_processes(expected_gpus: int | None = None) -> Processes:
    """Return this process's part of all that were started; `expected_gpus` as for `start_accelerator`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from mixflow.runtime.devices import start_accelerator  # accelerate takes seconds to import

        return start_accelerator("fp32", expected_gpus)
    require_gpus(expected_gpus)
    return OneProcess()


def require_gpus(expected: int | None) -> None:
    """Raise `UserError` where fewer GPUs are visible than were asked for."""
    visible = torch.cuda.device_count()
    if expected and visible < expected:
        raise UserError(
            f"{expected} GPU(s) were asked for but {visible} are visible: check the allocation, the driver and, in a "
            "container, --nv or --gpus"
        )
