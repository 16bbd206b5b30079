"""A training step from images: cached latents (ours) against the VAE in every step (SiT's way).

SiT decodes and crops the JPEG files of a batch, mirrors half of them and encodes them, in every step of every epoch;
ours has encoded both mirrors once and reads them back. Network, optimiser and batch are the same, and so are the
latents up to the float16 of the cache. The VAE has the published architecture with random weights: its speed does not
depend on them. The larger the SiT, the smaller the ratio.
`python benchmarks/image_to_step.py [--size S/2] [--batch 4] [--steps 3]`
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from mixflow.autoencoders import load_autoencoder
from mixflow.data.imagenet import ImageNet, center_crop
from mixflow.data.latents import LatentSplit, Prefetcher, write_shard
from mixflow.flow import Linear, flow_matching_loss
from mixflow.models import build_model, sit_options

NUM_BATCHES = 2
SETTINGS = {"kind": "sd_vae", "scale": 0.18215, "channels": 4, "downsampling": 8, "precision": "fp32"}


def save_vae(folder: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    ).save_pretrained(folder)


def save_images(folder: Path, count: int) -> None:
    """Save JPEG files of ImageNet's usual size."""
    rng = np.random.default_rng(0)
    (folder / "train" / "n00").mkdir(parents=True)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "train" / "n00" / f"{number}.JPEG", quality=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="S/2", help="of the SiT")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    batch, count = options.batch, NUM_BATCHES * options.batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_vae(folder / "vae")
        save_images(folder, count)
        images = ImageNet(folder, 256, 1, count)
        codec = load_autoencoder(SETTINGS, {path.name: path for path in (folder / "vae").iterdir()})
        vae = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
        pixels = np.empty((count, 256, 256, 3), np.uint8)
        start = time.perf_counter()
        for position in range(count):
            images.read(position, pixels[position])
        stored = codec.encode(torch.from_numpy(pixels)).numpy()
        once = time.perf_counter() - start
        shard = write_shard(folder / "train.safetensors", images.labels, images.indices, [stored])
        split = LatentSplit(folder, [shard], mirrors=True)

        model = sit_options(options.size)
        network = build_model("sit", **model, input_size=32, in_channels=4, num_classes=1, learn_sigma=True)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        mirrored = np.arange(batch) % 2 == 0
        noise = torch.randn(batch, 4, 32, 32)

        def positions_of(step: int) -> np.ndarray:
            return np.arange(batch) + batch * (step % NUM_BATCHES)

        def online(step: int) -> Tensor:
            rows = []
            for position, mirror in zip(positions_of(step).tolist(), mirrored, strict=True):
                with Image.open(images.name(position)) as image:
                    row = center_crop(image.convert("RGB"), 256)
                rows.append(row[:, ::-1] if mirror else row)
            x = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 127.5 - 1
            with torch.no_grad():
                posterior = vae.encode(x).latent_dist
            return (posterior.mean + posterior.std * noise) * 0.18215

        ahead = Prefetcher(lambda step: split.gather(positions_of(step), mirrored))

        def cached(step: int) -> Tensor:
            return codec.latents(ahead.get(step, step + 1)[0], noise)

        def train_step(data: Tensor) -> None:
            labels, times = torch.zeros(batch, dtype=torch.int64), torch.rand(batch)
            loss = flow_matching_loss(
                lambda x, t: network(x, t, labels), torch.randn_like(data), data, times, times, Linear()
            ).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def images_per_second(latents: Callable[[int], Tensor]) -> float:
            train_step(latents(0))  # warm up
            start = time.perf_counter()
            for step in range(1, options.steps + 1):
                train_step(latents(step))
            return options.steps * batch / (time.perf_counter() - start)

        difference = (online(1) - cached(1)).abs().max().item()
        slow, fast = images_per_second(online), images_per_second(cached)
        ahead.close()
    print(
        f"SiT-{options.size}, batch {batch}: VAE in every step {slow:.2f} images/s, cached latents {fast:.2f} images/s"
    )
    print(f"ratio {fast / slow:.1f}, largest difference of the latents {difference:.1e}")
    print(f"encoding both mirrors once: {count / once:.2f} images/s")


if __name__ == "__main__":
    main()
