"""Train a network: from scratch, or post-train it from another checkpoint (MixFlow).

Its latents come from a cache of them, or (RAE) are encoded from a cache of pixels, each batch when it is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixflow.autoencoders import RAE, Autoencoder, load_autoencoder
from mixflow.config import slice_key
from mixflow.data.latents import DataOrder, LatentCache, LatentSplit, Prefetcher
from mixflow.flow import INTERPOLANTS, flow_matching_loss, self_rollout_loss, time_pair
from mixflow.models import REPA, VelocityNetwork, build_model, check_projectors, load_dinov2, save_model
from mixflow.runtime.devices import start_accelerator
from mixflow.runtime.downloads import downloaded_file
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import WorkFolder, require_writable, write_json
from mixflow.runtime.progress import last_sign, log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.seeds import Stream, normal, uniform
from mixflow.runtime.stopping import StopRequest
from mixflow.stages.networks import autoencoder_files, network_from_file
from mixflow.training import Decay, Recipe, aligned_flow_matching_loss, micro_batches, train

MAX_LOG_EVERY = 50  # steps; short runs log about a hundred times


def run(
    settings: dict[str, Any],
    *,
    latents: Path,  # index.json of the cache: of latents, or of pixels where the slice says "encode"
    init: Path | None,  # weights of the parent, None when training from scratch
    out: Path,  # model.safetensors: EMA weights; losses.json and run.json are written beside it
    scratch: Path,
    pixels: Path | None = None,  # index.json of the cached images, and
    encoder: Path | None = None,  # record of the downloaded image encoder: what REPA's alignment needs
    autoencoder: Mapping[str, Path] = {},  # role -> record of a download, where latents need files to be made
    tensorboard: Path | None = None,
    micro_batch: int | None = None,
    save_every_seconds: float = 20.0,
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Train as the slice `train` of the config says; running it again after any interruption continues."""
    recipe = settings["train"]
    name = settings["checkpoint"]
    files = _autoencoder_files(settings, autoencoder)
    require_writable(out.parent)
    parents = {"latents": latents, "init": init, "pixels": pixels}
    if encoder is not None:
        parents["encoder"] = downloaded_file(encoder)
    record = RunRecord("train", settings, {role: path for role, path in (parents | files).items() if path})
    stop = StopRequest(time_budget_minutes)
    accelerator = start_accelerator(recipe["precision"], expected_gpus)
    caches = [LatentCache(path) for path in (latents, pixels) if path]
    work = WorkFolder(scratch, "train", name, slice_key(settings, *record.parent_hashes.values()))
    if accelerator.is_main_process:
        for cache in caches:
            cache.verify()
        work.open()
    accelerator.wait_for_everyone()
    if record.already_made(out.parent / "run.json"):
        log.info("%s: already made, nothing to do", name)
        work.remove()
        return

    network = _network(recipe, init).to(accelerator.device)
    _check_cache(settings, caches[0])
    alignment = _alignment(settings, caches[1:], parents.get("encoder"), network, accelerator.device)
    codec = load_autoencoder(settings["autoencoder"], files, accelerator.device)
    if recipe["compile"]:
        network.compile()
        if isinstance(codec, RAE):
            codec.compile()
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
        make_loss(
            recipe,
            caches[0].split("train"),
            codec,
            accelerator.device,
            encode=settings.get("encode", False),
            alignment=alignment,
            schedule=micro_batches(recipe["batch_size"], accelerator, micro_batch),
        ),
        Recipe(
            num_steps=recipe["num_steps"],
            batch_size=recipe["batch_size"],
            learning_rate=recipe["learning_rate"],
            betas=tuple(recipe["betas"]),
            weight_decay=recipe["weight_decay"],
            warmup_steps=recipe["warmup_steps"],
            decay=Decay(**recipe["decay"]) if "decay" in recipe else None,
            gradient_clip=recipe.get("gradient_clip"),
            ema_decay=recipe["ema_decay"],
        ),
        work.path / "resume.pt",
        name=name,
        micro_batch=micro_batch,
        save_every_seconds=save_every_seconds,
        log_every=min(max(recipe["num_steps"] // 100, 1), MAX_LOG_EVERY),
        stop=stop,
        on_log=on_log,
    )
    if accelerator.is_main_process:
        losses = out.parent / "losses.json"
        write_json(losses, history)
        save_model(out, ema, {"family": recipe["model"]["family"], **network.options})
        sign = last_sign(work.path) or {"first": 0, "images_per_second": None}
        record.write(
            out.parent / "run.json",
            [out, losses],
            images=recipe["num_steps"] * recipe["batch_size"],
            images_this_attempt=(recipe["num_steps"] - sign["first"]) * recipe["batch_size"],
            images_per_second=sign["images_per_second"],
            final_loss=history["loss"][-1],
        )
        work.remove()
        log.info("%s: weights in %s", name, out)
    if writer is not None:
        writer.close()
    accelerator.end_training()


class Alignment(NamedTuple):
    """What REPA's alignment needs besides the latents."""

    pixels: LatentSplit  # the images behind the latents, in the same order
    encoder: nn.Module  # uint8 [b,3,H,W] -> patch features [b,N,D]
    coefficient: float


class _Batch(NamedTuple):
    """What a micro-batch reads from disk; on a machine with a GPU in pinned memory."""

    stored: Tensor
    labels: Tensor
    pixels: Tensor | None


def make_loss(
    recipe: dict[str, Any],
    images: LatentSplit,
    autoencoder: Autoencoder,
    device: torch.device,
    *,
    encode: bool = False,  # whether `images` holds pixels, uint8 [3,H,W], that the autoencoder is to encode
    alignment: Alignment | None = None,
    schedule: Sequence[Tensor] = (),  # the micro-batches of a step: known in advance, the next one is read ahead
) -> Callable[[nn.Module, int, Tensor], Tensor]:
    """Return the loss of a step: every draw depends on (seed, step, position in the global batch) alone."""
    seed, batch_size = recipe["seed"], recipe["batch_size"]
    interpolant = INTERPOLANTS[recipe["interpolant"]]
    label_dropout = recipe["model"]["label_dropout"]
    shape = network_input_shape(recipe["model"])
    strength, rollout = recipe.get("input_perturbation"), dict(recipe.get("self_rollout", {}))
    weight = rollout.pop("weight", 0.0)
    arm = {"min_remaining": recipe["endpoint_target"]["min_remaining"]} if "endpoint_target" in recipe else {}
    order = DataOrder(len(images), seed)

    def read(key: tuple[int, tuple[int, ...]]) -> _Batch:
        step, positions = key
        chosen = order[step * batch_size + np.array(positions)]
        mirrored = None
        if recipe["horizontal_flip"]:
            mirrored = (uniform(seed, Stream.FLIP, step, torch.tensor(positions))[:, 0] < 0.5).numpy()
        stored, labels = images.gather(chosen, mirrored)
        pixels = alignment.pixels.gather(chosen, mirrored)[0] if alignment else None
        if device.type == "cuda":
            stored, labels = stored.pin_memory(), labels.pin_memory()
            pixels = None if pixels is None else pixels.pin_memory()
        return _Batch(stored, labels, pixels)

    keys = [tuple(positions.tolist()) for positions in schedule]
    number_of = {key: number for number, key in enumerate(keys)}
    reader = Prefetcher(read)

    for split in (images, *([alignment.pixels] if alignment else [])):
        split.preload()

    def fetch(step: int, positions: Tensor) -> _Batch:
        key = tuple(positions.tolist())
        if key not in number_of:
            return reader.get((step, key))
        later, number = divmod(number_of[key] + 1, len(keys))
        following = [(step + later, keys[number])] if step + later < recipe["num_steps"] else []
        return reader.get((step, key), *following)

    def loss(wrapped: nn.Module, step: int, positions: Tensor) -> Tensor:
        batch = fetch(step, positions)
        stored, labels = batch.stored.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        positions = positions.to(device, non_blocking=True)
        if encode:
            assert isinstance(autoencoder, RAE)
            data = autoencoder.encode_latents(stored.permute(0, 2, 3, 1))  # [b,C,h,w], in a precision of its own
        else:
            posterior = normal(seed, Stream.POSTERIOR, step, positions, shape) if autoencoder.is_random else None
            data = autoencoder.latents(stored, posterior)  # [b,C,h,w]
        noise = normal(seed, Stream.NOISE, step, positions, shape)
        uniforms = uniform(seed, Stream.TIME, step, positions, 3).T  # [3,b]
        t, m = time_pair(uniforms, recipe["law"], gamma=recipe["gamma"], shift=recipe["shift"])
        drop = None  # without dropout the network has no null class
        if label_dropout > 0:
            drop = uniform(seed, Stream.LABEL_DROPOUT, step, positions)[:, 0] < label_dropout
        options: dict[str, Any] = dict(arm)
        if strength is not None:
            options["perturbation"] = strength * normal(seed, Stream.PERTURBATION, step, positions, shape)

        def network(x: Tensor, t: Tensor, **wanted: bool) -> Any:
            return wrapped(x, t, labels, drop=drop, **wanted)

        drawn = noise, data, t, m, interpolant
        if alignment is None:
            losses = flow_matching_loss(network, *drawn, **options)
        else:
            assert batch.pixels is not None
            targets = [alignment.encoder(batch.pixels.to(device, non_blocking=True))]
            projecting = functools.partial(network, with_projections=True)
            coefficient = alignment.coefficient * (1 + weight)  # so that it keeps its share of the mean below
            losses = aligned_flow_matching_loss(projecting, *drawn, targets, coefficient, **options)
        if weight > 0:
            rolled_out = self_rollout_loss(network, noise, data, t, interpolant, shift=recipe["shift"], **rollout)
            losses = (losses + weight * rolled_out) / (1 + weight)
        return losses

    return loss


def network_input_shape(model: dict[str, Any]) -> tuple[int, int, int]:
    """Return (channels, height, width) of the latents a model takes."""
    return model["in_channels"], model["input_size"], model["input_size"]


def _network(recipe: dict[str, Any], init: Path | None) -> VelocityNetwork:
    if init is not None:
        return network_from_file(recipe["model"], init)
    options = dict(recipe["model"])
    family = options.pop("family")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        return build_model(family, **options)


def _alignment(
    settings: dict[str, Any],
    caches: list[LatentCache],
    encoder: Path | None,
    network: VelocityNetwork,
    device: torch.device,
) -> Alignment | None:
    """Return the images and their encoder where the recipe aligns. Raises `UserError` for what does not fit."""
    recipe, name = settings["train"], settings["checkpoint"]
    align = recipe.get("align")
    if align is None:
        if isinstance(network, REPA):
            network.projectors.requires_grad_(False)  # they get no gradient, which DDP would wait for
        return None
    if not caches or encoder is None:
        raise UserError(f"'{name}' aligns with '{align['encoder']}': give --pixels and --encoder, or set align to null")
    model = recipe["model"]
    features = load_dinov2(encoder, grid=model["input_size"] // model["patch_size"])
    check_projectors(network, [features.width], f"'{name}'")
    return Alignment(caches[0].split("train"), features.to(device), align["coefficient"])


def _autoencoder_files(settings: dict[str, Any], records: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files that it takes to make latents. Raises `UserError` where the record of one is not given."""
    needed = ["statistics"] if settings["autoencoder"]["kind"] == "rae" else []
    if settings.get("encode"):
        needed = ["encoder", *needed]
    missing = [role for role in needed if role not in records]
    if missing:
        options = " ".join(f"{role}=RECORD" for role in missing)
        raise UserError(
            f"'{settings['checkpoint']}' cannot make its latents without the {' and '.join(missing)} of its "
            f"autoencoder: give --autoencoder {options}"
        )
    return autoencoder_files(records)


def _check_cache(settings: dict[str, Any], cache: LatentCache) -> None:
    """Check that the cache holds what the entry asks for: shape and classes, and the autoencoder behind it."""
    name, recipe, autoencoder = settings["checkpoint"], settings["train"], settings["autoencoder"]
    cache.check_autoencoder(settings["pixel_autoencoder"] if settings.get("encode") else autoencoder)
    wanted, found = network_input_shape(recipe["model"]), tuple(cache.latent_shape)
    if settings.get("encode"):
        made = tuple(side // autoencoder["downsampling"] for side in found[1:])
        if found[0] != 3 or made != wanted[1:]:
            raise UserError(
                f"'{name}' takes latents of {wanted[1]}x{wanted[2]} but the images in '{cache.index_path}', "
                f"{list(found)}, become latents of {made[0]}x{made[1]}: name pixels of another dataset in "
                "encoded_from, or another model"
            )
    elif found != wanted:
        raise UserError(
            f"'{name}' takes latents of shape {list(wanted)} but '{cache.index_path}' holds "
            f"{list(found)}: name other latents in its entry, or another model"
        )
    if cache.num_classes > recipe["model"]["num_classes"]:
        raise UserError(
            f"'{name}' knows {recipe['model']['num_classes']} classes but "
            f"'{cache.index_path}' has {cache.num_classes}: name other latents in its entry, or another model"
        )
    if autoencoder["kind"] == "rae" and not settings.get("encode") and recipe["horizontal_flip"] and not cache.mirrors:
        raise UserError(
            f"'{name}' flips images, but '{cache.index_path}' holds no latents of mirror images, which are not flipped "
            "latents: set mirrors of these latents to true and cache them again, or horizontal_flip to false"
        )
