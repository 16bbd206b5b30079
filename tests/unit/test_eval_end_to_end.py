"""From pixels to the five numbers, against what OpenAI's evaluator said of the same small network and images.

tests/golden/eval_end_to_end tells where the numbers come from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow.evaluation import Inception, frechet_distance_to, inception_score, moments, precision_recall

GOLDEN = Path(__file__).parents[1] / "golden" / "eval_end_to_end"
METRICS = ("is", "fid", "sfid", "precision", "recall")
SIZES = (64, 320)  # pixels: the network sees 299, so one is enlarged and the other one shrunk


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "evaluator.npz"))


@pytest.fixture(scope="module")
def network():
    weights = np.load(GOLDEN / "weights.npz")
    return Inception({name: torch.from_numpy(weights[name].astype(np.float32)) for name in weights.files})


def images(golden, size, kind):
    """Patches of one colour each, plus a texture, modulo 256."""
    patches = golden[f"{size}__{kind}"]
    repeats = size // patches.shape[1]
    return patches.repeat(repeats, axis=1).repeat(repeats, axis=2) + golden[f"{size}__texture"]


def features(network, pixels):
    parts = [network(batch) for batch in np.array_split(pixels, max(1, len(pixels) // 32))]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("size", SIZES)
def test_features_are_the_evaluators(network, golden, size):
    pool, spatial, _ = network(images(golden, size, "samples")[:2])
    for ours, name in ((pool, "pool"), (spatial, "spatial")):
        theirs = golden[f"{size}__{name}"]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * theirs.max())


@pytest.mark.parametrize("size", SIZES)
def test_the_five_numbers_are_the_evaluators(network, golden, size):
    real, fake = (features(network, images(golden, size, kind)) for kind in ("real", "samples"))
    theirs = dict(zip(METRICS, golden[f"{size}__metrics"].tolist(), strict=True))
    assert inception_score(fake[2]) == pytest.approx(theirs["is"], rel=1e-5)
    # The evaluator takes the root of a singular product and the difference of float32 means.
    assert frechet_distance_to(*moments(real[0]), fake[0]) == pytest.approx(theirs["fid"], rel=1e-4)
    assert frechet_distance_to(*moments(real[1]), fake[1]) == pytest.approx(theirs["sfid"], rel=1e-5)
    precision, recall = precision_recall(real[0], fake[0], k=3, mode="adm")
    # Two images of each set, which the rounding of features may tip.
    assert precision == pytest.approx(theirs["precision"], abs=2.01 / len(fake[0]))
    assert recall == pytest.approx(theirs["recall"], abs=2.01 / len(real[0]))
