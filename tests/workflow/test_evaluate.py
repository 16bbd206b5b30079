"""`python -m mixflow evaluate`, as somebody calls it who has samples, a reference and nothing else of the pipeline."""

import contextlib
import json
import os
import pickle
import re
import time
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow.cli import main
from mixflow.evaluation import (
    Inception,
    frechet_distance,
    inception_score,
    moments,
    precision_recall,
    tiny_inception_state_dict,
)
from mixflow.evaluation.references import METRICS
from mixflow.runtime.files import file_sha256, write_json
from mixflow.stages.evaluate_files import ADM
from tests import forked

pytestmark = pytest.mark.slow

NUM_IMAGES = 600  # three parts, the last one ragged
SIZE = 24


def images(n, seed, size=SIZE):
    """Blurred noise: neighbouring pixels hang together, as in images."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, size // 4, size // 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return np.clip(coarse + rng.integers(-20, 20, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """weights.pth, reference.npz as ADM publishes them, a.npz and b.npz of samples, a/ the same images as a.npz."""
    folder = tmp_path_factory.mktemp("made")
    weights = tiny_inception_state_dict(seed=3, width_divisor=32)
    torch.save(weights, folder / "weights.pth")
    real = images(150, seed=0)
    pool, spatial, _ = Inception(weights)(real)
    (mu, sigma), (mu_s, sigma_s) = moments(pool), moments(spatial)
    statistics = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    np.savez(folder / "reference.npz", arr_0=real, **{name: x.numpy() for name, x in statistics.items()})
    labels = np.random.default_rng(5).integers(0, 10, NUM_IMAGES)
    for seed, name in ((1, "a"), (2, "b")):
        np.savez(folder / f"{name}.npz", arr_0=images(NUM_IMAGES, seed), arr_1=labels)
    (folder / "a").mkdir()
    for index, image in enumerate(images(NUM_IMAGES, 1)):
        Image.fromarray(image).save(folder / "a" / f"{index}.png")
    return folder


def environment(tmp_path, cache=None):
    """One cache for all tests, unless a test looks at it."""
    return {**os.environ, "XDG_CACHE_HOME": str(cache or tmp_path.parent / "cache")}


def run(tmp_path, *arguments, code=0, cache=None):
    result = forked.mixflow("evaluate", *arguments, cwd=tmp_path, env=environment(tmp_path, cache))
    assert result.returncode == code, result.stderr[-3000:]
    return result


def common(made):
    return ["--reference", made / "reference.npz", "--extractor", made / "weights.pth"]


@pytest.fixture(scope="module")
def evaluated(made, tmp_path_factory):
    """(folder, result of the command) with every metric of a.npz."""
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, run(folder, made / "a.npz", *common(made), "--metrics", "all")


def told(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


def test_the_numbers_are_those_of_the_metric_functions(made, evaluated):
    found = told(evaluated[0])
    network = Inception(torch.load(made / "weights.pth"))
    parts = [network(batch.numpy()) for batch in torch.from_numpy(images(NUM_IMAGES, 1)).split(64)]
    pool, spatial, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    real = np.load(made / "reference.npz")
    real_pool = torch.cat([network(batch.numpy())[0] for batch in torch.from_numpy(real["arr_0"]).split(64)])
    precision, recall = precision_recall(real_pool, pool, mode="adm")
    expected = {
        "fid": frechet_distance(real["mu"], real["sigma"], *moments(pool)),
        "sfid": frechet_distance(real["mu_s"], real["sigma_s"], *moments(spatial)),
        "is": inception_score(logits),
        "precision": precision,
        "recall": recall,
    }
    for name, value in expected.items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-5), name
    assert set(found["metrics"]) == {name for name, metric in METRICS.items() if metric.kind == "inception"}
    assert found["num_images"] == NUM_IMAGES
    assert found["labels"] == "random"
    assert found["standard_errors"]["fid"] > 0
    assert found["protocol"]["measurement"]["reference"]["published"] is True
    assert any("50,000" in warning for warning in found["warnings"])


def test_the_terminal_shows_a_table(evaluated):
    text = evaluated[1].stdout
    assert re.search(r"^gFID ↓ +0\.\d+ ± 0\.\d", text, re.MULTILINE)
    assert f"{NUM_IMAGES:,} images of {SIZE}x{SIZE}, random labels" in text
    assert "sampling noise only" in text
    assert "written to metrics.json" in text
    assert not (evaluated[0] / "scratch").exists() or not list((evaluated[0] / "scratch").rglob("*.safetensors"))


def test_three_processes_give_the_same_bytes(made, evaluated, tmp_path):
    command = ["evaluate", made / "a.npz", *common(made), "--metrics", "all"]
    for result in forked.together(3, *command, cwd=tmp_path, env=environment(tmp_path)):
        assert result.returncode == 0, result.stderr[-3000:]
    assert told(tmp_path) == told(evaluated[0])


def test_killed_and_called_again_it_gives_the_same_bytes(made, evaluated, tmp_path):
    command = ["evaluate", made / "a.npz", *common(made), "--metrics", "all"]
    for wanted in (1, 2):  # the reference's only part, then the first of the samples
        process = forked.start(*command, cwd=tmp_path, env=environment(tmp_path, tmp_path / "cache"))
        pattern = "scratch/evaluate/*/*/*.safetensors"
        made_reference = tmp_path / "cache/mixflow/references"
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob(pattern))) + 9 * made_reference.exists() < (1 if wanted == 1 else 10):
            assert process.exitcode is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.join()
        assert not (tmp_path / "metrics.json").exists()
    result = run(tmp_path, *command[1:], cache=tmp_path / "cache")
    assert told(tmp_path) == told(evaluated[0])
    assert "written to metrics.json" in result.stdout
    assert not list(tmp_path.glob(pattern))


def test_a_folder_of_pngs_is_as_good_as_the_file(made, evaluated, tmp_path):
    run(tmp_path, made / "a", *common(made), "--metrics", "fid,is,pr", "--out", "folder.json")
    found = told(tmp_path, "folder.json")
    assert list(found["metrics"]) == ["fid", "is", "precision", "recall"]
    for name, value in found["metrics"].items():
        assert value == told(evaluated[0])["metrics"][name]


def test_kept_features_serve_other_metrics_without_the_network(made, tmp_path):
    run(tmp_path, made / "a.npz", *common(made), "--metrics", "is", "--keep-features")
    kept = list(tmp_path.glob("scratch/evaluate/*/*/*.safetensors"))
    assert len(kept) == 3
    with (  # within this process: another one would not see the patch
        contextlib.chdir(tmp_path),
        mock.patch.dict(os.environ, environment(tmp_path)),
        mock.patch("mixflow.stages.image_features.load_inception", side_effect=AssertionError),
    ):
        main(["evaluate", str(made / "a.npz"), *map(str, common(made)), "--metrics", "fid"])
    assert list(told(tmp_path)["metrics"]) == ["fid"]
    assert not any(path.exists() for path in kept)


def test_a_time_budget_keeps_what_is_done(made, tmp_path):
    stopped = run(tmp_path, made / "a.npz", *common(made), "--metrics", "is", "--time-budget", "0.0001", code=75)
    assert "run the same command again to continue" in stopped.stderr
    assert len(list(tmp_path.glob("scratch/evaluate/*/*/*.safetensors"))) == 1
    run(tmp_path, made / "a.npz", *common(made), "--metrics", "is")
    assert not (tmp_path / "scratch/evaluate").exists() or not list(tmp_path.glob("scratch/evaluate/*/*/*"))


def test_the_pipelines_record_beside_samples_becomes_part_of_the_protocol(made, tmp_path):
    (tmp_path / "a.npz").write_bytes((made / "a.npz").read_bytes())
    settings = {"sampler": {"labels": "balanced", "seed": 3}}
    record = {"stage": "sample", "settings": settings, "outputs": {"a.npz": file_sha256(made / "a.npz")}}
    write_json(tmp_path / "run.json", record)
    run(tmp_path, "a.npz", *common(made), "--metrics", "is")
    assert told(tmp_path)["sampled_by"] == settings
    assert told(tmp_path)["labels"] == "balanced"
    write_json(tmp_path / "run.json", {**record, "outputs": {"a.npz": "0" * 64}})  # of other samples
    run(tmp_path, "a.npz", *common(made), "--metrics", "is")
    assert told(tmp_path)["sampled_by"] is None
    assert told(tmp_path)["labels"] == "random"


def test_sets_of_disjoint_seeds_give_mean_spread_and_minimum(made, tmp_path):
    result = run(tmp_path, made / "a.npz", made / "b.npz", *common(made), "--metrics", "fid,is")
    found = told(tmp_path)
    values = [one["metrics"]["fid"] for one in found["sets"]]
    spread = found["spread"]["fid"]
    assert spread["mean"] == pytest.approx(np.mean(values))
    assert spread["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert spread["minimum"] == min(values)
    assert re.search(r"mean +std +min", result.stdout)
    refused = run(tmp_path, made / "a.npz", made / "a.npz", *common(made), "--out", "other.json", code=2)
    assert "hold the same images" in refused.stderr
    np.savez(tmp_path / "large.npz", arr_0=images(8, 0, size=32))
    refused = run(tmp_path, made / "a.npz", "large.npz", *common(made), "--out", "other.json", code=2)
    assert "large.npz' holds images of 32x32" in refused.stderr
    assert "metrics of" not in refused.stderr  # nothing was computed


def test_metrics_of_other_samples_are_not_overwritten(made, tmp_path):
    run(tmp_path, made / "a.npz", *common(made), "--metrics", "is")
    before = (tmp_path / "metrics.json").read_bytes()
    refused = run(tmp_path, made / "b.npz", *common(made), "--metrics", "is", code=2)
    assert "name another file with --out" in refused.stderr
    assert (tmp_path / "metrics.json").read_bytes() == before
    run(tmp_path, made / "a.npz", *common(made), "--metrics", "is,fid")
    assert list(told(tmp_path)["metrics"]) == ["is", "fid"]


def test_compat_adm_says_what_it_claims(made, tmp_path):
    result = run(tmp_path, made / "a.npz", *common(made), "--compat", "adm")
    found = told(tmp_path)
    assert tuple(found["metrics"]) == ADM
    assert set(found["compat"]["adm"]) == set(ADM)
    assert found["compat"]["adm"]["precision"] in result.stdout
    refused = run(tmp_path, made / "a.npz", *common(made), "--compat", "adm", "--metrics", "kid", code=2)
    assert "--compat adm knows fid, sfid, is, precision, recall, not kid" in refused.stderr


def test_a_reference_of_ones_own(made, tmp_path):
    weights = ["--extractor", made / "weights.pth"]
    with np.load(made / "reference.npz") as published:
        np.savez(tmp_path / "real.npz", arr_0=published["arr_0"])
        statistics = {name: published[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "statistics.npz", **statistics)
    refused = run(tmp_path, made / "a.npz", "--reference", "real.npz", *weights, code=2)
    assert "--make-reference" in refused.stderr
    run(tmp_path, "real.npz", "--make-reference", "own.safetensors", *weights)
    run(tmp_path, made / "a.npz", "--reference", "own.safetensors", *weights, "--metrics", "all", "--out", "own.json")
    run(tmp_path, made / "a.npz", *common(made), "--metrics", "all", "--out", "published.json")
    for name, value in told(tmp_path, "own.json")["metrics"].items():
        assert value == pytest.approx(told(tmp_path, "published.json")["metrics"][name], rel=1e-6), name
    refused = run(
        tmp_path,
        made / "a.npz",
        "--reference",
        "own.safetensors",
        *weights,
        "--compat",
        "adm",
        "--out",
        "c.json",
        code=2,
    )
    assert "were made here: give ADM's .npz, or leave out --compat" in refused.stderr
    # Statistics alone serve the distances, and say what they cannot serve.
    run(tmp_path, made / "a.npz", "--reference", "statistics.npz", *weights, "--out", "few.json")
    assert list(told(tmp_path, "few.json")["metrics"]) == ["fid", "sfid", "is"]
    refused = run(tmp_path, made / "a.npz", "--reference", "statistics.npz", *weights, "--metrics", "pr", code=2)
    assert "'precision' needs a reference with more than 5 images" in refused.stderr


def test_statistics_of_edm2_and_dinov2(tmp_path):
    import timm
    from safetensors.torch import save_file

    from mixflow.models.dinov2 import load_dinov2_class

    encoder = timm.create_model("vit_base_patch14_dinov2", embed_dim=64, depth=2, num_heads=1)
    save_file(encoder.state_dict(), tmp_path / "dinov2.safetensors")
    mu, sigma = moments(load_dinov2_class(tmp_path / "dinov2.safetensors")(images(100, 7)))
    statistics = {"fd_dinov2": {"mu": mu.numpy(), "sigma": sigma.numpy()}}
    (tmp_path / "img.pkl").write_bytes(pickle.dumps(statistics))
    np.savez(tmp_path / "samples.npz", arr_0=images(100, 8))
    weights = ["--extractor", "dinov2.safetensors"]
    run(tmp_path, "samples.npz", "--reference", "img.pkl", *weights)
    seen = load_dinov2_class(tmp_path / "dinov2.safetensors")(images(100, 8))
    assert told(tmp_path)["metrics"] == {
        "fd_dinov2": pytest.approx(frechet_distance(mu, sigma, *moments(seen)), rel=1e-4)
    }
    np.savez(tmp_path / "real.npz", arr_0=images(100, 7))
    run(tmp_path, "real.npz", "--make-reference", "own.safetensors", *weights, "--metrics", "fd_dinov2")
    run(tmp_path, "samples.npz", "--reference", "own.safetensors", *weights, "--out", "own.json")
    assert told(tmp_path, "own.json")["metrics"]["fd_dinov2"] == pytest.approx(
        told(tmp_path)["metrics"]["fd_dinov2"], rel=1e-4
    )


class Mine:
    """What a pickle could make the reader run."""

    def __reduce__(self):
        return os.mkdir, ("made-by-pickle",)


def bad_samples(folder):
    """Yield (name of a bad sample file, what the sentence says)."""
    good = images(8, 0)
    np.savez(folder / "unnamed.npz", images=good)
    yield "unnamed.npz", "arr_0"
    np.savez(folder / "flat.npz", arr_0=good.reshape(8, -1))
    yield "flat.npz", r"\[N,H,W,3\]"
    np.savez(folder / "channels-first.npz", arr_0=good.transpose(0, 3, 1, 2))
    yield "channels-first.npz", r"\[N,H,W,3\]"
    np.savez(folder / "empty.npz", arr_0=good[:0])
    yield "empty.npz", "no image|at least one"
    np.savez(folder / "objects.npz", arr_0=np.array([Mine(), None], dtype=object))
    yield "objects.npz", "object"
    (folder / "pickled.npz").write_bytes(pickle.dumps(Mine()))
    yield "pickled.npz", "zip|npz"
    np.savez(folder / "whole.npz", arr_0=good)
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:-300])
    yield "cut.npz", "zip|whole"
    np.savez(folder / "signed.npz", arr_0=good / 127.5 - 1)
    yield "signed.npz", "-1"
    np.savez(folder / "large.npz", arr_0=images(8, 0, size=32))
    yield "large.npz", "32x32"
    (folder / "nothing").mkdir()
    yield "nothing", "image"
    yield "nowhere.npz", "does not exist"


def test_bad_samples_get_one_sentence(made, tmp_path):
    run(tmp_path, made / "b.npz", *common(made), "--metrics", "is", "--out", "b.json")  # derives the reference
    for name, sentence in bad_samples(tmp_path):
        result = run(tmp_path, name, *common(made), "--out", "bad.json", code=2)
        (line,) = [line for line in result.stderr.splitlines() if "mixflow: " in line and name in line]
        assert re.search(sentence, line), line
        assert "Traceback" not in result.stderr, name
        assert not (tmp_path / "bad.json").exists()
    assert not (tmp_path / "made-by-pickle").exists()


def test_bad_references_get_one_sentence(made, tmp_path):
    with np.load(made / "reference.npz") as published:
        arrays = dict(published)
    cases = {
        "no-mu.npz": ({"arr_0": arrays["arr_0"]}, "--make-reference"),
        "no-sigma.npz": ({"arr_0": arrays["arr_0"], "mu": arrays["mu"]}, "sigma"),
        "other-width.npz": ({**arrays, "mu": arrays["mu"][:9], "sigma": arrays["sigma"][:9, :9]}, "extractor"),
        "nan.npz": ({**arrays, "sigma": arrays["sigma"] * np.nan}, "NaN"),
    }
    for name, (content, sentence) in cases.items():
        np.savez(tmp_path / name, **content)
        result = run(
            tmp_path,
            made / "a.npz",
            "--reference",
            name,
            "--extractor",
            made / "weights.pth",
            code=2,
            cache=tmp_path / "cache",
        )
        assert re.search(sentence, result.stderr), result.stderr
        assert "Traceback" not in result.stderr
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"fid": Mine()}))
    result = run(tmp_path, made / "a.npz", "--reference", "evil.pkl", "--extractor", made / "weights.pth", code=2)
    assert "evil.pkl" in result.stderr
    assert not (tmp_path / "made-by-pickle").exists()
    result = run(tmp_path, made / "a.npz", code=2)
    assert "--reference" in result.stderr
    result = run(tmp_path, made / "a.npz", *common(made), "--metrics", "fid,fdi", code=2)
    assert "'fdi' is not known; did you mean" in result.stderr
