"""One training loop for every family of networks.

What makes a run repeatable: the loss of step k is computed from draws that depend on (seed, k, position in the global
batch) alone, the per-sample losses are divided by the *global* batch, and everything else lives in the resume point.
Process count, micro-batches, kills and preemption therefore change nothing beyond float rounding.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path
from mixflow.runtime.progress import Progress, log
from mixflow.runtime.stopping import StopRequest, Unfinished

# (network, step, positions int64 [b] on the CPU) -> losses [b] of the samples at these positions of the global batch.
LossFunction = Callable[[nn.Module, int, Tensor], Tensor]

CONTINUE, SAVE, STOP = 0, 1, 2
AGREE_SECONDS = 5.0  # how late several processes may notice SIGTERM: a queue's SIGKILL follows 30 s after it, often


@dataclass(frozen=True)
class Decay:
    """Constant until `start_step`, then linear, and constant at `learning_rate` from `end_step` on."""

    start_step: int
    end_step: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """The optimiser's side of a training run."""

    num_steps: int
    batch_size: int  # global
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int  # linear from 0
    gradient_clip: float | None  # global norm
    ema_decay: float
    decay: Decay | None = None  # None: constant after the warm-up

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rate, decay = self.learning_rate, self.decay
        if decay is not None and step > decay.start_step:
            passed = min(1.0, (step - decay.start_step) / max(decay.end_step - decay.start_step, 1))
            rate = (1.0 - passed) * rate + passed * decay.learning_rate  # exact at both ends
        return rate * min(1.0, (step + 1) / max(self.warmup_steps, 1))


def train(
    accelerator: Accelerator,
    network: nn.Module,
    loss_function: LossFunction,
    recipe: Recipe,
    resume_file: Path,
    *,
    name: str = "train",
    micro_batch: int | None = None,  # rows per forward pass on one device; None: the device's whole share
    log_every: int = 50,  # steps; the device is waited for then, and where processes agree on stopping
    save_every_seconds: float = 20.0,  # at least; rarer when saving is slow, so that it costs at most 2% of the time
    stop: StopRequest | None = None,
    on_log: Callable[[int, float], Any] | None = None,  # (step, mean loss since the last call), rank 0 only
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Train `network` in place; return (EMA state dict on the CPU, history {"step": [...], "loss": [...]}).

    Continues from `resume_file` where there is one. Raises `Unfinished` after saving when `stop` becomes true, and
    `UserError` when the loss is no longer finite (the last resume point stays).
    """
    positions = micro_batches(recipe.batch_size, accelerator, micro_batch)
    device = accelerator.device
    network.train()
    ema = {key: value.detach().clone() for key, value in network.state_dict().items()}
    ema_tensors = [ema[key] for key, _ in network.named_parameters()]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, betas=recipe.betas, eps=1e-8, weight_decay=recipe.weight_decay, fused=True
    )
    state = _load(resume_file, network, ema, optimizer) if resume_file.exists() else None
    first_step = state["step"] if state else 0
    history: dict[str, list[float]] = state["history"] if state else {"step": [], "loss": []}
    loss_sum = torch.tensor(state["loss_sum"] if state else 0.0, dtype=torch.float64, device=device)
    loss_steps: int = state["loss_steps"] if state else 0

    wrapped = accelerator.prepare_model(network)
    parameters = list(network.parameters())
    world = accelerator.num_processes
    folder = resume_file.parent if accelerator.is_main_process else None
    progress = Progress(name, recipe.num_steps, "step", first_step, folder=folder)
    agree = _Agreement(accelerator, first_step, log_every)
    last_save, save_seconds = time.monotonic(), 0.0

    def save(step: int) -> None:
        nonlocal last_save, save_seconds
        start = time.monotonic()
        mean_sum = accelerator.reduce(loss_sum.clone(), "mean").item()
        if accelerator.is_main_process:
            with atomic_path(resume_file) as temporary:
                torch.save(
                    {
                        "step": step,
                        "network": network.state_dict(),
                        "ema": ema,
                        "optimizer": optimizer.state_dict(),
                        "history": history,
                        "loss_sum": mean_sum,
                        "loss_steps": loss_steps,
                    },
                    temporary,
                )
        last_save = time.monotonic()
        save_seconds = last_save - start

    for step in range(first_step, recipe.num_steps):
        rate = recipe.rate_at(step)
        if step == first_step or rate != recipe.rate_at(step - 1):
            for group in optimizer.param_groups:
                group["lr"] = rate

        for number, micro_positions in enumerate(positions):
            last = number == len(positions) - 1
            with _synchronise_gradients(accelerator, wrapped, last), accelerator.autocast():
                losses = loss_function(wrapped, step, micro_positions)  # [b]
                # DDP averages over processes: times `world` it is the sum over the whole batch.
                loss = losses.sum() * (world / recipe.batch_size)
            accelerator.backward(loss)
            loss_sum += loss.detach()
        if recipe.gradient_clip is not None:
            accelerator.clip_grad_norm_(trained, recipe.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(ema_tensors, [p.detach() for p in parameters], 1.0 - recipe.ema_decay)
        loss_steps += 1

        done = step + 1
        progress.advance(1, recipe.batch_size)
        if done % log_every == 0 or done == recipe.num_steps:
            mean_loss = accelerator.reduce(loss_sum, "mean").item() / loss_steps
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"the loss of '{name}' is {mean_loss} at step {done}: lower learning_rate, set gradient_clip, or "
                    "use precision fp32, then run the same command again"
                )
            history["step"].append(done)
            history["loss"].append(mean_loss)
            loss_sum.zero_()
            loss_steps = 0
            if on_log is not None and accelerator.is_main_process:
                on_log(done, mean_loss)
        due = time.monotonic() - last_save >= max(save_every_seconds, 50.0 * save_seconds)
        action = agree(done, STOP if stop else SAVE if due else CONTINUE)
        if action != CONTINUE and done < recipe.num_steps:
            save(done)
            if action == STOP:
                progress.close()
                reason = stop.reason if stop else "another process was told to stop"
                raise Unfinished(f"'{name}' was saved at step {done} of {recipe.num_steps} because {reason}")
    progress.close()
    log.info("%s: %d steps done, %s images/s", name, recipe.num_steps, f"{progress.images_per_second:,.0f}")
    return {key: value.cpu() for key, value in ema.items()}, history


def micro_batches(batch_size: int, accelerator: Accelerator, micro_batch: int | None = None) -> list[Tensor]:
    """Return this process's positions in the global batch, cut into micro-batches: int64 [b] each, on the CPU."""
    if batch_size < accelerator.num_processes:
        raise UserError(
            f"batch_size {batch_size} cannot be split over {accelerator.num_processes} processes: use fewer processes"
        )
    share = torch.arange(batch_size).tensor_split(accelerator.num_processes)[accelerator.process_index]
    return list(share.split(micro_batch or len(share)))


def _synchronise_gradients(accelerator: Accelerator, wrapped: nn.Module, last: bool) -> Any:
    """All-reduce gradients with the last micro-batch only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(wrapped)


class _Agreement:
    """What all processes do after a step: the strongest wish of any. Several talk every AGREE_SECONDS of steps.

    More often would cost time, for whoever talks waits for the device; so does the log, every `at_most` steps.
    """

    def __init__(self, accelerator: Accelerator, first_step: int, at_most: int) -> None:
        self._accelerator, self._at_most = accelerator, at_most
        self._last, self._last_time, self._next = first_step, time.monotonic(), first_step + 1

    def __call__(self, done: int, wish: int) -> int:
        if self._accelerator.num_processes == 1:
            return wish
        if done < self._next:
            return CONTINUE
        pace = (time.monotonic() - self._last_time) / (done - self._last)
        told = torch.tensor([[wish, pace]], dtype=torch.float32, device=self._accelerator.device)
        strongest, slowest = self._accelerator.gather(told).amax(dim=0).tolist()
        self._last, self._last_time = done, time.monotonic()
        self._next = done + round(min(max(AGREE_SECONDS / max(slowest, 1e-9), 1), self._at_most))
        return int(strongest)


def _load(path: Path, network: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    # Mapped, for each process of a node reads the whole file, and what it needs of it goes to its own device.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    network.load_state_dict(state["network"])
    for key, value in state["ema"].items():
        ema[key].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    log.info("continuing from step %d", state["step"])
    return state
