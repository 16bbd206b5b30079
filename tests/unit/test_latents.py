"""Digits, latent shards, and the order of training images."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.datasets import load_digits as sklearn_digits

from mixflow.autoencoders import load_autoencoder
from mixflow.data import latents
from mixflow.data.images import load_digits
from mixflow.data.latents import FORMAT, DataOrder, LatentCache, Prefetcher, shard_entry, write_shard
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import file_sha256
from mixflow.stages import cache_latents as stage


def cache_latents(settings, out):
    stage.cache_latents(settings, out, scratch=out.parent / "scratch")


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


def test_shards_are_read_ahead_where_memory_holds_them(index, monkeypatch):
    split = LatentCache(index).split("train")
    size = sum(path.stat().st_size for path in split.paths)
    asked = []
    monkeypatch.setattr(latents.os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]), raising=True)
    monkeypatch.setattr(latents, "_available_memory", lambda: 2 * size)
    split.preload().join()
    assert asked == [(0, 0, os.POSIX_FADV_WILLNEED)] * len(split.paths)
    monkeypatch.setattr(latents, "_available_memory", lambda: 2 * size - 2)
    assert split.preload() is None


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


def write_cache(folder, mirrors, count=50, shard_size=16):
    """A cache of float16 `stored` [n,2,8,3,5] or [n,8,3,5] whose values tell image and mirror."""
    values = np.arange(count)[:, None, None] * 4 + np.arange(2 if mirrors else 1)[None, :, None]
    columns = np.arange(8 * 3 * 5).reshape(1, 1, -1) / 1024
    stored = (values + columns).astype(np.float16).reshape(count, -1, 8, 3, 5)
    stored = stored if mirrors else stored[:, 0]
    labels = np.arange(count) % 7
    shards = []
    for start in range(0, count, shard_size):
        part = slice(start, start + shard_size)
        batches = np.array_split(stored[part], 2)
        path = folder / f"train-{start}.safetensors"
        shards.append(write_shard(path, labels[part], np.arange(count)[part], batches))
    index = {"format": FORMAT, "settings": SETTINGS, "splits": {"train": {"num_images": count, "shards": shards}},
             "num_classes": 7, "latent_shape": [4, 3, 5], "mirrors": mirrors}  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return LatentCache(folder / "index.json"), stored, labels


@pytest.mark.parametrize("dtype", [np.float16, np.uint8])
def test_a_shard_written_in_batches_is_the_file_that_safetensors_writes(tmp_path, dtype):
    stored = np.random.default_rng(0).integers(0, 200, (10, 2, 8, 4, 4)).astype(dtype)
    labels, indices = np.arange(10) * 3, np.arange(10)[::-1]
    entry = write_shard(tmp_path / "a.safetensors", labels, indices, np.array_split(stored, 3))
    save_file(
        {"stored": stored, "labels": labels, "indices": np.ascontiguousarray(indices)}, tmp_path / "b.safetensors"
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert entry == shard_entry(tmp_path / "a.safetensors", 10)


def test_a_shard_that_fails_half_way_leaves_nothing(tmp_path):
    def batches():
        yield np.zeros((2, 3), np.uint8)
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        write_shard(tmp_path / "a.safetensors", np.arange(4), np.arange(4), batches())
    assert not list(tmp_path.iterdir())


def test_gather_reads_the_mirror_asked_for(tmp_path):
    cache, stored, labels = write_cache(tmp_path, mirrors=True)
    rng = np.random.default_rng(0)
    wanted, mirrored = rng.permutation(50)[:33], rng.random(33) < 0.5
    split = cache.split("train")
    found, found_labels = split.gather(wanted, mirrored)
    assert np.array_equal(found.numpy(), stored[wanted, mirrored.astype(int)])
    assert np.array_equal(found_labels.numpy(), labels[wanted])
    assert np.array_equal(split.gather(wanted)[0].numpy(), stored[wanted, 0])


def test_gather_flips_where_the_cache_has_one_mirror(tmp_path):
    cache, stored, _ = write_cache(tmp_path, mirrors=False)
    mirrored = np.arange(50) % 3 == 0
    found, _ = cache.split("train").gather(np.arange(50), mirrored)
    expected = np.where(mirrored[:, None, None, None], stored[..., ::-1], stored)
    assert np.array_equal(found.numpy(), expected)


def test_shards_are_hashed_once_and_again_when_they_change(tmp_path, monkeypatch):
    cache, _, _ = write_cache(tmp_path, mirrors=True)
    hashed = []
    monkeypatch.setattr(latents, "file_sha256", lambda path: (hashed.append(path.name), file_sha256(path))[1])
    cache.verify()
    assert len(hashed) == 4
    cache.verify()
    LatentCache(tmp_path / "index.json").verify()
    assert len(hashed) == 4
    shard = tmp_path / hashed[0]
    whole = shard.read_bytes()
    os.utime(shard, ns=(0, 0))
    cache.verify()  # touched: hashed again, and found right
    assert hashed[4:] == [shard.name]
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{shard.name}.*corrupted"):
        cache.verify()
    (tmp_path / "verified.json").write_text("{")
    shard.write_bytes(whole)
    cache.verify()
    assert len(hashed) == 4 + 1 + 1 + 4


def test_a_cache_of_another_autoencoder_is_told(tmp_path):
    cache, _, _ = write_cache(tmp_path, mirrors=True)
    cache.check_autoencoder({"kind": "pixels"})
    with pytest.raises(UserError, match="were made with autoencoder kind 'pixels', not 'sd_vae' as now asked for"):
        cache.check_autoencoder({"kind": "sd_vae"})
    with pytest.raises(UserError, match=r"autoencoder scale None, not 0.5 as now asked for"):
        cache.check_autoencoder({"kind": "pixels", "scale": 0.5})


def test_prefetcher_has_the_next_value_ready_and_never_runs_twice():
    fetched, running = [], threading.Lock()

    def fetch(key):
        assert running.acquire(blocking=False)
        fetched.append(key)
        running.release()
        return key * 10

    batches = Prefetcher(fetch)
    assert [batches.get(step, step + 1) for step in range(5)] == [0, 10, 20, 30, 40]
    batches.get(5)  # nothing follows
    assert fetched == [0, 1, 2, 3, 4, 5]
    assert batches.get(9, 10, 11) == 90  # anything may be asked for, as after resuming
    assert batches.get(11) == 110
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetcher_raises_where_the_value_is_asked_for():
    def fetch(key):
        if key == 1:
            raise UserError("shard 1 is gone")
        return key

    batches = Prefetcher(fetch)
    assert batches.get(0, 1) == 0
    with pytest.raises(UserError, match="shard 1 is gone"):
        batches.get(1, 2)
    assert batches.get(2) == 2


def test_a_program_that_forgets_to_close_the_prefetcher_ends():
    code = (
        "import time; from mixflow.data.latents import Prefetcher\n"
        "p = Prefetcher(lambda key: time.sleep(0.2)); p.get(0, 1, 2); raise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 3
