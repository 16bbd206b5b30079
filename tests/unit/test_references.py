"""References, metrics by name, and the parts that features are made in."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mixflow.config import load_config
from mixflow.evaluation import (
    covariance_factor,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_reference,
    measure,
    moments,
    write_reference,
)
from mixflow.evaluation.features import BATCH, Parts, Rows, Sums, look, total_moments
from mixflow.evaluation.references import METRICS, require_metrics
from mixflow.runtime.errors import UserError
from mixflow.stages.evaluate_files import ADM, PUBLISHED_WEIGHTS, parse_metrics
from mixflow.tables import METRICS as SHOWN
from tests.conftest import ROOT

FACTS = {"size": [8, 8], "num_images": None, "published": True, "extractor": "ab", "source": "cd", "tf32": False}


def features(n, seed, shift=0.0):
    """Seen by no network: pool of 6, spatial of 5, logits of 4."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"pool": 6, "spatial": 5, "logits": 4}
    return {name: torch.randn(n, width, generator=generator) + shift for name, width in widths.items()}


def reference_of(path, n=60, **without):
    real = features(n, seed=0)
    statistics = {name: moments(real[name]) for name in ("pool", "spatial") if name not in without.get("lacks", ())}
    rows = None if without.get("no_rows") else real["pool"]
    return write_reference(path, "inception", statistics, rows, FACTS)


def test_a_reference_comes_back_as_it_was_written(tmp_path):
    written = reference_of(tmp_path / "reference.safetensors")
    read = load_reference(tmp_path / "reference.safetensors")
    assert read.facts == written.facts == {**FACTS, "file": "mixflow reference", "kind": "inception", "num_rows": 60}
    assert read.size == (8, 8)
    for name, gaussian in written.gaussians.items():
        for part, tensor in gaussian._asdict().items():
            assert torch.equal(getattr(read.gaussians[name], part), tensor)
        assert torch.equal(gaussian.factor, covariance_factor(gaussian.sigma))
    assert torch.equal(read.rows, written.rows)
    assert {name: radii.dtype for name, radii in read.radii.items()} == {
        "adm": torch.float32, "exact": torch.float64, "density": torch.float64,
    }  # fmt: skip
    reference_of(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()


def test_files_that_are_no_references_are_told(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    reference_of(tmp_path / "reference.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "reference.safetensors").read_bytes()[:-9])
    for name, text in {
        "weights": "is a safetensors file but no reference",
        "cut": "cannot be read",
        "none": "does not",
    }.items():
        with pytest.raises(UserError, match=text):
            load_reference(tmp_path / f"{name}.safetensors")


def test_each_metric_is_that_of_its_function(tmp_path):
    reference, seen = reference_of(tmp_path / "reference.safetensors"), features(50, seed=1, shift=0.2)
    found = {name: estimate.value for name, estimate in measure(reference, seen.get, reference.metrics()).items()}
    pool = reference.gaussians["pool"]
    assert found["fid"] == pytest.approx(frechet_distance(pool.mu, pool.sigma, *moments(seen["pool"])), rel=1e-9)
    spatial = reference.gaussians["spatial"]
    assert found["sfid"] == pytest.approx(
        frechet_distance(spatial.mu, spatial.sigma, *moments(seen["spatial"])), rel=1e-9
    )
    assert found["is"] == pytest.approx(inception_score(seen["logits"]))
    assert found["kid"] == pytest.approx(kernel_distance(reference.rows, seen["pool"], subset_size=50).mean)
    assert list(found) == [name for name, metric in METRICS.items() if metric.kind == "inception"]
    assert list(measure(reference, seen.get, ["recall", "is"])) == ["recall", "is"]


def test_what_a_reference_lacks_is_named(tmp_path):
    few = reference_of(tmp_path / "few.safetensors", lacks=("spatial",), no_rows=True)
    assert few.metrics() == ["fid", "is"]
    with pytest.raises(UserError, match=r"'sfid' needs a reference with mu_s and sigma_s, which 'few.npz'"):
        require_metrics(few, ["fid", "sfid"], "few.npz")
    with pytest.raises(UserError, match="'recall' needs a reference with more than 5 images"):
        require_metrics(few, ["recall"], "few.npz")
    with pytest.raises(UserError, match=r"'fd_dinov2' needs dinov2 features but 'few.npz' holds those of inception"):
        require_metrics(few, ["fd_dinov2"], "few.npz")
    tiny = reference_of(tmp_path / "tiny.safetensors", n=5)
    assert tiny.metrics() == ["fid", "sfid", "is"]


def test_metrics_are_named_short_or_long():
    assert parse_metrics("fid, pr ,is") == ["fid", "precision", "recall", "is"]
    assert parse_metrics("adm,kid,fid") == [*ADM, "kid"]
    assert parse_metrics("all") == ["all"]
    with pytest.raises(UserError, match="'fdi' is not known"):
        parse_metrics("fdi")
    with pytest.raises(UserError, match="names none"):
        parse_metrics(" , ")
    assert set(METRICS) <= set(SHOWN)


def test_the_published_weights_are_those_of_the_config():
    config = load_config(ROOT / "config.yaml")
    for extractor in config.extractors.values():
        if extractor.download is not None:
            assert config.downloads[extractor.download].dump() == PUBLISHED_WEIGHTS[extractor.kind]


# --- parts


class Noise:
    """Images of which a network sees the mean colour of each quarter."""

    path, size = "noise", (4, 4)

    def __init__(self, n):
        self.pixels = np.random.default_rng(3).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
        self.spans = []

    def __len__(self):
        return len(self.pixels)

    def read(self, start, stop):
        self.spans.append((start, stop))
        return self.pixels[start:stop]


def see(pixels):
    quarters = torch.from_numpy(pixels).float().unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean(dim=(2, 4))
    return {"pool": quarters.flatten(1), "spatial": quarters[:, 0].flatten(1)}


def test_rows_made_in_parts_are_those_made_at_once(tmp_path):
    images = Noise(5 * BATCH + 7)
    parts = Parts(tmp_path, len(images), 2 * BATCH)
    assert parts.missing() == [0, 2 * BATCH, 4 * BATCH]
    seen = []
    # Two processes, and the second is stopped after its first part.
    look(images, see, parts, [4 * BATCH], Rows, should_stop=lambda: False, advance=seen.append)
    look(images, see, parts, [0, 2 * BATCH], Rows, should_stop=lambda: True, advance=seen.append)
    assert parts.missing() == [2 * BATCH]
    look(images, see, parts, parts.missing(), Rows, should_stop=lambda: False, advance=seen.append)
    assert parts.missing() == []
    for name, whole in see(images.pixels).items():
        assert torch.equal(parts.rows(name), whole)
    assert {start % BATCH for start, _ in images.spans} == {0}
    assert len(np.unique(parts.rows("digests"))) == len(images)
    signed = images.pixels.view(np.int8).reshape(len(images), -1)
    assert np.array_equal(parts.rows("low"), signed.min(axis=1))
    assert np.array_equal(parts.rows("high"), signed.max(axis=1))
    parts._path(0).write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cannot be read .*: delete .* and run again"):
        parts.rows("pool")


def test_sums_made_in_parts_are_the_moments_of_all(tmp_path):
    images = Noise(13 * BATCH + 5)
    kept = np.array([0, 5, BATCH, 9 * BATCH + 3, len(images) - 1])
    parts = Parts(tmp_path, len(images), 9 * BATCH)
    look(
        images, see, parts, parts.missing(), lambda: Sums(["pool", "spatial"], "pool", kept),
        should_stop=lambda: False, advance=lambda n: None,
    )  # fmt: skip
    whole = see(images.pixels)
    for name in ("pool", "spatial"):
        mu, sigma, n = total_moments(parts, name)
        expected_mu, expected_sigma = moments(whole[name])
        assert n == len(images)
        torch.testing.assert_close(mu, expected_mu, rtol=1e-12, atol=0)
        torch.testing.assert_close(sigma, expected_sigma, rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.cat(list(parts.read("kept"))), whole["pool"][kept])
