"""Writing a latent cache of a small ImageNet: whole, resumed, stopped, with broken images, by one process or two."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from mixflow.autoencoders import load_autoencoder
from mixflow.data.imagenet import ImageNet
from mixflow.data.latents import LatentCache
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import file_sha256, write_json
from mixflow.runtime.stopping import Unfinished
from mixflow.stages import cache_latents as stage
from mixflow.stages.networks import autoencoder_files
from tests.conftest import ROOT
from tests.unit import test_rae_stand_ins as rae
from tests.unit.test_sd_vae import SETTINGS as SD_VAE
from tests.unit.test_sd_vae import tiny_vae

COUNTS = {"n01": 5, "n02": 7, "n03": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        (path / "train" / name).mkdir(parents=True)
        for number in range(count):
            small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            size = (int(rng.integers(33, 90)), int(rng.integers(33, 90)))
            image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
            image.save(path / "train" / name / f"{name}_{number}.JPEG")
    return path


@pytest.fixture(scope="module")
def vae_record(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


def save_vae(path, scale=1.0):
    """Save a tiny VAE (its encoder's last layer times `scale`) and the record of its download."""
    vae = tiny_vae()
    vae.quant_conv.weight.mul_(scale)
    vae.save_pretrained(path)
    files = {
        name: {"path": str(path / name), "sha256": file_sha256(path / name), "bytes": (path / name).stat().st_size}
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    write_json(path / "vae.json", {"download": "vae", "source": {}, "folder": str(path), "files": files})
    return path / "vae.json"


def settings_for(autoencoder=SD_VAE):
    dataset = {"kind": "imagenet", "resolution": 32, "num_classes": 3, "num_images": 18}
    return {"latents": "tiny", "dataset": dataset, "autoencoder": autoencoder, "shard_size": 5}


def cache(folder, out, record, settings=None, **options):
    stage.cache_latents(
        settings or settings_for(),
        out,
        images=folder,
        autoencoder={"network": record} if record else {},
        scratch=out.parent / "scratch",
        batch=2,
        **options,
    )
    return LatentCache(out)


def shards_of(path):
    return {shard.name: shard.read_bytes() for shard in path.parent.glob("*.safetensors")}


@pytest.fixture(scope="module")
def finished(folder, vae_record, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "index.json"
    cache(folder, out, vae_record)
    return out


def test_the_cache_holds_both_posteriors_of_every_image_in_order(folder, vae_record, finished):
    latents = LatentCache(finished)
    latents.verify()
    latents.check_autoencoder(SD_VAE)
    assert latents.latent_shape == (4, 4, 4)
    assert latents.num_classes == 3
    assert latents.index["autoencoder_sha256"] == {
        name: file_sha256(vae_record.parent / name) for name in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    images = ImageNet(folder, 32, 3, 18)
    pixels = np.empty((18, 32, 32, 3), np.uint8)
    for position in range(18):
        images.read(position, pixels[position])
    codec = load_autoencoder(SD_VAE, autoencoder_files({"network": vae_record}))
    expected = codec.encode(torch.from_numpy(pixels))
    order = np.random.default_rng(1).permutation(18)
    mirrored = order % 2 == 0
    stored, labels = latents.split("train").gather(order, mirrored)
    assert labels.tolist() == images.labels[order].tolist()
    wanted = expected[torch.from_numpy(order), torch.from_numpy(mirrored).long()]
    torch.testing.assert_close(stored, wanted, atol=2e-3, rtol=2e-3)  # another batch size
    assert not list(finished.parent.glob("scratch/*"))
    assert not (finished.parent / "unreadable.txt").exists()


def test_imagenet_at_256_fits_in_45_gb(finished):
    """Bytes per image at 256 px from those at 32 px: latents have 64 times as many positions."""
    shard = load_file(next(finished.parent.glob("train-00000-*.safetensors")))
    per_image = 64 * shard["stored"][0].nbytes
    assert per_image == 2 * 8 * 32 * 32 * 2 == 32_768
    labels_and_indices = shard["labels"][0].nbytes + shard["indices"][0].nbytes
    assert 1_281_167 * (per_image + labels_and_indices) < 45e9


def test_a_deleted_shard_is_made_again_and_nothing_else(folder, vae_record, finished, tmp_path, monkeypatch):
    out = tmp_path / "index.json"
    before = shards_of(finished)
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    name = sorted(before)[2]
    (tmp_path / name).unlink()
    (tmp_path / ".train-00002-killed.safetensors.17.tmp").touch()
    reads = []
    read = ImageNet.read
    monkeypatch.setattr(ImageNet, "read", lambda self, at, buffer: (reads.append(at), read(self, at, buffer))[1])
    cache(folder, out, vae_record)
    assert sorted(reads) == [10, 11, 12, 13, 14]
    assert shards_of(out) == before
    assert json.loads(out.read_text()) == json.loads(finished.read_text())
    assert not list(tmp_path.glob(".*tmp"))


def test_another_autoencoder_reuses_nothing(folder, finished, tmp_path):
    out = tmp_path / "latents" / "index.json"
    out.parent.mkdir()
    for name, content in shards_of(finished).items():
        (out.parent / name).write_bytes(content)
    cache(folder, out, save_vae(tmp_path, scale=2.0))
    assert not shards_of(out).keys() & shards_of(finished).keys()
    assert len(shards_of(out)) == 4


def test_unreadable_images_are_all_listed_and_then_only_their_shards_are_made(folder, vae_record, finished, tmp_path):
    out = tmp_path / "index.json"
    broken = [folder / "train" / name for name in ("n01/n01_4.JPEG", "n03/n03_3.JPEG", "n03/n03_5.JPEG")]
    whole = [path.read_bytes() for path in broken]
    try:
        for path, content in zip(broken, whole, strict=True):
            path.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"3 of 18 images cannot be read .*n01_4.JPEG.*unreadable.txt' and run"):
            cache(folder, out, vae_record)
        listed = (tmp_path / "unreadable.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in listed] == [str(path) for path in broken]
        assert not out.exists()
        assert sorted(name.split("-")[1] for name in shards_of(out)) == ["00001", "00002"]
        kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    finally:
        for path, content in zip(broken, whole, strict=True):
            path.write_bytes(content)
    cache(folder, out, vae_record)
    assert shards_of(out) == shards_of(finished)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert not (tmp_path / "unreadable.txt").exists()


def test_stopped_between_batches_and_continued(folder, vae_record, finished, tmp_path, monkeypatch):
    out = tmp_path / "index.json"
    encoded = []
    encode = stage._encode

    def stopping(*arguments):
        encoded.append(1)
        if len(encoded) == 5:  # in the second shard
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr(stage, "_encode", stopping)
    with pytest.raises(Unfinished, match="'tiny' has 1 of 4 shards because SIGTERM arrived"):
        cache(folder, out, vae_record)
    assert len(encoded) == 5
    assert len(shards_of(out)) == 1
    assert not out.exists()
    with pytest.raises(Unfinished, match="the time budget is used up"):
        cache(folder, out, vae_record, time_budget_minutes=0)
    monkeypatch.setattr(stage, "_encode", encode)
    cache(folder, out, vae_record)
    assert shards_of(out) == shards_of(finished)


def test_pixels_of_imagenet_are_kept_exactly(folder, tmp_path):
    """What REPA's encoder looks at."""
    latents = cache(folder, tmp_path / "index.json", None, settings_for({"kind": "pixels"}))
    assert latents.latent_shape == (3, 32, 32)
    images = ImageNet(folder, 32, 3, 18)
    mirrored = np.arange(18) % 2 == 0
    stored, labels = latents.split("train").gather(np.arange(18), mirrored)
    assert stored.dtype == torch.uint8
    pixels = np.empty((32, 32, 3), np.uint8)
    for position in range(18):
        images.read(position, pixels)
        expected = pixels[:, ::-1] if mirrored[position] else pixels
        assert np.array_equal(stored[position].permute(1, 2, 0).numpy(), expected)
    assert labels.tolist() == images.labels.tolist()


def test_a_disk_without_room_is_told_before_anything_is_encoded(
    folder, vae_record, finished, tmp_path, monkeypatch, caplog
):
    """32 x 32 pixels become 2 x 8 x 4 x 4 numbers of two bytes, with a label and an index of eight."""
    per_image = 2 * 8 * 4 * 4 * 2 + 16
    out = tmp_path / "new" / "latents" / "index.json"
    monkeypatch.setattr(stage, "free_bytes", lambda path: 18 * per_image - 1 if path == out.parent else None)
    monkeypatch.setattr(stage, "_encode_shards", None)
    sentence = (
        r"^the latents 'tiny' need 9\.5 kB for 18 images but '.*/new/latents' has 9\.5 kB free: make room, or name a "
        "place on another disk$"
    )
    with pytest.raises(UserError, match=sentence):
        cache(folder, out, vae_record)
    assert not shards_of(out)
    monkeypatch.undo()
    whole = shards_of(finished)
    for name in sorted(whole)[:3]:
        (out.parent / name).write_bytes(whole[name])
    monkeypatch.setattr(stage, "free_bytes", lambda path: 3 * per_image)  # the last shard holds three images
    with caplog.at_level("INFO"):
        cache(folder, out, vae_record)
    assert "tiny: 1.6 kB for 3 images, 1.6 kB free" in caplog.text
    assert shards_of(out) == whole
    monkeypatch.setattr(stage, "free_bytes", lambda path: 0)
    cache(folder, out, vae_record)  # nothing to encode


def test_tokens_are_kept_as_the_encoder_gives_them_with_or_without_mirror_images(folder, tmp_path, monkeypatch):
    """RAE: 64 x 64 pixels become 32 x 4 x 4 numbers."""
    rae.make(tmp_path / "stand-ins")
    roles = {"encoder": rae.records(tmp_path / "stand-ins")["encoder"]}
    dataset = {"kind": "imagenet", "resolution": 64, "num_classes": 3, "num_images": 18}
    images = ImageNet(folder, 64, 3, 18)
    pixels = np.empty((18, 64, 64, 3), np.uint8)
    for position in range(18):
        images.read(position, pixels[position])
    codec = load_autoencoder(rae.AUTOENCODER, autoencoder_files(roles), mirrors=True)
    expected = codec.encode(torch.from_numpy(pixels))  # [18,2,32,4,4]
    settings = {"latents": "tokens", "dataset": dataset, "autoencoder": rae.AUTOENCODER, "shard_size": 5}
    for mirrors in (True, False):
        out = tmp_path / str(mirrors) / "index.json"
        options = {"images": folder, "autoencoder": roles, "scratch": tmp_path / "scratch"}
        stage.cache_latents(settings | {"mirrors": mirrors}, out, **options)
        latents = LatentCache(out)
        latents.check_autoencoder(rae.AUTOENCODER)
        assert latents.latent_shape == (32, 4, 4)
        assert latents.mirrors is mirrors
        assert set(latents.index["autoencoder_sha256"]) == {"encoder/config.json", "encoder/model.safetensors"}
        mirrored = np.arange(18) % 2 == 0
        stored, _ = latents.split("train").gather(np.arange(18), mirrored if mirrors else None)
        assert stored.dtype == torch.float16
        wanted = expected[torch.arange(18), torch.from_numpy(mirrored).long() if mirrors else 0]
        torch.testing.assert_close(stored, wanted, atol=2e-3, rtol=2e-3)
    monkeypatch.setattr(stage, "free_bytes", lambda path: 0)
    sentence = (
        r"need 37\.2 kB for 18 images .*, or train on the fly \(encoded_from\), which takes 221\.5 kB for the pixels"
    )
    with pytest.raises(UserError, match=sentence):
        stage.cache_latents(settings | {"mirrors": True}, tmp_path / "again/index.json", **options)


def test_what_is_not_named_is_told(folder, vae_record, tmp_path):
    with pytest.raises(UserError, match="with its files only"):
        cache(folder, tmp_path / "index.json", None)
    with pytest.raises(UserError, match="name the one that holds train/"):
        cache(None, tmp_path / "index.json", vae_record)


RUN = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mixflow.stages.cache_latents import cache_latents
settings, folder, out, record, scratch = json.loads(sys.argv[1]), *map(Path, sys.argv[2:])
cache_latents(settings, out, images=folder, autoencoder={"network": record}, scratch=scratch, batch=2, workers=1)
"""


@pytest.mark.slow
def test_two_processes_and_a_kill_give_the_same_bytes_as_one(folder, vae_record, finished, tmp_path):
    out, script = tmp_path / "latents" / "index.json", tmp_path / "run.py"
    script.write_text(RUN)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)),
        *(json.dumps(settings_for()), str(folder), str(out), str(vae_record), str(tmp_path / "scratch")),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while killed.poll() is None and time.monotonic() < deadline and not list(out.parent.glob("*.safetensors")):
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
    assert shards_of(out) == shards_of(finished)
    assert json.loads(out.read_text()) == json.loads(finished.read_text())
