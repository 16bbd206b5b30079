"""Digits, latent shards, and the order of training images."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from mixflow.autoencoders import load_autoencoder
from mixflow.data.images import load_digits
from mixflow.data.latents import DataOrder, LatentCache
from mixflow.runtime.errors import UserError
from mixflow.stages.cache_latents import cache_latents

SETTINGS = {
    "latents": "digits",
    "dataset": {"kind": "digits", "resolution": 32, "num_classes": 10, "num_held_out": 360, "seed": 0},
    "autoencoder": {"kind": "pixels"},
    "shard_size": 500,
}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "index.json"
    cache_latents(SETTINGS, path)
    return path


def test_digits_are_the_real_images_split_without_loss():
    splits = load_digits(32, 360, seed=0)
    assert [len(splits[name].labels) for name in ("train", "held_out")] == [1437, 360]
    together = np.sort(np.concatenate([split.indices for split in splits.values()]))
    assert np.array_equal(together, np.arange(1797))
    pixels, labels = sklearn_digits(return_X_y=True)
    train = splits["train"]
    assert np.array_equal(train.labels, labels[train.indices])
    # Enlarged bicubically: averaging each 4x4 block gives the 8x8 original back, but for the filter's overshoot.
    blocks = train.images[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
    original = pixels[train.indices].reshape(-1, 8, 8) * 255 / 16
    assert np.corrcoef(blocks.ravel(), original.ravel())[0, 1] > 0.99


def test_another_seed_holds_out_other_images():
    a, b = (set(load_digits(8, 360, seed)["held_out"].indices) for seed in (0, 1))
    assert 0 < len(a & b) < 200


def test_cache_gives_back_every_image_in_any_order(index):
    cache = LatentCache(index)
    cache.verify()
    split = cache.split("train")
    wanted = np.random.default_rng(0).permutation(len(split))
    stored, labels = split.gather(wanted)
    train = load_digits(32, 360, seed=0)["train"]
    assert np.array_equal(stored[:, 0].numpy(), train.images[wanted, :, :, 0])
    assert np.array_equal(labels.numpy(), train.labels[wanted])
    assert cache.latent_shape == (1, 32, 32)


def test_pixels_survive_the_autoencoder_exactly():
    codec = load_autoencoder({"kind": "pixels"})
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    latents = codec.latents(codec.encode(images), None)
    assert latents.min() == -1
    assert latents.max() == 1
    assert torch.equal(codec.decode(latents), images.expand(-1, -1, -1, 3))
    assert codec.decode(torch.full((1, 1, 2, 2), 3.0)).max() == 255


def test_two_caches_of_one_setting_are_equal_byte_for_byte(index, tmp_path):
    cache_latents(SETTINGS, tmp_path / "index.json")
    assert (tmp_path / "index.json").read_bytes() == index.read_bytes()


def test_truncated_and_corrupted_shards_are_named(tmp_path):
    cache_latents(SETTINGS, tmp_path / "index.json")
    shard = sorted(tmp_path.glob("train-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{shard.name}.*bytes where the index says"):
        LatentCache(tmp_path / "index.json")
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{shard.name}.*corrupted"):
        LatentCache(tmp_path / "index.json").verify()
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}.*missing"):
        LatentCache(tmp_path / "index.json")


def test_shards_of_other_settings_are_removed(tmp_path):
    cache_latents(SETTINGS, tmp_path / "index.json")
    cache_latents({**SETTINGS, "shard_size": 1000}, tmp_path / "index.json")
    named = {s["file"] for split in json.loads((tmp_path / "index.json").read_text())["splits"].values()
             for s in split["shards"]}  # fmt: skip
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named


def test_order_visits_every_image_once_an_epoch_and_splits_anywhere():
    order = DataOrder(100, seed=3)
    stream = order[np.arange(300)]
    for epoch in range(3):
        assert np.array_equal(np.sort(stream[100 * epoch : 100 * epoch + 100]), np.arange(100))
    assert not np.array_equal(stream[:100], stream[100:200])
    assert np.array_equal(stream[70:230], DataOrder(100, seed=3)[np.arange(70, 230)])
