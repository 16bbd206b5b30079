"""Stand-ins: small random files in the peers' formats, so that every rule can be rehearsed without weights or ImageNet.

They differ from the real files in size and content alone; whatever reads them runs the code that reads the real ones.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mixflow.autoencoders.rae_decoder import Decoder
from mixflow.evaluation import moments
from mixflow.evaluation.inception import load_inception, tiny_inception_state_dict
from mixflow.models import build_model, load_dinov2_class
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path, file_sha256, write_json
from mixflow.runtime.progress import log

IMAGES_PER_REFERENCE = 64
EXIF_ORIENTATION, ROTATED = 0x0112, 6
MARKER = ".stand-ins"  # lies in a folder that may be emptied
WEIGHT_SCALE = 0.05  # of the random values that take the place of trained ones, and of the zeros of a fresh network


def make_stand_ins(settings: dict[str, Any], out: Path) -> None:
    """Make every file that the slice `stand_ins` of the config names, and `out`, the list of their hashes."""
    _empty(Path(settings["folder"]))
    seed = settings["seed"]
    for folder, sizes in settings["images"].items():
        _make_images(Path(folder), seed=seed, **sizes)
    for number, (path, options) in enumerate(settings["networks"].items()):
        _make_network(Path(path), options, seed + number, wrapped=number % 2 == 1)
    for path, options in settings["autoencoders"].items():
        _make_autoencoder(Path(path).parent, options, seed)
    _make_rae_parts(settings["rae"].values(), seed)
    for path, num_features in settings["encoders"].items():
        _make_encoder(Path(path), num_features, seed)
    for path, options in settings["extractors"].items():
        if options["kind"] == "dinov2":
            _make_encoder(Path(path), options["num_features"], seed)
        else:
            _save(Path(path), tiny_inception_state_dict(seed, width_divisor=32))
    for path, options in settings["references"].items():
        make = _make_edm2_reference if options["kind"] == "dinov2" else _make_adm_reference
        make(Path(path), _reference_images(options["resolution"], seed), Path(options["extractor"]))
    files = sorted(path for path in Path(settings["folder"]).rglob("*") if path.is_file() and path.name != MARKER)
    write_json(out, {str(path): file_sha256(path) for path in files})
    log.info("%d stand-ins in %s", len(files), settings["folder"])


def _empty(folder: Path) -> None:
    """Remove the stand-ins of an earlier time; a folder of anything else is left alone."""
    marker = folder / MARKER
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise UserError(f"the folder '{folder}' holds other files: name another one as stand_ins.folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()


def _make_images(folder: Path, *, num_classes: int, num_images: int, seed: int) -> None:
    """Write train/<class>/*.JPEG: digits on colour gradients, of odd sizes; one grey, one CMYK, one EXIF-rotated."""
    from sklearn.datasets import load_digits

    digits = load_digits().images / 16  # [1797,8,8] in [0, 1]
    rng = np.random.default_rng(seed)
    for number in range(num_images):
        class_id = number % num_classes
        width, height = (int(side) for side in rng.integers(40, 300, size=2))
        digit = Image.fromarray((255 * digits[rng.integers(len(digits))]).astype(np.uint8)).resize((width, height))
        ramps = np.stack(np.broadcast_arrays(*np.ogrid[0 : 1 : height * 1j, 0 : 1 : width * 1j], 0.5), axis=-1)
        colours = 160 * ramps @ rng.uniform(size=(3, 3)) / 3 + 0.4 * np.asarray(digit, dtype=float)[..., None]
        image = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
        options: dict[str, Any] = {}
        if number == 0:
            image = image.convert("L")
        elif number == 1:
            image = image.convert("CMYK")
        elif number == 2:
            options["exif"] = Image.Exif()
            options["exif"][EXIF_ORIENTATION] = ROTATED
        path = folder / "train" / f"n{class_id:08d}" / f"n{class_id:08d}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, "JPEG", quality=90, **options)


def _make_network(path: Path, options: dict[str, Any], seed: int, wrapped: bool) -> None:
    """Write a network as its authors publish it, flat, or (`wrapped`) as their training scripts save it."""
    family = options["family"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _randomised(build_model(family, **{key: value for key, value in options.items() if key != "family"}))
    weights = network.state_dict()
    checkpoint: dict[str, Any] = {"model": weights, "ema": weights}
    if family == "rae":
        checkpoint |= {"step": 0, "epoch": 0, "optimizer": {}, "scheduler": {}}
    else:
        args = argparse.Namespace(model="stand-in", num_classes=options["num_classes"])
        checkpoint |= {"opt": {}, "args": args}
    _save(path, checkpoint if wrapped else dict(weights))


@torch.no_grad()
def _randomised(network: nn.Module) -> nn.Module:
    """Give the zeros of a fresh network (gates, head) random values, so that it is no identity."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(WEIGHT_SCALE * torch.randn_like(parameter))
    return network


def _make_autoencoder(folder: Path, options: dict[str, Any], seed: int) -> None:
    """Write a diffusers AutoencoderKL with as many stages as the downsampling needs."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    num_stages = options["downsampling"].bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * num_stages,
            up_block_types=("UpDecoderBlock2D",) * num_stages,
            block_out_channels=(8,) * num_stages,
            norm_num_groups=4,
            latent_channels=options["channels"],
            scaling_factor=options["scale"],
        )
    autoencoder.save_pretrained(folder)


def _make_rae_parts(entries: Collection[dict[str, Any]], seed: int) -> None:
    """Write encoders, decoders and statistics of representation autoencoders, each as far as an entry names it."""
    sharing: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if "encoder" in entry:
            sharing.setdefault(entry["encoder"], []).append(entry)
        if "decoder" in entry:
            _make_rae_decoder(Path(entry["decoder"]), entry, seed)
        if "statistics" in entry:
            _make_rae_statistics(Path(entry["statistics"]), entry, seed)
    for folder, users in sharing.items():
        largest = max(entry["encoder_size"] for entry in users)
        _make_rae_encoder(Path(folder), users[0]["channels"], users[0]["encoder_patch"], largest, seed)


def _make_rae_encoder(folder: Path, channels: int, patch: int, largest: int, seed: int) -> None:
    """Write a DINOv2 with registers of two blocks as transformers does; its own images are larger than `largest`.

    So positions must be resized, as those of the real one.
    """
    from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import Dinov2WithRegistersConfig
    from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # of writing one small file
    config = Dinov2WithRegistersConfig(
        hidden_size=channels,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=largest + patch,
        patch_size=patch,
        num_register_tokens=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Dinov2WithRegistersModel(config)
        _randomised(encoder)
    encoder.save_pretrained(folder)


def _make_rae_decoder(path: Path, options: dict[str, Any], seed: int) -> None:
    """Write a decoder of two layers, flat, as RAE's authors publish theirs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(
            width=16 * options["decoder_heads"],
            depth=2,
            num_heads=options["decoder_heads"],
            mlp_width=40,
            num_channels=options["channels"],
            grid=options["size"],
            patch_size=options["downsampling"],
        )
        _save(path, dict(_randomised(decoder).state_dict()))


def _make_rae_statistics(path: Path, options: dict[str, Any], seed: int) -> None:
    """Write statistics as the released ones are: no mean, and a variance for each position."""
    shape = (options["channels"], options["size"], options["size"])
    var = 0.3 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    _save(path, {"mean": None, "var": var})


def _make_encoder(path: Path, num_features: int, seed: int) -> None:
    """Write a DINOv2 of two blocks under timm's key names."""
    import safetensors.torch
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = timm.create_model(
            "vit_base_patch14_dinov2",
            embed_dim=num_features,
            depth=2,
            num_heads=max(num_features // 64, 1),
            init_values=1.0,  # of the layer scales: from timm's 1e-5 the class token would hardly see the image
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(encoder.state_dict(), path)


def _reference_images(resolution: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, size=(IMAGES_PER_REFERENCE, 4, 4, 3)).astype(np.uint8)
    size = (resolution, resolution)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in coarse])


def _make_adm_reference(path: Path, images: np.ndarray, extractor: Path) -> None:
    """Write a reference file as OpenAI publishes it: images, and the moments of their features."""
    network = load_inception(extractor)
    with torch.inference_mode():
        pool, spatial, _ = network(torch.from_numpy(images))
    (mu, sigma), (mu_s, sigma_s) = moments(pool), moments(spatial)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)


def _make_edm2_reference(path: Path, images: np.ndarray, extractor: Path) -> None:
    """Write a statistics file as EDM2 publishes it."""
    mu, sigma = (x.cpu().numpy() for x in moments(load_dinov2_class(extractor)(images)))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pickle.dump({"fd_dinov2": {"mu": mu, "sigma": sigma}}, file)


def _save(path: Path, payload: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(payload, temporary)
