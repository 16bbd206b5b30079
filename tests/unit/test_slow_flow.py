"""The slow-flow stage: the same bytes however it is cut, nulls as theory says, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mixflow.config import load_config
from mixflow.evaluation.latent_law import LatentLaw, fit_law
from mixflow.flow.gaussian import euler_factors, projected_time, std_along, velocity_slope
from mixflow.models import Clock, build_model, load_clock, save_clock, save_model
from mixflow.models.exact import GaussianField
from mixflow.runtime.errors import UserError
from mixflow.runtime.seeds import Stream, normal
from mixflow.runtime.stopping import Unfinished
from mixflow.sampling import sample, time_grid
from mixflow.stages import slow_flow as stage
from mixflow.stages.cache_latents import cache_latents
from mixflow.stages.real_latents import RealLatents
from mixflow.stages.sample import sample_latents
from mixflow.stages.train_clock import train_clock
from tests.conftest import ROOT

CPU = torch.device("cpu")
SMALL = {
    "datasets": {"digits": {"resolution": 8}},
    "checkpoints": {
        "digits-base": {"train": {"model": {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4}}}
    },
    "samplers": {"slow-flow-euler50": {"num_steps": 4, "num_images": 21}},
    "clocks": {"digits": {"width": 4, "num_steps": 40, "batch_size": 16}},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The real config, with digits of 8x8 pixels and a tiny network."""
    overlay = tmp_path_factory.mktemp("config") / "small.yaml"
    overlay.write_text(json.dumps(SMALL))
    return load_config(ROOT / "config.yaml", overlay)


@pytest.fixture(scope="module")
def parts(config, tmp_path_factory):
    """Latents, weights and a clock."""
    folder = tmp_path_factory.mktemp("parts")
    cache_latents(config.slice("cache_latents", "digits"), folder / "index.json")
    options = config.network_options("digits-base")
    torch.manual_seed(0)
    network = build_model(**options)
    for parameter in network.parameters():  # the initial head is zero
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_model(folder / "model.safetensors", network.state_dict(), {"family": "sit", **network.options})
    torch.manual_seed(1)
    save_clock(folder / "clock.safetensors", Clock(1, 4).state_dict(), {"in_channels": 1, "width": 4})
    return {
        "latents": folder / "index.json", "weights": folder / "model.safetensors", "clock": folder / "clock.safetensors"
    }  # fmt: skip


def slice_of(config, **sampler):
    settings = config.slice("slow_flow", "digits-base", "slow-flow-euler50")
    return {**settings, "sampler": {**settings["sampler"], **sampler}}


def measure(settings, parts, folder, **options):
    out = folder / "slow_flow.json"
    stage.run(settings, out=out, scratch=folder / "scratch", **{**parts, **options})
    return out


def numbers(value, path=""):
    """Yield (path, number) of every number in a result."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from numbers(part, f"{path}.{key}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from numbers(part, f"{path}[{index}]")
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield path, value


def same(a, b, tolerance):
    ours, theirs = (dict(numbers(json.loads(path.read_text()))) for path in (a, b))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value == pytest.approx(theirs[path], abs=tolerance), path


def test_the_result_does_not_depend_on_how_it_is_cut(config, parts, tmp_path, monkeypatch):
    whole = measure(slice_of(config), parts, tmp_path / "whole")
    same(whole, measure(slice_of(config), parts, tmp_path / "passes", batch=4), 2e-5)
    monkeypatch.setattr(stage, "BLOCK", 8)
    same(whole, measure(slice_of(config), parts, tmp_path / "blocks"), 2e-5)


def test_a_resumed_run_gives_the_same_bytes(config, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "BLOCK", 8)
    undisturbed = measure(slice_of(config), parts, tmp_path / "a")

    class Soon(stage.StopRequest):
        asked = 0

        def __bool__(self):
            self.asked += 1
            self.reason = "of this test"
            return self.asked > 1

    with monkeypatch.context() as patch:
        patch.setattr(stage, "StopRequest", Soon)
        with pytest.raises(Unfinished, match="1 of 3 blocks because of this test"):
            measure(slice_of(config), parts, tmp_path / "b")
    assert not (tmp_path / "b/slow_flow.json").exists()
    resumed = measure(slice_of(config), parts, tmp_path / "b")
    assert resumed.read_bytes() == undisturbed.read_bytes()
    told = json.loads((tmp_path / "b/run.json").read_text())
    assert (told["measured"]["images"], told["measured"]["images_this_attempt"]) == (21, 13)
    assert told["measured"]["network_calls_per_image"] == 8  # two trajectories of four Euler steps
    assert set(told["parents"]) == {"weights", "latents", "clock"}
    assert not [path for path in (tmp_path / "b/scratch").rglob("*") if path.is_file()]
    before = resumed.stat().st_mtime_ns
    measure(slice_of(config), parts, tmp_path / "b")  # nothing to do
    assert resumed.stat().st_mtime_ns == before


def test_what_a_result_holds(config, parts, tmp_path):
    found = json.loads(measure(slice_of(config), parts, tmp_path).read_text())
    assert found["law"] == {
        "images": 1437, "dimensions": 64, "axes": "principal", "num_axes": 64,
        "energy": found["law"]["energy"], "mean_variance": found["law"]["mean_variance"],
    }  # fmt: skip
    assert set(found["readings"]) == {"from_noise", "from_start", "own_end", "noise_level"}
    assert set(found["clocks"]) == {
        "times", "wasserstein", "kl", "energy", "null_space", "learned", "energy_per_number"
    }  # fmt: skip
    for name, start, end in (("from_noise", 0, None), ("from_start", 0.05, None), ("own_end", 0, 1)):
        part = found["readings"][name]
        assert part["times"] == pytest.approx([start + k * (1 - start) / 4 for k in range(5)])
        for series in (part["measured"], *part["nulls"].values()):
            assert series["median"][0] == series["min"][0] == series["max"][0] == pytest.approx(start, abs=1e-6)
            assert all(low <= middle <= high for low, middle, high in zip(
                series["min"], series["median"], series["max"], strict=True
            ))  # fmt: skip
            if end is not None:
                assert series["pooled"][-1] == series["min"][-1] == pytest.approx(end)
        assert series["distance"]["max"][0] == pytest.approx(0, abs=1e-6)
    draws = found["clocks"]["learned"]["draws"]
    assert draws == pytest.approx(found["clocks"]["times"])  # by definition


def test_nulls_are_what_the_sampler_makes_of_exact_fields(config, parts, tmp_path):
    """The pooled times of both nulls against the closed form of the same Euler steps, within their sampling error."""
    settings = slice_of(config, num_images=1437, num_steps=10)
    found = json.loads(measure(settings, parts, tmp_path).read_text())["readings"]
    law = law_of(settings, parts)
    times = time_grid(10)
    classes = law.class_shares @ (law.class_means @ law.within_axes).square()
    laws = {
        "gaussian": (law.variance, (law.mean @ law.axes).square()),
        "class_gaussian": (law.within_variance, classes),
    }
    for name, (lam, mean_square) in laws.items():

        def slope(t, lam=lam):
            return velocity_slope(lam, t)

        std = std_along(euler_factors(slope, times))
        expected = [
            float(projected_time(lam, mean_square.sqrt(), 0.0, t, std[k])) for k, t in enumerate(times.tolist())
        ]
        assert found["from_noise"]["nulls"][name]["pooled"] == pytest.approx(expected, abs=0.01)
        exact = found["from_noise"]["exact_flow"][name]
        assert exact[-1] == pytest.approx(
            float(projected_time(lam, mean_square.sqrt(), 0.0, 1.0, lam.sqrt())), abs=1e-5
        )  # fmt: skip
    # The label tells something of x1, so a field that knows it comes nearer to the pair; both are far from t = 1.
    ends = [found["from_noise"]["nulls"][name]["pooled"][-1] for name in laws]
    assert ends[0] < ends[1] < 0.95


def law_of(settings, parts):
    real = RealLatents(settings, parts["latents"], {}, CPU)
    batch = real.draw(settings["sampler"]["seed"], 0, torch.arange(1437))
    return fit_law([batch], 10, max_axes=8192, seed=0)


def test_the_null_field_is_the_exact_field_of_a_gaussian(config, parts):
    law = law_of(slice_of(config), parts)
    exact = GaussianField.from_spectrum(law.mean.view(1, 8, 8), law.variance, law.axes)
    ours = stage.gaussian_field(law.variance, law.axes, lambda labels: law.mean)
    x, y = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(5, dtype=torch.int64)
    for t in (0.0, 0.3, 0.9):
        at = torch.full((5,), t)
        torch.testing.assert_close(ours(x, at, y), exact(x, at, y), atol=2e-4, rtol=2e-4)


def test_without_a_label_the_null_is_that_of_all_classes(config, parts):
    """Classifier-free guidance asks for it; a batch of classes and the null label is split by row."""
    settings = slice_of(config)
    fields = stage._null_fields(settings, law_of(settings, parts), null_label=10)
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
    by_label, marginal = fields["class_gaussian"][0], fields["gaussian"][0]
    mixed = by_label(x, t, torch.tensor([10, 4, 10]))
    torch.testing.assert_close(mixed[[0, 2]], marginal(x, t, torch.tensor([0, 0, 0]))[[0, 2]])
    torch.testing.assert_close(mixed[1], by_label(x, t, torch.tensor([4, 4, 4]))[1])
    assert not torch.allclose(mixed[1], marginal(x, t, torch.tensor([4, 4, 4]))[1], atol=1e-2)
    guided = {
        **settings["sampler"],
        "guidance": {"scale": 1.5, "guide": "x", "channels": "all", "interval": [0.0, 1.0]},
    }
    alone = stage._null_fields({**settings, "sampler": guided}, law_of(settings, parts), null_label=10)
    assert alone["gaussian"][3]["sampler"]["guidance"]["scale"] == 1.0  # a guide has no exact counterpart


def test_pairs_are_the_samples_noise_and_training_images_of_their_labels(config, parts):
    settings = slice_of(config)
    real = RealLatents(settings, parts["latents"], {}, CPU)
    data, labels = real.draw(7, 0, torch.arange(10))
    again, _ = real.draw(7, 0, torch.arange(4, 10))
    assert torch.equal(data[4:], again)
    other, _ = real.draw(8, 0, torch.arange(10))
    assert not torch.equal(data, other)
    whole, all_labels = real.draw(7, 0, torch.arange(1437))
    assert len(torch.unique(whole.flatten(1), dim=0)) >= 1430  # each image once in an epoch (a few are equal)
    assert torch.equal(all_labels[:10], labels)


def test_watching_a_sampler_changes_nothing(config, parts):
    settings = config.slice("sample", "digits-base", "slow-flow-euler50")
    network = stage.load_network(settings, "model", parts["weights"], "w", "x")
    indices, labels = torch.arange(6), torch.arange(6)
    plain = sample_latents(network, settings, indices, labels, network.null_label)
    seen = []
    watched = sample_latents(
        network, settings, indices, labels, network.null_label, callback=lambda k, x, t: seen.append((k, x, float(t)))
    )
    assert torch.equal(plain, watched)
    assert [k for k, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [t for _, _, t in seen] == [0, 0.25, 0.5, 0.75, 1]
    assert torch.equal(seen[-1][1], plain)
    noise = normal(settings["sampler"]["seed"], Stream.NOISE, 0, indices, (1, 8, 8))
    assert torch.equal(seen[0][1], noise)
    same_start = sample_latents(network, settings, indices, labels, network.null_label, initial=(noise, 0.0))
    assert torch.equal(plain, same_start)


def test_a_shifted_grid_starts_at_the_asked_time(config, parts):
    settings = config.slice("sample", "digits-base", "slow-flow-euler50")
    settings["sampler"] = {**settings["sampler"], "grid": {"shift": 6.9, "end": 0.999}}
    network = stage.load_network(settings, "model", parts["weights"], "w", "x")
    times = []
    sample_latents(
        network, settings, torch.arange(2), torch.arange(2), network.null_label,
        initial=(torch.zeros(2, 1, 8, 8), 0.05), callback=lambda k, x, t: times.append(float(t)),
    )  # fmt: skip
    assert len(times) == 5
    assert times[0] == pytest.approx(0.05)
    assert times[-1] == pytest.approx(time_grid(4, end=0.999, shift=6.9)[-1].item())


def test_the_sde_is_measured_after_every_step(config, parts, tmp_path):
    settings = slice_of(config)
    sampler = {key: value for key, value in settings["sampler"].items() if key != "grid"} | {
        "solver": "euler_maruyama", "num_steps": 5, "diffusion": {"form": "sigma", "norm": 1.0}, "last_step": "mean",
        "last_step_size": 0.04,
    }  # fmt: skip
    found = json.loads(measure({**settings, "sampler": sampler}, parts, tmp_path).read_text())["readings"]
    assert found["from_noise"]["times"] == pytest.approx([0, 0.24, 0.48, 0.72, 0.96, 1])
    assert found["from_start"]["times"] == pytest.approx([0.05, 0.2775, 0.505, 0.7325, 0.96, 1])


def test_large_latents_are_looked_at_in_some_coordinates(config, parts, tmp_path):
    settings = slice_of(config)
    settings["slow_flow"] = {**settings["slow_flow"], "max_axes": 20}
    found = json.loads(measure(settings, parts, tmp_path).read_text())
    assert (found["law"]["axes"], found["law"]["num_axes"], found["law"]["dimensions"]) == ("coordinates", 20, 64)
    assert set(found["readings"]["from_noise"]["nulls"]) == {"gaussian"}
    # Variances of coordinates are more alike than those of principal axes, and s is concave in them: the lag is larger.
    full = json.loads(measure(slice_of(config), parts, tmp_path / "full").read_text())["readings"]["from_noise"]
    flat = found["readings"]["from_noise"]["exact_flow"]["gaussian"]
    assert flat[-1] < full["exact_flow"]["gaussian"][-1]


# --- the law of the latents


def test_the_law_has_the_moments_of_all_batches():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 2, 3, 3, generator=generator).double() + labels[:, None, None, None]
    law = fit_law([(x[:70], labels[:70]), (x[70:], labels[70:])], 4, max_axes=18, seed=0)
    flat = x.flatten(1)
    covariance = np.cov(flat.numpy().T)
    np.testing.assert_allclose((law.axes * law.variance @ law.axes.T).numpy(), covariance, atol=1e-12)
    np.testing.assert_allclose(law.mean, flat.mean(0), atol=1e-12)
    assert law.energy == pytest.approx(flat.square().sum(1).mean().item())
    means = torch.stack([flat[labels == k].mean(0) for k in range(3)])
    torch.testing.assert_close(law.class_means, torch.cat([means, flat.mean(0, keepdim=True)]))  # class 3 is absent
    around = flat - means[labels]
    within = law.within_axes * law.within_variance @ law.within_axes.T
    torch.testing.assert_close(within, around.T @ around / (300 - 3))
    assert law.class_shares.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    same = LatentLaw.of_tensors(law.tensors())
    assert all(torch.equal(getattr(same, name), value) for name, value in vars(law).items() if torch.is_tensor(value))
    assert (same.count, same.energy) == (law.count, law.energy)


def test_a_law_without_a_full_covariance_and_one_of_too_few_images():
    x, labels = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 2
    law = fit_law([(x, labels)], 2, max_axes=5, seed=0)
    assert law.axes is None
    assert law.class_means is None
    torch.testing.assert_close(law.variance, x.double().flatten(1).var(0))
    assert len(law.coordinates) == len(law.axis_mean) == len(law.axis_variance) == 5
    torch.testing.assert_close(law.axis_variance, law.variance[law.coordinates])
    assert fit_law([(x, torch.arange(50))], 50, max_axes=16, seed=0).class_means is None  # an image of each class
    with pytest.raises(UserError, match="two latents at least"):
        fit_law([(x[:1], labels[:1])], 2, max_axes=16, seed=0)


# --- the learned clock


def test_a_clock_learns_the_time(config, parts, tmp_path):
    settings = config.slice("train_clock", "digits")
    settings["clock"] = {**settings["clock"], "num_steps": 300, "width": 8}
    train_clock(settings, latents=parts["latents"], out=tmp_path / "clock.safetensors", scratch=tmp_path / "scratch")
    clock = load_clock(tmp_path / "clock.safetensors")
    real = RealLatents(settings, parts["latents"], {}, CPU)
    data, _ = real.draw(1, 0, torch.arange(500))
    noise = normal(1, Stream.NOISE, 0, torch.arange(500), (1, 8, 8))
    read = [clock(t * data + (1 - t) * noise).mean().item() for t in (0.2, 0.5, 0.8)]
    assert read == pytest.approx([0.2, 0.5, 0.8], abs=0.12)
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["stage"] == "train-clock"
    assert told["measured"]["root_mean_squared_error"] < 0.15  # 0.29 is that of always saying 1/2


def test_a_clock_is_float32_under_autocast_and_takes_any_size():
    clock = Clock(2, 4)
    x = torch.randn(3, 2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read = clock(x)
    assert read.dtype == torch.float32
    assert torch.equal(read, clock(x))
    assert clock(torch.randn(2, 2, 1, 1)).shape == (2,)


def test_files_that_are_no_clock(tmp_path, parts):
    with pytest.raises(UserError, match="does not exist: train it with train-clock"):
        load_clock(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is no clock"):
        load_clock(parts["weights"])


# --- refusals


def test_what_is_refused_in_one_sentence(config, parts, tmp_path):
    with pytest.raises(UserError, match="dopri5 chooses its own steps"):
        config.slice("slow_flow", "sit-b2-256", "dopri5-cfg1.5")
    with pytest.raises(UserError, match="give the learned clock with --clock exactly where there is one"):
        measure(slice_of(config), {**parts, "clock": None}, tmp_path)
    rae = {**slice_of(config), "autoencoder": {"kind": "rae"}, "encode": True}
    with pytest.raises(UserError, match="without encoder=RECORD statistics=RECORD: give it with --autoencoder"):
        RealLatents(rae, parts["latents"], {}, CPU)
    with pytest.raises(UserError, match="takes latents of shape"):
        RealLatents(slice_of(config), parts["latents"], {}, CPU).check_shape("a", (3, 8, 8), 10)


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"clocks": {"digit": {"extends": "digits"}}}, "clocks.digit: 'digit' is not one of the latents"),
        (  # reads other paths: these checkpoints have no clock
            {"clocks": {"digits": {"interpolant": "gvp"}}, "tables": {"digits_exposure_bias": None}, "report": None},
            None,
        ),
        ({"slow_flow": None}, "figures.figure1: slow_flow: missing from the config"),
        ({"slow_flow": {"start": 1.0}}, "slow_flow.start: 1.0 is out of range: it must be below 1"),
        ({"figures": {"main": {"extends": "figure1"}}}, "figures.main: a table has this name"),
        ({"figures": {"figure1": {"sampler": "dopri5-cfg1.5"}}}, "figures.figure1: samplers.dopri5-cfg1.5.solver"),
        ({"figures": {"figure1": {"paper": {"times": [0.5]}}}}, "10 numbers for 1 times: correct one"),
        (
            {
                "checkpoints": {"own": {"extends": "sit-b2-256", "weights": {"interpolant": None}}},
                "figures": {"figure1": {"arms": [{"checkpoint": "own", "label": "own"}]}},
            },
            "figures.figure1: checkpoints.own: its interpolant is missing",
        ),
        (
            {
                "checkpoints": {"own": {"extends": "digits-base", "train": {"interpolant": "gvp"}}},
                "figures": {"digits_slow_flow": {"arms": [{"checkpoint": "own", "label": "own"}]}},
            },
            "figures.digits_slow_flow: checkpoints.own: its interpolant is gvp",
        ),
    ],
)
def test_entries_are_checked_before_any_job(tmp_path, overlay, message):
    (tmp_path / "overlay.yaml").write_text(json.dumps(overlay))
    files = ROOT / "config.yaml", tmp_path / "overlay.yaml"
    if message is None:
        config = load_config(*files)
        assert config.clock_of("digits-base") is None
        assert "clock" not in config.slice("slow_flow", "digits-base", "slow-flow-euler50")
        return
    with pytest.raises(UserError) as found:
        load_config(*files)
    assert message in str(found.value)


def test_the_slice_holds_what_decides_the_result_and_no_more(config):
    settings = config.slice("slow_flow", "digits-base", "slow-flow-euler50")
    assert {"labels", "to_uint8"}.isdisjoint(settings["sampler"])
    assert settings["clock"] == "digits"
    rae = load_config(ROOT / "config.yaml").slice("slow_flow", "rae-dhxl-256", "rae-euler50-ag1.5")
    assert rae["encode"] is True
    assert "clock" not in rae
    assert rae["guide_model"] != rae["model"]


def test_the_field_of_straight_paths_is_followed_exactly():
    """Data that do not vary: m = t for every image, and nothing is left of the noise."""
    field = stage.gaussian_field(torch.zeros(16).double(), None, lambda labels: torch.ones(16).double())
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    states = []

    def velocity(x, t):
        return field(x, t.expand(4).float(), torch.zeros(4, dtype=torch.int64))

    sample(velocity, noise, solver="euler", times=time_grid(5), callback=lambda k, x, t: states.append((x, float(t))))
    for x, t in states:
        m, distance, _ = stage.paired_time(x, noise, torch.ones_like(noise))
        assert m.tolist() == pytest.approx([t] * 4, abs=1e-6)
        assert math.sqrt(distance.square().mean()) < 1e-6
