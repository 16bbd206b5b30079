"""The sample stage: the same bytes however it is cut, batches that overlap, and errors that leave resumable state."""

import gc
import json
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from mixflow.models import Clock, build_model, load_clock, save_clock, save_model
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import write_json
from mixflow.runtime.npz import NpzWriter
from mixflow.runtime.seeds import Stream, normal
from mixflow.runtime.stopping import StopRequest, Unfinished
from mixflow.sampling import (
    autoguided_velocity,
    differential_correction,
    epsilon_scaled,
    guided_velocity,
    sample,
    time_grid,
    time_shifted,
)
from mixflow.stages import sample as stage
from mixflow.stages.networks import network_from_file
from tests.conftest import ROOT

SIZES = dict(input_size=4, in_channels=3, patch_size=2, hidden_size=16, depth=2, num_classes=10)
MODELS = {
    "sit": {**SIZES, "num_heads": 2, "label_dropout": 0.1, "learn_sigma": False},
    "repa": {
        **SIZES, "num_heads": 4, "label_dropout": 0.1, "encoder_depth": 1, "z_dims": [8], "projector_dim": 8,
        "qk_norm": True,
    },
    "rae": {
        "input_size": 4, "in_channels": 3, "hidden_size": [16, 24], "depth": [2, 1], "num_heads": [2, 2],
        "num_classes": 10, "label_dropout": 0.1,
    },
}  # fmt: skip
GUIDES = {
    "sit": {**MODELS["sit"], "hidden_size": 8, "depth": 1},
    "rae": {**MODELS["rae"], "hidden_size": [8, 24], "depth": [1, 1]},
}
NUM_IMAGES = 13


def settings(**sampler):
    return {
        "checkpoint": "tiny",
        "sampler_name": "euler3",
        "sampler": {
            "solver": "euler",
            "num_steps": 3,
            "guidance": {"scale": 1.0, "channels": "all", "interval": [0.0, 1.0]},
            "labels": "random",
            "num_images": NUM_IMAGES,
            "to_uint8": "round",
            "state": "float32",
            "precision": "fp32",
            "seed": 0,
            **sampler,
        },
        "model": {"family": "sit", **MODELS["sit"]},
        "autoencoder": {"kind": "pixels"},
        "num_classes": 10,
        "resolution": 4,
        "interpolant": "linear",
    }


REPA_SDE = {
    "solver": "euler_maruyama",
    "num_steps": 10,
    "diffusion": {"form": "linear", "norm": 1.0},
    "last_step": "mean",
    "last_step_size": 0.04,
    "guidance": {"scale": 1.8, "channels": "all", "interval": [0.3, 1.0]},
    "state": "float64",
    "to_uint8": "truncate",
}
# RAE's: a shifted grid that stops before the data, here with guidance for two of its three calls.
AUTOGUIDED = {
    "grid": {"shift": 2.0, "end": 0.999},
    "guidance": {"scale": 1.5, "channels": "all", "interval": [0.1, 1.0], "guide": "small"},
    "to_uint8": "truncate",
}


def autoguided(family, **sampler):
    models = {"model": {"family": family, **MODELS[family]}, "guide_model": {"family": family, **GUIDES[family]}}
    return {**settings(**AUTOGUIDED, **sampler), **models, "sampler_name": "euler3-ag"}


@pytest.fixture
def weights(tmp_path):
    return tiny_weights(tmp_path / "model.safetensors", "sit")


@pytest.fixture
def guide(tmp_path):
    return tiny_weights(tmp_path / "guide.safetensors", "sit", GUIDES["sit"])


def tiny_weights(path, family, options=None):
    torch.manual_seed(0)
    network = build_model(family, **(options or MODELS[family]))
    for parameter in network.parameters():  # the initial head is zero
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_model(path, network.state_dict(), {"family": family, **network.options})
    return path


@pytest.fixture
def run(tmp_path, weights):
    def run(name="a", settings=settings(), **options):  # noqa: B008 (never changed)
        out = tmp_path / name / "samples.npz"
        stage.run(settings, **{"weights": weights, "out": out, "scratch": tmp_path / f"scratch-{name}"} | options)
        return out

    return run


class Codec:
    """Three-channel latents are the pixels; `on_decode` sees every batch."""

    def __init__(self, on_decode=lambda latents: None):
        self.on_decode = on_decode

    def decode(self, latents, to_uint8):
        self.on_decode(latents)
        grown = 127.5 * latents.float() + (128 if to_uint8 == "round" else 127.5)
        return grown.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def with_codec(monkeypatch, on_decode):
    monkeypatch.setattr(stage, "load_autoencoder", lambda *_: Codec(on_decode))


def measured(out):
    return json.loads((out.parent / "run.json").read_text())["measured"]


# ---- the same result however it is cut


def test_batch_size_changes_nothing(run):
    whole = run("whole", batch=NUM_IMAGES)
    with np.load(whole) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert (images.shape, images.dtype, labels.dtype) == ((NUM_IMAGES, 4, 4, 3), np.uint8, np.int64)
    assert labels.min() >= 0
    assert labels.max() < 10
    assert images.std() > 10
    for batch in (1, 4, 1000):
        with np.load(run(f"batch{batch}", batch=batch)) as archive:
            assert np.array_equal(archive["arr_1"], labels)
            assert np.abs(archive["arr_0"].astype(int) - images).max() <= 1


@pytest.mark.parametrize("sampler", [{}, REPA_SDE], ids=["ode", "sde"])
def test_stopped_and_continued_it_gives_the_same_bytes(run, monkeypatch, tmp_path, sampler):
    whole = run("whole", settings(**sampler), batch=4)
    decoded = []

    class StopAfterTwo(StopRequest):
        def __bool__(self):
            self.reason = "SIGTERM arrived" if len(decoded) == 2 else None
            return self.reason is not None

    with monkeypatch.context() as patch:
        patch.setattr(stage, "StopRequest", StopAfterTwo)
        with_codec(patch, decoded.append)
        with pytest.raises(Unfinished, match="'tiny/euler3' was saved at 8 of 13 images because SIGTERM arrived"):
            run("cut", settings(**sampler), batch=4)
    assert not (tmp_path / "cut").exists()
    cut = run("cut", settings(**sampler), batch=4)
    assert cut.read_bytes() == whole.read_bytes()
    assert measured(cut)["images_this_attempt"] == 5
    assert not (tmp_path / "scratch-cut").exists() or not list((tmp_path / "scratch-cut").rglob("*.npz"))


def test_killed_after_the_last_image_it_only_finishes(run, monkeypatch):
    whole = run("whole")

    def killed(*_, **__):
        raise KeyboardInterrupt

    for name, point in (("before", (NpzWriter, "finish")), ("after", (stage.RunRecord, "write"))):
        with monkeypatch.context() as patch:
            patch.setattr(*point, killed)
            with pytest.raises(KeyboardInterrupt):
                run(name)
        with monkeypatch.context() as patch:
            patch.setattr(stage, "sample_latents", killed)
            out = run(name)
        assert out.read_bytes() == whole.read_bytes()
        assert measured(out)["images_this_attempt"] == 0


def test_what_is_made_is_not_made_again(run, monkeypatch):
    first = run().stat().st_mtime_ns
    monkeypatch.setattr(stage, "network_from_file", None)
    assert run().stat().st_mtime_ns == first


# ---- protocol


def test_the_state_can_be_float64_while_the_network_stays_in_float32(run, monkeypatch):
    seen = set()
    network_from_file = stage.network_from_file

    def spied(*arguments):
        network = network_from_file(*arguments)
        network.register_forward_pre_hook(lambda _, inputs: seen.update(x.dtype for x in inputs))
        return network

    monkeypatch.setattr(stage, "network_from_file", spied)
    with_codec(monkeypatch, lambda latents: seen.add(("state", latents.dtype)))
    run(settings=settings(**REPA_SDE))
    assert seen == {torch.float32, torch.int64, ("state", torch.float64)}


def test_the_rounding_rule_is_the_samplers(run):
    with np.load(run("round")) as archive:
        rounded = archive["arr_0"].astype(int)
    with np.load(run("truncate", settings(to_uint8="truncate"))) as archive:
        lower = rounded - archive["arr_0"]
    assert set(np.unique(lower)) == {0, 1}


def test_run_json_tells_what_an_image_cost(run):
    """REPA's SDE of 10 calls with guidance from t = 0.3 on: at the times 0.96 k / 9 of k = 0, 1, 2 there is none."""
    facts = measured(run(settings=settings(**REPA_SDE), batch=4))
    assert facts["network_calls_per_image"] == 3 + 7 * 2
    assert facts["images"] == facts["images_this_attempt"] == NUM_IMAGES
    assert facts["images_per_second"] > 0


def test_heun_of_repa_guides_its_corrector_by_the_start(run):
    guidance = {"scale": 2.0, "channels": "all", "interval": [0.0, 0.3]}
    facts = measured(run(settings=settings(solver="heun_repa", num_steps=4, guidance=guidance)))
    assert facts["network_calls_per_image"] == 7 + 4  # those of the steps that start at 0 and 0.25


def test_bf16_ends_before_the_decoder(run, monkeypatch):
    seen = []
    with_codec(monkeypatch, lambda latents: seen.append((torch.is_autocast_enabled("cpu"), latents.dtype)))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run(settings=settings(precision="bf16"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == [(False, torch.float32)]


def test_the_decoder_is_found_by_its_record(run, monkeypatch, tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    files = {}
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / name).write_text("{}")
        files[name] = {"path": str(folder / name), "sha256": "0" * 64, "bytes": 2}
    write_json(tmp_path / "vae.json", {"download": "vae", "source": {}, "folder": str(folder), "files": files})
    asked = []
    monkeypatch.setattr(stage, "load_autoencoder", lambda *arguments: asked.append(arguments) or Codec())
    out = run(autoencoder={"network": tmp_path / "vae.json"})
    assert asked == [({"kind": "pixels"}, {name: folder / name for name in files}, torch.device("cpu"))]
    assert set(json.loads((out.parent / "run.json").read_text())["parents"]) == {"weights", *files}


def test_equally_many_of_each_class_in_raes_order():
    """Its `--label-sampling equal`: the sorted labels, picked in the order of a generator with the sampler's seed."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    labels = stage.draw_labels("balanced_shuffled", 3, 40, 10)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, torch.arange(10).repeat_interleave(4)[order])
    assert labels.bincount().tolist() == 10 * [4]
    # The order belongs to every number drawn with it: a torch that draws another one is to be noticed.
    assert stage.draw_labels("balanced_shuffled", 0, 12, 4).tolist() == [2, 0, 1, 3, 2, 1, 0, 3, 1, 0, 3, 2]
    with pytest.raises(UserError, match="13 images cannot be equally many of 10 classes: set num_images to a multiple"):
        stage.draw_labels("balanced_shuffled", 0, 13, 10)


def test_labels_do_not_depend_on_how_they_are_cut():
    everything = {rule: stage.draw_labels(rule, 0, 20, 10) for rule in ("balanced", "random", "balanced_shuffled")}
    assert torch.equal(everything["balanced"], torch.arange(20) % 10)
    assert torch.equal(stage.draw_labels("random", 0, 7, 10), everything["random"][:7])


# ---- methods against exposure bias

GUIDED = {"guidance": {"scale": 1.5, "channels": 2, "interval": [0.0, 1.0]}}
CORRECTED = {
    "epsilon_scaling": {"factor": 1.05, "start": 0.1},
    "time_shift": {"window": 0.2, "interval": [0.3, 1.0]},
    "differential_correction": {"band": "low", "strength": 0.1},
}
NEUTRAL = {
    "epsilon_scaling": {"factor": 1.0, "start": 0.1},
    "time_shift": {"window": 0.0, "interval": [0.3, 1.0]},
    "differential_correction": {"band": "low", "strength": 0.0},
}


@pytest.fixture
def clock(tmp_path):
    torch.manual_seed(0)
    net = Clock(in_channels=3, width=4)
    save_clock(tmp_path / "clock.safetensors", net.state_dict(), net.options)
    return tmp_path / "clock.safetensors"


def corrected(**sampler):
    return {**settings(**GUIDED, **sampler), **({"clock": "pixels"} if "time_shift" in sampler else {})}


def test_corrections_act_on_the_guided_velocity(run, monkeypatch, weights, clock):
    """The latents are those of the sampling room, and run.json tells who took part and what it cost."""
    decoded = []
    with_codec(monkeypatch, lambda latents: decoded.append(latents.clone()))
    out = run(settings=corrected(**CORRECTED), clock=clock, batch=NUM_IMAGES)

    network = network_from_file(settings()["model"], weights)
    labels = torch.from_numpy(np.load(out)["arr_1"])
    velocity = guided_velocity(network, labels, network.null_label, 1.5, channels=2)
    velocity = epsilon_scaled(time_shifted(velocity, load_clock(clock), 0.2, (0.3, 1.0)), 1.05, 0.1)
    noise = normal(0, Stream.NOISE, 0, torch.arange(NUM_IMAGES), (3, 4, 4))
    correction = differential_correction("low", 0.1)
    expected = sample(velocity, noise, solver="euler", times=time_grid(3), correction=correction)
    torch.testing.assert_close(decoded[0], expected, rtol=0, atol=1e-6)

    made = json.loads((out.parent / "run.json").read_text())
    assert set(made["parents"]) == {"weights", "clock"}
    assert made["measured"]["network_calls_per_image"] == 6
    assert made["measured"]["clock_calls_per_image"] == 2  # at t = 1/3 and 2/3
    with np.load(out) as whole, np.load(run("cut", corrected(**CORRECTED), clock=clock, batch=4)) as cut:
        assert np.abs(whole["arr_0"].astype(int) - cut["arr_0"]).max() <= 1


@pytest.mark.parametrize("key", CORRECTED)
def test_neutral_corrections_give_the_same_bytes(run, clock, key):
    plain = run("plain", corrected()).read_bytes()
    given = {"clock": clock} if key == "time_shift" else {}
    assert run("neutral", corrected(**{key: NEUTRAL[key]}), **given).read_bytes() == plain
    assert run("acting", corrected(**{key: CORRECTED[key]}), **given).read_bytes() != plain


def test_a_clock_is_given_where_there_is_a_time_shift(run, clock):
    with pytest.raises(UserError, match="'euler3' has a time shift: give the clock of its latents with --clock"):
        run(settings=corrected(**CORRECTED))
    with pytest.raises(UserError, match=r"'euler3' has no time shift: leave out '.*clock\.safetensors', or add"):
        run(settings=corrected(), clock=clock)


# ---- autoguidance


@pytest.mark.parametrize("family", ["sit", "rae"])
def test_it_is_guided_by_another_network(run, monkeypatch, tmp_path, family):
    """The latents are those of the sampling room, and run.json tells who took part and what it cost."""
    main = tiny_weights(tmp_path / "main.safetensors", family)
    guide = tiny_weights(tmp_path / "small.safetensors", family, GUIDES[family])
    decoded = []
    with_codec(monkeypatch, lambda latents: decoded.append(latents.clone()))
    given = autoguided(family, labels="balanced_shuffled", num_images=20)
    out = run(settings=given, weights=main, guide=guide, batch=20)

    networks = [network_from_file(given[entry], path) for entry, path in (("model", main), ("guide_model", guide))]
    labels = torch.from_numpy(np.load(out)["arr_1"])
    noise = normal(0, Stream.NOISE, 0, torch.arange(20), (3, 4, 4))
    velocity = autoguided_velocity(*networks, labels, 1.5, interval=(0.1, 1.0))
    expected = sample(velocity, noise, solver="euler", times=time_grid(3, end=0.999, shift=2.0))
    torch.testing.assert_close(decoded[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(labels, stage.draw_labels("balanced_shuffled", 0, 20, 10))

    made = json.loads((out.parent / "run.json").read_text())
    assert set(made["parents"]) == {"weights", "guide"}
    assert made["measured"]["network_calls_per_image"] == 3
    assert made["measured"]["guide_calls_per_image"] == 2


def test_another_guide_gives_another_result(run, tmp_path, guide):
    first = run(settings=autoguided("sit"), guide=guide).read_bytes()
    torch.manual_seed(1)
    network = build_model("sit", **GUIDES["sit"])
    for parameter in network.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    other = tmp_path / "other.safetensors"
    save_model(other, network.state_dict(), {"family": "sit", **network.options})
    assert run(settings=autoguided("sit"), guide=other).read_bytes() != first


def test_cut_short_by_a_kill_it_is_guided_on(run, monkeypatch, guide):
    whole = run("whole", autoguided("sit"), guide=guide, batch=4)
    decoded = []

    def dies(latents):
        decoded.append(1)
        if len(decoded) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        with_codec(patch, dies)
        with pytest.raises(KeyboardInterrupt):
            run("cut", autoguided("sit"), guide=guide, batch=4)
    cut = run("cut", autoguided("sit"), guide=guide, batch=4)
    assert cut.read_bytes() == whole.read_bytes()
    assert measured(cut)["images_this_attempt"] < NUM_IMAGES
    assert measured(cut)["guide_calls_per_image"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 4}, "makes latents of 4 channels and size 4 where 'tiny' has 3 and 4: name another guide, or"),
        ({"input_size": 8}, "makes latents of 3 channels and size 8 where 'tiny' has 3 and 4: name another guide, or"),
        ({"num_classes": 5}, "knows 5 classes but 'tiny' is sampled with 10: name another guide, or"),
    ],
)
def test_a_guide_of_another_kind_is_told(run, tmp_path, options, message):
    guide = tiny_weights(tmp_path / "guide.safetensors", "sit", {**GUIDES["sit"], **options})
    with pytest.raises(UserError) as told:
        run(settings=autoguided("sit"), guide=guide)
    assert str(told.value).startswith(f"the guide 'small', '{guide}', {message}")


def test_a_guide_is_given_exactly_where_one_is_named(run, guide):
    with pytest.raises(UserError, match="'euler3-ag' is guided by 'small': give the weights of that with --guide"):
        run(settings=autoguided("sit"))
    with pytest.raises(UserError, match=r"'euler3' names no guide: leave out '.*guide.safetensors', or set guidance"):
        run(guide=guide)


# ---- overlap and faults


def test_at_most_two_batches_of_pixels_are_on_the_host(run, monkeypatch):
    """A slow disk: the next batch is sampled and decoded meanwhile, and then waits."""
    alive, most, write = set(), [], NpzWriter.write
    decode, may_write = Codec.decode, threading.Semaphore(0)
    writers = set()

    def counted(self, latents, to_uint8):
        pixels = decode(self, latents, to_uint8)
        key = len(most)
        alive.add(key)
        weakref.finalize(pixels, alive.discard, key)
        most.append(len(alive))
        may_write.release()
        return pixels

    def slow(self, first, **arrays):
        # Batch k is written only once batch k + 1 has been decoded, which therefore cannot wait for it.
        writers.add(threading.current_thread())
        assert may_write.acquire(timeout=20)
        if first + 2 < NUM_IMAGES:
            assert may_write.acquire(timeout=20)
            may_write.release()
        write(self, first, **arrays)

    monkeypatch.setattr(Codec, "decode", counted)
    monkeypatch.setattr(NpzWriter, "write", slow)
    with_codec(monkeypatch, lambda latents: gc.collect())
    run(batch=2)
    assert len(most) == 7
    assert max(most) == 2
    assert len(writers) == 1
    assert threading.current_thread() not in writers


@pytest.mark.parametrize("fault", ["decode", "write"])
def test_an_error_surfaces_and_what_was_written_stays(run, monkeypatch, fault):
    whole = run("whole", batch=4)
    calls = []

    def failing(*_, **__):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError(f"{fault} failed")

    with monkeypatch.context() as patch:
        if fault == "decode":
            with_codec(patch, failing)
        else:
            write = NpzWriter.write
            patch.setattr(NpzWriter, "write", lambda *a, **k: (failing(), write(*a, **k)))
        with pytest.raises(RuntimeError, match=f"{fault} failed"):
            run("cut", batch=4)
    cut = run("cut", batch=4)
    assert cut.read_bytes() == whole.read_bytes()
    assert measured(cut)["images_this_attempt"] == NUM_IMAGES - 8  # the two batches before the fault are on disk


# ---- networks


def test_networks_are_loaded_by_what_shapes_cannot_tell(tmp_path):
    for family in ("sit", "repa"):
        entry = {"family": family, **MODELS[family], "hidden_size": 99999}  # sizes are the file's
        path = tiny_weights(tmp_path / f"{family}.safetensors", family)
        network = network_from_file(entry, path)
        assert type(network).__name__.lower() == family
        assert network.options == MODELS[family]
    with pytest.raises(UserError, match="'sitt' is not a family"):
        network_from_file({"family": "sitt"}, path)


def test_a_repa_network_is_sampled_like_any_other(run, tmp_path):
    path = tiny_weights(tmp_path / "repa.safetensors", "repa")
    with np.load(run(settings={**settings(), "model": {"family": "repa", **MODELS["repa"]}}, weights=path)) as archive:
        assert archive["arr_0"].std() > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 11}, "knows 10 classes but 'tiny' is sampled with 11"),
        ({"model": {"family": "sit", **MODELS["sit"], "input_size": 8}}, "and size 4 where 'tiny' has 3 and 8"),
    ],
)
def test_weights_of_another_kind_are_told(run, changes, message):
    with pytest.raises(UserError, match=message):
        run(settings={**settings(), **changes})


# ---- processes

SCRIPT = """
import os, sys
from pathlib import Path
from mixflow.stages import sample
from mixflow.runtime.stopping import StopRequest, Unfinished
from tests.unit.test_sample_stage import REPA_SDE, settings

class AfterOneBatch(StopRequest):
    asked = 0
    def __bool__(self):
        self.asked += 1
        self.reason = "SIGTERM arrived" if self.asked == 2 and os.environ["RANK"] == "1" else self.reason
        return self.reason is not None

folder, name, stopping = Path(sys.argv[1]), sys.argv[2], len(sys.argv) > 3
if stopping:
    sample.StopRequest = AfterOneBatch
try:
    sample.run(
        settings(**REPA_SDE), weights=folder / "model.safetensors", out=folder / name / "samples.npz",
        scratch=folder / f"scratch-{name}", batch=2,
    )
except Unfinished as error:
    # To a file of its own: lines of two processes may meet on a terminal.
    (folder / f"told-{os.environ['RANK']}.txt").write_text(str(error))
else:
    assert not stopping
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_stop_together(run, tmp_path):
    whole = run("whole", settings(**REPA_SDE), batch=2)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(*arguments):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [*launcher, str(script), str(tmp_path), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]

    start("two")
    assert (tmp_path / "two" / "samples.npz").read_bytes() == whole.read_bytes()
    assert measured(tmp_path / "two" / "samples.npz")["network_calls_per_image"] == 17

    start("cut", "stopping")
    told = [(tmp_path / f"told-{rank}.txt").read_text() for rank in (0, 1)]
    # Seven batches, of which process 0 has four (the last of one image) and process 1 stops after its first.
    assert told[0] == "'tiny/euler3' was saved at 9 of 13 images because another process was told to stop"
    assert told[1] == "'tiny/euler3' was saved at 9 of 13 images because SIGTERM arrived"
    assert run("cut", settings(**REPA_SDE), batch=2).read_bytes() == whole.read_bytes()
