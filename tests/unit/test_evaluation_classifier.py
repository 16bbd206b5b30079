"""The feature network: deterministic, good enough at digits, and byte-identical files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from mixflow.evaluation import Classifier, class_accuracy, load_classifier, save_classifier, train_classifier
from mixflow.evaluation.classifier import _shifted
from mixflow.runtime.errors import UserError

SETTINGS = {"width": 16, "num_features": 24, "batch_size": 64, "learning_rate": 1e-2, "seed": 3, "num_classes": 10}


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(small, (16, 16), mode="bilinear").round().byte().permute(0, 2, 3, 1)
    return images, torch.tensor(data.target)


def test_it_learns_digits(digits):
    images, labels = digits
    held_out = torch.arange(len(images)) % 5 == 0
    classifier = train_classifier(images[~held_out], labels[~held_out], num_steps=200, **SETTINGS)
    features, logits = classifier.features_and_logits(images[held_out])
    assert features.shape == (360, 24)
    assert features.dtype == torch.float32
    assert logits.shape == (360, 10)
    assert class_accuracy(logits, labels[held_out]) > 0.9


def test_the_seed_decides_and_the_global_random_state_stays(digits, tmp_path):
    images, labels = digits
    state = torch.random.get_rng_state()
    first = train_classifier(images, labels, num_steps=3, **SETTINGS)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(7)
    second = train_classifier(images, labels, num_steps=3, **SETTINGS)
    other = train_classifier(images, labels, num_steps=3, **SETTINGS | {"seed": 4})
    for name, classifier in (("first", first), ("second", second), ("other", other)):
        save_classifier(tmp_path / name, classifier)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert (tmp_path / "first").read_bytes() != (tmp_path / "other").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"first", "second", "other"}  # no temporary name is left


def test_a_file_brings_the_same_network_back(digits, tmp_path):
    images, labels = digits
    trained = train_classifier(images, labels, num_steps=2, **SETTINGS)
    save_classifier(tmp_path / "classifier.safetensors", trained)
    loaded = load_classifier(tmp_path / "classifier.safetensors")
    assert not loaded.training
    for before, after in zip(
        trained.features_and_logits(images[:5]), loaded.features_and_logits(images[:5]), strict=True
    ):
        assert torch.equal(before, after)


def test_grey_is_grey_however_it_is_stored(digits):
    images, labels = digits
    threefold = images.expand(-1, -1, -1, 3)
    grey = train_classifier(images, labels, num_steps=2, **SETTINGS)
    assert grey.settings["in_channels"] == 1
    as_colour = train_classifier(threefold, labels, num_steps=2, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(grey.parameters(), as_colour.parameters(), strict=True))
    expected = grey.features_and_logits(images[:9])[0]
    torch.testing.assert_close(grey.features_and_logits(threefold[:9])[0], expected, rtol=0, atol=1e-6)
    colour = Classifier(3, 10, width=4, num_features=8)
    torch.testing.assert_close(
        colour.features_and_logits(images[:9]), colour.features_and_logits(threefold[:9]), rtol=0, atol=1e-6
    )
    tinted = threefold.clone()
    tinted[0, 0, 0, 0] = 200
    assert train_classifier(tinted, labels, num_steps=0, **SETTINGS).settings["in_channels"] == 3


def test_shifts_move_whole_images_by_up_to_two_pixels():
    images = torch.arange(100, dtype=torch.uint8).view(1, 10, 10, 1).repeat(200, 1, 1, 1)
    shifted = _shifted(images, torch.Generator().manual_seed(0))
    offsets = set()
    for image in shifted:
        row, column = divmod(int(image[5, 5, 0]), 10)
        offsets.add((row - 5, column - 5))
        assert torch.equal(image[4:6, 4:6, 0], images[0, row - 1 : row + 1, column - 1 : column + 1, 0])
    assert offsets == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_bad_input_is_named(digits, tmp_path):
    images, labels = digits
    with pytest.raises(UserError, match="must be uint8"):
        train_classifier(images.float(), labels, num_steps=1, **SETTINGS)
    with pytest.raises(UserError, match="as many labels"):
        train_classifier(images, labels[:5], num_steps=1, **SETTINGS)
    with pytest.raises(UserError, match="reach from 0 to 9 where num_classes = 7"):
        train_classifier(images, labels, num_steps=1, **SETTINGS | {"num_classes": 7})
    with pytest.raises(UserError, match="does not exist"):
        load_classifier(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(UserError, match="cannot be read"):
        load_classifier(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no classifier written by mixflow"):
        load_classifier(tmp_path / "other.safetensors")
