"""RAE in rehearsal: stand-ins in its own file formats through the commands that a user calls."""

import itertools
import json
import subprocess

import numpy as np
import pytest
import torch
import yaml

from mixflow.runtime.files import file_sha256
from tests.conftest import ROOT
from tests.workflow.commands import CONFIG, kill_when_changed, run, sentence, two_processes

pytestmark = pytest.mark.slow

DOWNLOADS = (
    "dinov2-with-registers-b", "rae-decoder-256", "rae-statistics-256", "rae-dhxl-256", "rae-dhs-256",
    "rae-statistics-512", "rae-dhs-512",
)  # fmt: skip
CHECKPOINT, SAMPLER = "rae-dhxl-256-mixflow", "rae-euler50-ag1.5"
WEIGHTS = f"results/checkpoints/{CHECKPOINT}/model.safetensors"
SAMPLES = f"results/samples/{CHECKPOINT}/{SAMPLER}/samples.npz"
PIXELS = ["cache-latents", "imagenet-256-pixels"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Stand-ins, downloads, imported weights, and the cache of pixels."""
    folder = tmp_path_factory.mktemp("prepared")
    run(folder, "make-stand-ins")
    for name in DOWNLOADS:
        run(folder, "download", name)
    run(folder, "import-weights", "rae-dhxl-256")
    run(folder, "import-weights", "rae-dhs-256")
    run(folder, *PIXELS)
    return folder


@pytest.fixture
def copy(prepared, tmp_path):
    """A folder of its own with what `prepared` holds."""
    return copied(prepared, tmp_path)


def copied(source, target):
    for part in ("stand-ins", "results"):
        subprocess.run(["cp", "-r", source / part, target / part], check=True)
    return target


def overlay(folder, **sections):
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(sections))
    return [*CONFIG, path]


def test_train_and_sample_killed_twice_each_end_in_the_same_bytes(copy, tmp_path_factory):
    whole = copied(copy, tmp_path_factory.mktemp("whole"))
    config = overlay(copy, checkpoints={"rae-dhxl-256-continued": {"train": {"num_steps": 30}}},
                     samplers={"rae-euler50": {"num_images": 60}})  # fmt: skip
    stages = (
        (["train", CHECKPOINT, "--save-every", "0", "--micro-batch", "4"], "scratch/train/*/*/resume.pt"),
        (["sample", CHECKPOINT, SAMPLER, "--batch", "4"], "scratch/sample/*/*/*/done.npy"),
    )
    for arguments, pattern in stages:
        run(whole, *arguments, config=config)
        for _ in range(2):
            kill_when_changed(copy, pattern, arguments, config)
        run(copy, *arguments, config=config)
    for name in (WEIGHTS, SAMPLES):
        assert file_sha256(copy / name) == file_sha256(whole / name)
    record = json.loads((copy / "results/checkpoints" / CHECKPOINT / "run.json").read_text())
    assert {"latents", "init", "encoder/config.json", "encoder/model.safetensors", "statistics"} <= set(
        record["parents"]
    )
    record = json.loads((copy / "results/samples" / CHECKPOINT / SAMPLER / "run.json").read_text())
    assert {"weights", "guide", "decoder", "statistics"} <= set(record["parents"])
    assert record["measured"]["network_calls_per_image"] == record["measured"]["guide_calls_per_image"] == 4


def test_two_processes_make_what_one_makes(copy, tmp_path_factory):
    from safetensors.numpy import load_file

    other = copied(copy, tmp_path_factory.mktemp("two"))
    exact = {"rae-dhxl-256-continued": {"train": {"precision": "fp32"}}}
    config = overlay(copy, checkpoints=exact, samplers={"rae-euler50": {"precision": "fp32"}})
    run(copy, "train", CHECKPOINT, config=config)
    two_processes(other, "train", CHECKPOINT, config=config)
    one, two = (load_file(folder / WEIGHTS) for folder in (copy, other))
    assert max(abs(one[key] - two[key]).max() for key in one) < 1e-5
    sampling = ["sample", CHECKPOINT, SAMPLER, "--weights", copy / WEIGHTS, "--batch", "5"]
    run(copy, *sampling, config=config)
    two_processes(other, *sampling, config=config)
    x, y = (np.load(folder / SAMPLES)["arr_0"].astype(int) for folder in (copy, other))
    assert abs(x - y).max() <= 1
    assert (x != y).mean() < 0.01


def test_cached_latents_train_as_those_encoded_on_the_fly(copy):
    """The cache rounds to half precision, and holds mirror images of its own."""
    from safetensors.numpy import load_file

    run(copy, "train", CHECKPOINT)
    run(copy, "cache-latents", "imagenet-256-rae-cached")
    config = overlay(copy, checkpoints={CHECKPOINT: {"train": {"latents": "imagenet-256-rae-cached"}}})
    run(copy, "train", CHECKPOINT, "--out", "cached/model.safetensors", config=config)
    encoded, cached = (load_file(copy / path) for path in (WEIGHTS, "cached/model.safetensors"))
    start = load_file(copy / "results/checkpoints/rae-dhxl-256/model.safetensors")
    moved = max(abs(encoded[key] - start[key]).max() for key in start)
    apart = max(abs(encoded[key] - cached[key]).max() for key in start)
    assert 0 < apart < 0.2 * moved  # Adam's first steps have the size of their sign, whatever the gradient
    frozen = [key for key in start if key in ("pos_embed", "t_embedder.W")]
    assert len(frozen) == 2
    assert all(np.array_equal(encoded[key], start[key]) for key in frozen)
    shards = list((copy / "results/latents/imagenet-256-rae-cached").glob("*.safetensors"))
    images = sum(load_file(path)["labels"].size for path in shards)
    assert load_file(shards[0])["stored"].shape[1:] == (2, 32, 4, 4)
    assert images == 40


def test_raes_protocol_from_file_to_pixels(copy):
    """RAE's sampler written anew in RAE's own time, on the stored models that its code was run with.

    Points 1 - linspace(0, 0.999), shifted; x' = x + (t' - t) (g + w (v - g)), v and g velocities from noise to data
    turned around; labels in the order of a seeded permutation; the decoder, and grey levels cut.
    """
    from mixflow.autoencoders.rae import Decoder
    from mixflow.models import load_model
    from mixflow.runtime.seeds import Stream, normal

    golden = ROOT / "tests/golden/rae"
    torch.manual_seed(0)
    decoder = Decoder(width=32, depth=2, num_heads=2, mlp_width=40, num_channels=16, grid=4, patch_size=16)
    with torch.no_grad():
        decoder.decoder_pred.weight.mul_(8)
    variance = 0.5 + torch.rand(16, 4, 4)
    (copy / "golden").mkdir()
    torch.save(decoder.state_dict(), copy / "golden/model.pt")
    torch.save({"mean": None, "var": variance}, copy / "golden/stat.pt")
    sizes = {
        "main": {"hidden_size": [48, 64], "depth": [3, 2], "num_heads": [4, 4]},
        "guide": {"hidden_size": [24, 64], "depth": [2, 2], "num_heads": [2, 4]},
    }
    points, count, seed, shift, scale = 6, 20, 3, 48**0.5, 1.42
    rae = {"extends": "rae-dinov2-b-256", "decoder": "golden", "statistics": "golden-statistics", "channels": 16}
    config = overlay(
        copy,
        downloads={
            "golden": {"folder": "golden", "files": ["model.pt"]},
            "golden-statistics": {"folder": "golden", "files": ["stat.pt"]},
        },
        autoencoders={"golden": rae},
        latents={"golden": {"extends": "imagenet-256-rae", "autoencoder": "golden"}},
        checkpoints={
            name: {"weights": {"file": str(golden / f"weights_{name}_hot.safetensors"), "latents": "golden",
                               "model": {"family": "rae", **size, "label_dropout": 0.1}}}
            for name, size in sizes.items()
        },
        samplers={"golden": {
            "extends": "rae-euler50", "num_steps": points - 1, "num_images": count, "seed": seed, "precision": "fp32",
            "guidance": {"scale": scale, "guide": "guide"}}},
    )  # fmt: skip
    for name in ("golden", "golden-statistics"):
        run(copy, "download", name, config=config)
    for name in sizes:
        run(copy, "import-weights", name, config=config)
    run(copy, "sample", "main", "golden", config=config)
    found = np.load(copy / "results/samples/main/golden/samples.npz")

    networks = [
        load_model("rae", golden / f"weights_{name}_hot.safetensors", num_heads=size["num_heads"])
        for name, size in sizes.items()
    ]
    pool = torch.arange(10).repeat_interleave(count // 10)
    labels = pool[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    x = normal(seed, Stream.NOISE, 0, torch.arange(count), (16, 4, 4)).double()
    times = 1 - torch.linspace(0, 0.999, points, dtype=torch.float64)
    times = shift * times / (1 + (shift - 1) * times)
    with torch.inference_mode():
        for t, after in itertools.pairwise(times.tolist()):
            at = torch.full((count,), 1 - t)  # told in paper time, velocity turned around: the networks' adapter
            v, g = (-network(x.float(), at, labels).double() for network in networks)
            x = x + (after - t) * (g + scale * (v - g))
        tokens = (x.float() * torch.sqrt(variance + 1e-5)).flatten(2).transpose(1, 2)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        pixels = (decoder(tokens) * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    expected = (255 * pixels).to(torch.uint8).numpy()
    assert found["arr_1"].tolist() == labels.tolist()
    difference = np.abs(found["arr_0"].astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert expected.std() > 10


def test_exported_weights_come_back(copy):
    """Out into RAE's own format and in again, as its stage2_model.pt would come."""
    exported = copy / "stage2_model.pt"
    weights = copy / "results/checkpoints/rae-dhxl-256/model.safetensors"
    run(copy, "export-weights", weights, "--out", exported, config=[])
    published = torch.load(copy / "stand-ins/rae/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt")
    published = published.get("ema", published)
    ours = torch.load(exported, weights_only=True)
    assert set(ours) == set(published)
    assert all(torch.equal(ours[name], published[name]) for name in ours)
    own = {"extends": "rae-dhxl-256", "weights": {"download": None, "file": str(exported)}}
    config = overlay(copy, checkpoints={"own": own})
    run(copy, "import-weights", "own", "--out", "again/model.safetensors", config=config)
    assert file_sha256(copy / "again/model.safetensors") == file_sha256(weights)


def test_bad_input_is_told_in_one_sentence(copy):
    sampling = ["sample", "rae-dhxl-256", SAMPLER]
    other = overlay(copy, autoencoders={"rae-dinov2-b-256": {"statistics": "rae-statistics-512"}})
    said = sentence(run(copy, *sampling, config=other, code=2))
    assert "statistics" in said
    assert "(32, 8, 8) where the autoencoder's latents are (32, 4, 4)" in said

    run(copy, "import-weights", "rae-dhs-512")
    guide = "results/checkpoints/rae-dhs-512/model.safetensors"
    said = sentence(run(copy, *sampling, "--guide", guide, code=2))
    assert guide in said
    assert "guide" in said

    path = copy / "stand-ins/rae/decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
    tensors = torch.load(path, weights_only=True)
    del tensors["decoder_norm.weight"], tensors["decoder_layers.1.attention.attention.query.bias"]
    torch.save(tensors, path)
    (copy / "results/locks/rae-decoder-256.json").unlink(missing_ok=True)
    run(copy, "download", "rae-decoder-256")
    said = sentence(run(copy, *sampling, code=2))
    assert "missing 'decoder_layers.1.attention.attention.query.bias', 'decoder_norm.weight'" in said

    said = sentence(run(copy, "train", CHECKPOINT, "--latents", "results/latents/none/index.json", code=2))
    assert "results/latents/none/index.json" in said
