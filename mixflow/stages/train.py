"""Train a network on cached latents: from scratch, or post-train it from another checkpoint (MixFlow)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixflow.autoencoders import Autoencoder, load_autoencoder
from mixflow.config import slice_key
from mixflow.data.latents import DataOrder, LatentCache, LatentSplit
from mixflow.flow import INTERPOLANTS, flow_matching_loss, time_pair
from mixflow.models import build_model, load_model, save_model
from mixflow.runtime.devices import start_accelerator
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import WorkFolder, write_json
from mixflow.runtime.progress import log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.seeds import Stream, normal, uniform
from mixflow.runtime.stopping import StopRequest
from mixflow.training import Recipe, train

MAX_LOG_EVERY = 50  # steps; short runs log about a hundred times


def run(
    settings: dict[str, Any],
    *,
    latents: Path,  # index.json of the cache
    init: Path | None,  # weights of the parent, None when training from scratch
    out: Path,  # model.safetensors: EMA weights; losses.json and run.json are written beside it
    scratch: Path,
    tensorboard: Path | None = None,
    micro_batch: int | None = None,
    save_every_seconds: float = 20.0,
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Train as the slice `train` of the config says; running it again after any interruption continues."""
    recipe = settings["train"]
    parents = {"latents": latents, **({"init": init} if init else {})}
    record = RunRecord("train", settings, parents)
    stop = StopRequest(time_budget_minutes)
    accelerator = start_accelerator(recipe["precision"], expected_gpus)
    cache = LatentCache(latents)
    work = WorkFolder(scratch, "train", settings["checkpoint"], slice_key(settings, *record.parent_hashes.values()))
    if accelerator.is_main_process:
        cache.verify()
        work.open()
    accelerator.wait_for_everyone()
    if record.already_made(out.parent / "run.json"):
        log.info("%s: already made, nothing to do", settings["checkpoint"])
        work.remove()
        return

    network = _network(recipe, init).to(accelerator.device)
    _check_shapes(settings, network, cache, latents)
    if recipe["compile"]:
        network.compile()
    writer = None
    if tensorboard is not None and accelerator.is_main_process:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(tensorboard))

    def on_log(step: int, loss: float) -> None:
        if writer is not None:
            writer.add_scalar("loss", loss, step)

    ema, history = train(
        accelerator,
        network,
        make_loss(recipe, cache.split("train"), load_autoencoder(settings["autoencoder"]), accelerator.device),
        Recipe(
            num_steps=recipe["num_steps"],
            batch_size=recipe["batch_size"],
            learning_rate=recipe["learning_rate"],
            betas=tuple(recipe["betas"]),
            weight_decay=recipe["weight_decay"],
            warmup_steps=recipe["warmup_steps"],
            gradient_clip=recipe.get("gradient_clip"),
            ema_decay=recipe["ema_decay"],
        ),
        work.path / "resume.pt",
        name=settings["checkpoint"],
        micro_batch=micro_batch,
        save_every_seconds=save_every_seconds,
        log_every=min(max(recipe["num_steps"] // 100, 1), MAX_LOG_EVERY),
        stop=stop,
        on_log=on_log,
    )
    if accelerator.is_main_process:
        losses = out.parent / "losses.json"
        write_json(losses, history)
        save_model(out, ema, recipe["model"])
        images = recipe["num_steps"] * recipe["batch_size"]
        record.write(out.parent / "run.json", [out, losses], images=images, final_loss=history["loss"][-1])
        work.remove()
        log.info("%s: weights in %s", settings["checkpoint"], out)
    if writer is not None:
        writer.close()
    accelerator.end_training()


def make_loss(
    recipe: dict[str, Any],
    images: LatentSplit,
    autoencoder: Autoencoder,
    device: torch.device,
) -> Callable[[nn.Module, int, Tensor], Tensor]:
    """Return the loss of a step: every draw depends on (seed, step, position in the global batch) alone."""
    seed, batch_size = recipe["seed"], recipe["batch_size"]
    interpolant = INTERPOLANTS[recipe["interpolant"]]
    label_dropout = recipe["model"]["label_dropout"]
    shape = network_input_shape(recipe["model"])
    order = DataOrder(len(images), seed)

    def loss(wrapped: nn.Module, step: int, positions: Tensor) -> Tensor:
        stored, labels = images.gather(order[step * batch_size + positions.numpy()])
        positions = positions.to(device, non_blocking=True)
        stored, labels = _to_device(stored, device), _to_device(labels, device)
        data = autoencoder.latents(stored, None)  # [b,C,h,w]
        if recipe["horizontal_flip"]:
            flip = uniform(seed, Stream.FLIP, step, positions)[:, :, None, None] < 0.5
            data = torch.where(flip, data.flip(-1), data)
        noise = normal(seed, Stream.NOISE, step, positions, shape)
        uniforms = uniform(seed, Stream.TIME, step, positions, 3).T  # [3,b]
        t, m = time_pair(uniforms, recipe["law"], gamma=recipe["gamma"], shift=recipe["shift"])
        drop = None  # without dropout the network has no null class
        if label_dropout > 0:
            drop = uniform(seed, Stream.LABEL_DROPOUT, step, positions)[:, 0] < label_dropout
        return flow_matching_loss(lambda x, t: wrapped(x, t, labels, drop=drop), noise, data, t, m, interpolant)

    return loss


def network_input_shape(model: dict[str, Any]) -> tuple[int, int, int]:
    """Return (channels, height, width) of the latents a model takes."""
    return model["in_channels"], model["input_size"], model["input_size"]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _network(recipe: dict[str, Any], init: Path | None) -> nn.Module:
    options = dict(recipe["model"])
    family = options.pop("family")
    if init is not None:
        return load_model(family, init, **{key: options[key] for key in ("num_heads", "label_dropout")})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        return build_model(family, **options)


def _check_shapes(settings: dict[str, Any], network: nn.Module, cache: LatentCache, index: Path) -> None:
    wanted = network_input_shape(settings["train"]["model"])
    if tuple(cache.latent_shape) != wanted:
        raise UserError(
            f"'{settings['checkpoint']}' takes latents of shape {list(wanted)} but '{index}' holds "
            f"{list(cache.latent_shape)}: name other latents in its entry, or another model"
        )
