"""Reading shuffled training batches: our latent cache against one `.npy` per image (REPA's layout).

Both hold the same posteriors at 256 px, on the same disk, and give the same latents 0.18215 (mean + std noise).
Baseline: float32 mean and standard deviation, one np.load and one label per item, torch's DataLoader with 0 and with 2
workers, the better of which counts; REPA's loader also reads a PNG per item, which is left out. Cold: the page cache is
emptied of the files before (posix_fadvise), and ours preloads as training does, within the time that counts. Warm:
everything has been read before. Speeds are medians of repetitions.
`python benchmarks/loader.py [--images 10000] [--batch 256] [--repeat 3] [--folder FOLDER]`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mixflow.autoencoders import load_autoencoder
from mixflow.data.latents import FORMAT, LatentCache, LatentSplit, Prefetcher, write_shard

SHARD_SIZE = 4096
SCALE = 0.18215


class FilePerImage(Dataset):
    """One file per image and one list of labels, as in REPA's dataset."""

    def __init__(self, folder: Path) -> None:
        self.labels = dict(json.loads((folder / "dataset.json").read_text())["labels"])
        self.names = sorted(self.labels)
        self.folder = folder

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int):
        name = self.names[index]
        return torch.from_numpy(np.load(self.folder / name)), torch.tensor(self.labels[name])


def write(folder: Path, num_images: int) -> None:
    """Write the same random posteriors in both layouts."""
    rng = np.random.default_rng(0)
    index = {"format": FORMAT, "settings": {}, "num_classes": 1000, "latent_shape": [4, 32, 32], "mirrors": True}
    shards, labels = [], []
    for start in range(0, num_images, SHARD_SIZE):
        count = min(SHARD_SIZE, num_images - start)
        positions = np.arange(start, start + count)
        moments = rng.standard_normal((count, 2, 8, 32, 32), dtype=np.float32).astype(np.float16)
        path = folder / f"train-{len(shards):05d}.safetensors"
        shards.append(write_shard(path, positions % 1000, positions, [moments]))
        for at, (mean_and_log_variance, _) in zip(positions.tolist(), moments.astype(np.float32), strict=True):
            mean, log_variance = np.split(mean_and_log_variance, 2)
            name = f"vae-sd/{at // 1000:05d}/img-mean-std-{at:08d}.npy"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / name, np.concatenate([mean, np.exp(0.5 * log_variance)]))
            labels.append([name, at % 1000])
    index["splits"] = {"train": {"num_images": num_images, "shards": shards}}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def empty_page_cache(folder: Path) -> None:
    """Drop what the kernel keeps of these files; it needs no rights beyond reading them."""
    os.sync()
    for path in folder.rglob("*.*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours(split: LatentSplit, batches: list[np.ndarray], noise: torch.Tensor | None):
    """Return the batches of latents, drawn while the next batch is read."""
    codec = load_autoencoder({"kind": "sd_vae", "scale": SCALE, "channels": 4, "downsampling": 8, "precision": "fp32"})
    split.preload()
    ahead = Prefetcher(lambda number: split.gather(batches[number]))
    for number in range(len(batches)):
        following = range(number + 1, min(number + 3, len(batches)))
        stored, labels = ahead.get(number, *following)
        yield (stored if noise is None else codec.latents(stored, noise)), labels
    ahead.close()


def baseline(images: FilePerImage, batches: list[np.ndarray], noise: torch.Tensor | None, workers: int):
    order = [batch.tolist() for batch in batches]
    for moments, labels in DataLoader(images, batch_sampler=order, num_workers=workers):
        mean, std = moments.chunk(2, dim=1)
        yield (moments if noise is None else (mean + std * noise) * SCALE), labels


def samples_per_second(batches_of_latents, batch: int) -> float:
    """Return the speed from the second batch on: starting workers, and opening files, is not what is compared."""
    next(batches_of_latents)
    start, count = time.perf_counter(), 0
    for _ in batches_of_latents:
        count += batch
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: a temporary one)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write(folder, options.images)
        order = np.random.default_rng(1).permutation(options.images)
        batches = [order[at : at + options.batch] for at in range(0, options.images - options.batch + 1, options.batch)]
        noise = torch.randn(options.batch, 4, 32, 32)  # in training it is drawn on the device

        split = LatentCache(folder / "index.json").split("train")
        pairs = zip(ours(split, batches[:4], noise), baseline(FilePerImage(folder), batches[:4], noise, 0), strict=True)
        difference = 0.0
        for (a, labels_a), (b, labels_b) in pairs:
            assert torch.equal(labels_a, labels_b)
            difference = max(difference, (a - b).abs().max().item())
        del split

        for what, drawn in (("reading", None), ("reading and drawing the posterior", noise)):
            for state in ("cold", "warm"):
                speeds: dict[str, list[float]] = {"0 workers": [], "2 workers": [], "ours": []}
                images, split = FilePerImage(folder), None
                for _ in range(options.repeat + (state == "warm")):
                    for loader, values in speeds.items():
                        if state == "cold":
                            split = None  # mapped files cannot be dropped
                            empty_page_cache(folder)
                        if loader == "ours":
                            split = split or LatentCache(folder / "index.json").split("train")
                            drawing = ours(split, batches, drawn)
                        else:
                            drawing = baseline(images, batches, drawn, int(loader[0]))
                        values.append(samples_per_second(drawing, options.batch))
                speed = {loader: statistics.median(values[-options.repeat :]) for loader, values in speeds.items()}
                figures = ", ".join(f"{loader} {value:,.0f}/s" for loader, value in speed.items())
                ratio = speed["ours"] / max(speed["0 workers"], speed["2 workers"])
                print(f"{what}, {state}: {figures}; ratio {ratio:.1f}")
        print(f"{options.images} images, largest difference of the latents {difference:.1e}")


if __name__ == "__main__":
    main()
