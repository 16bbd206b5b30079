"""Training RAE: latents encoded on the fly are those of the cache, and nothing about the cut of the work matters."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mixflow.data.latents import LatentCache
from mixflow.models import build_model, save_model
from mixflow.runtime.downloads import download
from mixflow.runtime.errors import UserError
from mixflow.runtime.stopping import Unfinished
from mixflow.stages import train as stage
from mixflow.stages.cache_latents import cache_latents
from mixflow.stages.networks import autoencoder_files
from mixflow.training import Decay
from tests.conftest import ROOT
from tests.unit.test_rae_stand_ins import AUTOENCODER, MODEL, make, records

NUM_IMAGES = 18
DATASET = {"kind": "imagenet", "resolution": 64, "num_classes": 3, "num_images": NUM_IMAGES}
RECIPE = {
    "init": "scratch", "latents": "tokens", "interpolant": "linear", "law": "mixflow", "gamma": 0.4, "shift": 6.93,
    "num_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0,
    "warmup_steps": 2, "gradient_clip": 1.0, "ema_decay": 0.5, "horizontal_flip": True, "precision": "fp32",
    "compile": False, "seed": 3, "model": MODEL,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of images, their caches (pixels, tokens with and without mirrors), and an autoencoder's records."""
    folder = tmp_path_factory.mktemp("rae")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = folder / f"images/train/n0{number % 3}/{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((80, 72), Image.Resampling.BICUBIC).save(path)
    make(folder / "stand-ins")
    made = {"records": records(folder / "stand-ins"), "folder": folder}
    encoder = {"encoder": made["records"]["encoder"]}
    for name, entry, options, roles in (
        ("pixels", {"kind": "pixels"}, {}, {}),
        ("tokens", AUTOENCODER, {"mirrors": True}, encoder),
        ("tokens-one-way", AUTOENCODER, {"mirrors": False}, encoder),
    ):
        made[name] = folder / name / "index.json"
        settings = {"latents": name, "dataset": DATASET, "autoencoder": entry, "shard_size": 7, **options}
        cache_latents(
            settings, made[name], images=folder / "images", autoencoder=roles, scratch=folder / "scratch", batch=4
        )
    # A fresh network is zero everywhere: this one is not.
    torch.manual_seed(0)
    network = build_model("rae", **{key: value for key, value in MODEL.items() if key != "family"})
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    made["init"] = folder / "init.safetensors"
    save_model(made["init"], network.state_dict(), {"family": "rae", **network.options})
    return made


def settings_for(encode, **changes):
    on_the_fly = {"encode": True, "pixel_autoencoder": {"kind": "pixels"}} if encode else {}
    return {"checkpoint": "tiny", "train": RECIPE | changes, "autoencoder": AUTOENCODER, **on_the_fly}


def run(made, folder, encode, settings=None, roles=("encoder", "statistics"), latents=None, **options):
    """Train; returns (weights, losses by step, run record)."""
    stage.run(
        settings or settings_for(encode),
        latents=made[latents or ("pixels" if encode else "tokens")],
        init=made["init"],
        out=folder / "model.safetensors",
        scratch=folder / "scratch",
        autoencoder={role: made["records"][role] for role in roles if encode or role != "encoder"},
        **options,
    )
    losses, record = (json.loads((folder / name).read_text()) for name in ("losses.json", "run.json"))
    return load_file(folder / "model.safetensors"), losses["loss"], record


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return (*run(made, folder, encode=True), (folder / "model.safetensors").read_bytes())


def batch(made, monkeypatch, encode, **changes):
    """Return what reaches the loss in one step of 18 images: latents [18,32,4,4], noise, t and m."""
    seen = {}

    def capture(network, noise, data, t, m, interpolant):
        seen.update(data=data, noise=noise, t=t, m=m)
        return torch.zeros(len(t))

    monkeypatch.setattr(stage, "flow_matching_loss", capture)
    roles = ("encoder", "statistics") if encode else ("statistics",)
    files = autoencoder_files({role: made["records"][role] for role in roles})
    images = LatentCache(made["pixels" if encode else "tokens"]).split("train")
    codec = stage.load_autoencoder(AUTOENCODER, files)
    recipe = settings_for(encode, **{"batch_size": NUM_IMAGES, **changes})["train"]
    loss = stage.make_loss(recipe, images, codec, torch.device("cpu"), encode=encode)
    loss(None, 0, torch.arange(NUM_IMAGES))
    return seen


def test_latents_on_the_fly_are_those_of_the_cache_before_rounding(made, monkeypatch):
    fly, cached = (batch(made, monkeypatch, encode) for encode in (True, False))
    for name in ("noise", "t", "m"):
        assert torch.equal(fly[name], cached[name])
    assert fly["data"].dtype == cached["data"].dtype == torch.float32
    assert not fly["data"].requires_grad
    assert not torch.equal(fly["data"], cached["data"])  # the cache keeps float16
    torch.testing.assert_close(cached["data"], fly["data"], atol=5e-3, rtol=0)
    plain = batch(made, monkeypatch, encode=True, horizontal_flip=False)["data"]
    flipped = (fly["data"] - plain).abs().amax(dim=(1, 2, 3)) > 0.1
    assert 3 < flipped.sum() < 15
    assert torch.equal(fly["data"][~flipped], plain[~flipped])


def test_training_on_the_fly_equals_training_from_the_cache(made, finished, tmp_path):
    weights, losses, record, _ = finished
    cached, cached_losses, cached_record = run(made, tmp_path, encode=False)
    assert losses == pytest.approx(cached_losses, rel=1e-3)
    assert losses != cached_losses
    # Adam makes steps of 1e-3 whatever the size of a gradient, so that rounding can turn those of the smallest.
    for name, tensor in weights.items():
        assert (tensor - cached[name]).abs().mean() < 2e-4, name
    assert set(record["parents"]) == {
        "latents", "init", "encoder/config.json", "encoder/model.safetensors", "statistics"
    }  # fmt: skip
    assert set(cached_record["parents"]) == {"latents", "init", "statistics"}


def test_it_trains_everything_but_what_the_peer_freezes(made, finished):
    start = load_file(made["init"])
    unchanged = {name for name, tensor in finished[0].items() if torch.equal(tensor, start[name])}
    assert {"pos_embed", "t_embedder.W"} <= unchanged
    assert {name.split(".")[0] for name in unchanged} == {"pos_embed", "t_embedder", "enc_feat_rope", "dec_feat_rope"}


def test_micro_batches_change_rounding_only(made, finished, tmp_path):
    weights, losses, _, _ = finished
    parts, part_losses, _ = run(made, tmp_path, encode=True, micro_batch=3)  # 3 + 3 + 2 of 8
    assert part_losses == pytest.approx(losses, rel=1e-4)
    for name, tensor in weights.items():
        assert (tensor - parts[name]).abs().mean() < 1e-5, name


def test_killed_and_stopped_it_continues_to_the_same_bytes(made, finished, tmp_path, monkeypatch):
    calls = []
    flow_matching_loss = stage.flow_matching_loss

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return flow_matching_loss(*arguments)

    monkeypatch.setattr(stage, "flow_matching_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path, encode=True, save_every_seconds=0.0)
    with pytest.raises(Unfinished, match="saved at step"):
        run(made, tmp_path, encode=True, time_budget_minutes=0)
    weights = run(made, tmp_path, encode=True)
    assert len(calls) < 4 + 6
    assert weights[1] == finished[1]
    assert (tmp_path / "model.safetensors").read_bytes() == finished[3]
    assert not list((tmp_path / "scratch").glob("*"))


def test_other_statistics_are_other_work(made, finished, tmp_path):
    """Files of the autoencoder are part of what a run continues, and of what counts as made."""
    run(made, tmp_path, encode=True)
    before = (tmp_path / "run.json").stat().st_mtime_ns
    run(made, tmp_path, encode=True)
    assert (tmp_path / "run.json").stat().st_mtime_ns == before
    held = torch.load(made["folder"] / "stand-ins/stat.pt", weights_only=True)
    (tmp_path / "other").mkdir()
    torch.save({**held, "var": held["var"] * 4}, tmp_path / "other/stat.pt")
    other = download("other", {"folder": str(tmp_path / "other"), "files": ["stat.pt"]}, out=tmp_path / "other.json")
    changed = {**made, "records": {**made["records"], "statistics": other}}
    assert run(changed, tmp_path, encode=True)[1] != finished[1]


def test_the_encoder_has_a_precision_of_its_own(made, monkeypatch):
    """Under the network's bf16 autocast the latents are the same to the last bit."""
    plain = batch(made, monkeypatch, encode=True)["data"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(batch(made, monkeypatch, encode=True)["data"], plain)


def test_the_decay_of_the_learning_rate_is_passed_on(made, tmp_path, monkeypatch):
    recipes = []
    train = stage.train
    monkeypatch.setattr(
        stage, "train", lambda *given, **options: (recipes.append(given[3]), train(*given, **options))[1]
    )
    decay = {"start_step": 2, "end_step": 5, "learning_rate": 1e-5}
    run(made, tmp_path / "a", encode=False, settings=settings_for(encode=False, decay=decay))
    run(made, tmp_path / "b", encode=False)
    assert [recipe.decay for recipe in recipes] == [Decay(**decay), None]


def test_what_is_not_named_or_does_not_fit_is_told(made, tmp_path):
    with pytest.raises(UserError, match=r"'tiny' cannot make its latents without the encoder and statistics of its "
                       r"autoencoder: give --autoencoder encoder=RECORD statistics=RECORD"):  # fmt: skip
        run(made, tmp_path, encode=True, roles=())
    with pytest.raises(UserError, match=r"without the statistics .*: give --autoencoder statistics=RECORD$"):
        run(made, tmp_path, encode=False, roles=())
    larger = settings_for(encode=True, model=MODEL | {"input_size": 8})
    with pytest.raises(UserError, match=r"takes latents of 8x8 but the images in '.*pixels/index.json', \[3, 64, 64\], "
                       r"become latents of 4x4: name pixels of another dataset in encoded_from"):  # fmt: skip
        run({**made, "init": None}, tmp_path, encode=True, settings=larger)
    for encode, latents, kinds in ((False, "pixels", "'pixels', not 'rae'"), (True, "tokens", "'rae', not 'pixels'")):
        with pytest.raises(UserError, match=f"were made with autoencoder kind {kinds}"):
            run(made, tmp_path, encode=encode, latents=latents)
    with pytest.raises(UserError, match=r"holds no latents of mirror images, .*: set mirrors of these latents to true"):
        run(made, tmp_path, encode=False, latents="tokens-one-way")
    one_way = settings_for(encode=False, horizontal_flip=False)
    assert len(run(made, tmp_path, encode=False, latents="tokens-one-way", settings=one_way)[1]) == 6


RUN = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mixflow.stages import train
settings, paths = json.loads(sys.argv[1]), {name: Path(path) for name, path in json.loads(sys.argv[2]).items()}
autoencoder = {role: paths.pop(role) for role in ("encoder", "statistics")}
train.run(settings, autoencoder=autoencoder, **paths)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [False, True], ids=["plain", "rollout"])
def test_two_processes_train_what_one_does(made, finished, tmp_path, rollout):
    """A rollout calls the network three times before one backward pass, which DDP has to take part in."""
    changes = {"self_rollout": {"step_size": 0.1, "weight": 1.0, "min_remaining": 0.05}} if rollout else {}
    settings = settings_for(encode=True, **changes)
    expected, expected_losses, *_ = run(made, tmp_path / "one", encode=True, settings=settings) if rollout else finished
    script = tmp_path / "run.py"
    script.write_text(RUN)
    paths = {
        "latents": made["pixels"], "init": made["init"], "out": tmp_path / "model.safetensors",
        "scratch": tmp_path / "scratch", **{role: made["records"][role] for role in ("encoder", "statistics")},
    }  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    arguments = [json.dumps(settings), json.dumps({name: str(path) for name, path in paths.items()})]
    assert subprocess.run([*launch, *arguments], cwd=ROOT, timeout=300).returncode == 0
    losses = json.loads((tmp_path / "losses.json").read_text())["loss"]
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    weights = load_file(tmp_path / "model.safetensors")
    for name, tensor in expected.items():
        assert (tensor - weights[name]).abs().mean() < 1e-5, name
