"""Encode a dataset once: shards of what the autoencoder keeps of each image, and the index that describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mixflow.autoencoders import load_autoencoder
from mixflow.config import slice_key
from mixflow.data.images import ImageSet, load_digits
from mixflow.data.latents import FORMAT, write_shard
from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.files import write_json
from mixflow.runtime.progress import Progress, log
from mixflow.runtime.provenance import RunRecord


def load_images(dataset: dict[str, Any]) -> dict[str, ImageSet]:
    """Return the splits of a resolved dataset entry."""
    if dataset["kind"] != "digits":
        raise UserError(f"dataset kind '{dataset['kind']}' is not known{did_you_mean(dataset['kind'], ['digits'])}")
    return load_digits(dataset["resolution"], dataset["num_held_out"], dataset["seed"])


def cache_latents(settings: dict[str, Any], out: Path) -> None:
    """Write `out` (index.json) and, beside it, the shards. Whole shards of a killed run of the same settings are kept.

    `settings` is the slice `cache_latents` of the config: {latents, dataset, autoencoder, shard_size}.
    """
    record = RunRecord("cache-latents", settings, parents={})
    key = slice_key(settings)[:8]
    autoencoder = load_autoencoder(settings["autoencoder"])
    splits = load_images(settings["dataset"])
    progress = Progress(settings["latents"], sum(len(split.labels) for split in splits.values()), "image")
    index: dict[str, Any] = {"format": FORMAT, "settings": settings, "splits": {}}
    index["num_classes"] = settings["dataset"]["num_classes"]
    for name, split in splits.items():
        shards: list[dict[str, Any]] = []
        for start in range(0, len(split.labels), settings["shard_size"]):
            chosen = slice(start, start + settings["shard_size"])
            stored = autoencoder.encode(torch.from_numpy(split.images[chosen]))
            index.setdefault("latent_shape", list(autoencoder.latents(stored[:1], None).shape[1:]))
            path = out.parent / f"{name}-{len(shards):05d}-{key}.safetensors"
            labels, indices = torch.from_numpy(split.labels[chosen]), torch.from_numpy(split.indices[chosen])
            shards.append(write_shard(path, stored, labels, indices))
            progress.advance(len(labels), len(labels))
        index["splits"][name] = {"num_images": len(split.labels), "shards": shards}
    progress.close()
    write_json(out, index)
    _remove_other_shards(out, index)
    record.write(out.parent / "run.json", [out], images=progress.done)
    log.info("%s: %d images in %s", settings["latents"], progress.done, out)


def _remove_other_shards(out: Path, index: dict[str, Any]) -> None:
    """Remove shards of earlier settings: the index no longer names them."""
    named = {shard["file"] for split in index["splits"].values() for shard in split["shards"]}
    for path in out.parent.glob("*.safetensors"):
        if path.name not in named:
            path.unlink()
