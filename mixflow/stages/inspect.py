"""Say what a file is: weights, latent cache, sample file, reference, metrics, run record or table row."""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mixflow.runtime.errors import UserError
from mixflow.runtime.files import read_json
from mixflow.runtime.weights_header import safetensors_header

_TORCH_ENDINGS = (".pt", ".pth", ".ckpt", ".bin")
# Networks and caches are imported where they are needed: most files are told apart in a blink, without torch.


def describe(path: Path) -> dict[str, Any]:
    """Return {"file", "kind", ...facts}; a file that is none of ours, or is broken, is a `UserError`."""
    if path.is_dir() and (path / "index.json").exists():
        path = path / "index.json"
    if not path.is_file():
        raise UserError(f"'{path}' is not a file: name a weights file, an index.json, a samples.npz or a result")
    return {"file": str(path), "bytes": path.stat().st_size, **_facts(path)}


def _facts(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return _describe_safetensors(path)
    if path.suffix in _TORCH_ENDINGS:
        return _describe_part_of_rae(path) or _describe_weights(path)
    if path.suffix == ".npz":
        return _describe_samples(path)
    if path.suffix == ".json":
        return _describe_json(path)
    raise UserError(f"'{path}' has an ending this command does not know: it reads .safetensors, .pt, .npz and .json")


def _describe_safetensors(path: Path) -> dict[str, Any]:
    header = safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    names = set(header)
    if names == {"stored", "labels", "indices"}:
        return {"kind": "latent shard", "images": header["labels"]["shape"][0], "stored": header["stored"]["shape"]}
    if "train.mu" in names:
        splits = {name.split(".")[0]: header[name]["shape"][0] for name in sorted(names) if name.endswith(".images")}
        return {"kind": "reference", "features": header["train.mu"]["shape"][0], "images": splits}
    saved = json.loads(metadata.get("mixflow", "{}"))
    if saved.get("kind") == "classifier":
        return {**saved, "kind": "feature network"}
    if saved.get("kind") == "clock":
        return {**saved, "kind": "learned clock"}
    if saved.get("file") == "mixflow reference":
        saved |= {"extractor_sha256": saved.pop("extractor"), "source_sha256": saved.pop("source")}
        return {**saved, "extractor": saved["kind"], "file": str(path), "kind": "reference"}
    return _describe_weights(path)


def _describe_weights(path: Path) -> dict[str, Any]:
    from mixflow.models import describe_weights

    return {"kind": "weights", **describe_weights(path)}


def _describe_part_of_rae(path: Path) -> dict[str, Any] | None:
    """Return what the statistics or the decoder of a representation autoencoder are, None for any other torch file."""
    from mixflow.runtime.torch_file import read_torch_file

    held = None
    with contextlib.suppress(UserError):  # whatever is wrong with it, reading it as weights tells
        held = read_torch_file(path, f"'{path}'")
    if not isinstance(held, dict):
        return None
    if set(held) == {"mean", "var"}:
        shapes = {name: None if values is None else list(values.shape) for name, values in held.items()}
        return {"kind": "latent statistics", "shapes": shapes}
    names = ("decoder_embed.weight", "decoder_pred.weight", "decoder_layers.0.intermediate.dense.bias")
    if not set(names) <= set(held):
        return None
    (width, channels), (pixels, _), (mlp_width,) = (held[name].shape for name in names)
    layers = {name.split(".")[1] for name in held if name.startswith("decoder_layers.")}
    positions = held.get("decoder_pos_embed")  # some files leave it out, since it can be computed
    return {
        "kind": "decoder of a representation autoencoder",
        "channels": channels,
        "width": width,
        "mlp_width": mlp_width,
        "layers": len(layers),
        "patch_size": math.isqrt(pixels // 3),
        "grid": None if positions is None else math.isqrt(positions.shape[1] - 1),
        "parameters": sum(tensor.numel() for tensor in held.values()),
    }


def _describe_samples(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {member.removesuffix(".npy"): _npy_header(archive, member) for member in archive.namelist()}
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"'{path}' is not a whole .npz archive ({error}): sample again, or fetch it again") from None
    if "arr_0" not in shapes:
        raise UserError(
            f"'{path}' has no member arr_0 (it has {', '.join(shapes)}): a sample file keeps its images there"
        )
    shape, dtype = shapes["arr_0"]
    facts: dict[str, Any] = {"kind": "samples", "images": shape[0], "shape": shape[1:], "dtype": dtype}
    return {**facts, "labels": "arr_1" in shapes, "memory_mappable": stored}


def _npy_header(archive: zipfile.ZipFile, member: str) -> tuple[list[int], str]:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return list(shape), str(dtype)


def _describe_json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"'{path}' is JSON but none of this project's results")
    if "latent_shape" in value:
        from mixflow.data.latents import LatentCache

        cache = LatentCache(path)
        splits = {name: split["num_images"] for name, split in cache.index["splits"].items()}
        shards = sum(len(split["shards"]) for split in cache.index["splits"].values())
        return {
            "kind": "latent cache",
            "images": splits,
            "latent_shape": list(cache.latent_shape),
            "num_classes": cache.num_classes,
            "shards": shards,
            **{name: cache.index["settings"][name] for name in ("dataset", "autoencoder")},
        }
    if "stage" in value and "parents" in value:
        kept = ("stage", "started", "measured", "outputs", "settings", "parents", "code", "machine")
        return {"kind": "run record", **{name: value[name] for name in kept}}
    if {"readings", "clocks"} <= set(value):
        return {"kind": "Slow Flow", **{name: value[name] for name in ("checkpoint", "sampler", "num_images", "law")}}
    if "metrics" in value and "protocol" in value:
        return {"kind": "metrics", **value["metrics"], "images sampled": value["num_images"]}
    if "sets" in value and "spread" in value:
        return {"kind": "metrics of several sets", "sets": len(value["sets"]), **value["spread"]}
    if "cells" in value:
        return {"kind": "table row", **value}
    if {"download", "files"} <= set(value):
        return {"kind": "download", **value}
    if set(value) == {"theory", "points"}:
        return {"kind": "theory", "points": len(value["points"]), **value["theory"]}
    if set(value) == {"step", "loss"}:
        last = value["loss"][-1] if value["loss"] else None
        return {"kind": "losses", "steps": value["step"][-1] if value["step"] else 0, "last_loss": last}
    raise UserError(f"'{path}' is JSON but none of this project's results")


def render(facts: dict[str, Any]) -> str:
    """Return facts as indented `name: value` lines."""
    return "\n".join(_lines(facts, 0))


def _lines(facts: dict[str, Any], depth: int) -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}{name}:", *_lines(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{name}: {value}")
    return lines
