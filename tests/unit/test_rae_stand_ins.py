"""The rehearsal's stand-ins for RAE: they are what they claim, and load by the way the real files do."""

import json
import re

import pytest
import torch

from mixflow.autoencoders import load_autoencoder
from mixflow.models import build_model, load_model
from mixflow.runtime.downloads import download
from mixflow.runtime.errors import UserError
from mixflow.stages.import_weights import import_weights
from mixflow.stages.inspect import describe
from mixflow.stages.networks import autoencoder_files, network_from_file
from mixflow.stages.stand_ins import make_stand_ins

# Of 64 pixels: 4x4 latents of 32 channels.
AUTOENCODER = {
    "kind": "rae", "encoder_size": 56, "encoder_patch": 14, "decoder_heads": 2, "channels": 32, "downsampling": 16,
    "precision": "fp32",
}  # fmt: skip
MODEL = {
    "family": "rae", "hidden_size": [48, 64], "depth": [2, 1], "num_heads": [4, 4], "label_dropout": 0.1,
    "input_size": 4, "in_channels": 32, "num_classes": 3,
}  # fmt: skip


def make(folder, seed=0, **autoencoders):
    """Make the stand-ins of an autoencoder of every kind of file, and of two networks; returns the list of hashes."""
    small = {"encoder": f"{folder}/encoder", "decoder": f"{folder}/decoder/model.pt", "statistics": f"{folder}/stat.pt"}
    settings = {
        "folder": str(folder),
        "seed": seed,
        "rae": {"small": {**small, **AUTOENCODER, "size": 4}, **autoencoders},
        "networks": {f"{folder}/main/stage2_model.pt": MODEL, f"{folder}/guide/stage2_model.pt": MODEL},
        **{name: {} for name in ("images", "autoencoders", "encoders", "extractors", "references")},
    }
    make_stand_ins(settings, folder.with_suffix(".json"))
    return json.loads(folder.with_suffix(".json").read_text())


def records(folder):
    """Record the parts of the autoencoder as `mixflow download` does, by role."""
    parts = {
        "encoder": ("encoder", ["config.json", "model.safetensors"]),
        "decoder": ("decoder", ["model.pt"]),
        "statistics": ("", ["stat.pt"]),
    }
    return {
        role: download(role, {"folder": str(folder / place), "files": files}, out=folder.parent / f"{role}.json")
        for role, (place, files) in parts.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rae") / "stand-ins"
    large = {"encoder": f"{path}/encoder", "statistics": f"{path}/stat8.pt", **AUTOENCODER, "encoder_size": 112}
    make(path, large={**large, "size": 8})
    return path


def test_from_pixels_to_latents_and_back(folder):
    codec = load_autoencoder(AUTOENCODER, autoencoder_files(records(folder)), mirrors=True)
    images = torch.randint(0, 256, (3, 64, 64, 3), generator=torch.manual_seed(1)).to(torch.uint8)
    stored = codec.encode(images)
    assert (stored.shape, stored.dtype) == ((3, 2, 32, 4, 4), torch.float16)
    latents = codec.encode_latents(images)
    torch.testing.assert_close(codec.latents(stored[:, 0], None), latents, atol=5e-3, rtol=0)
    torch.testing.assert_close(
        codec.latents(stored[:, 1], None), codec.encode_latents(images.flip(2)), atol=5e-3, rtol=0
    )
    decoded = codec.decode(latents, "truncate")
    assert (decoded.shape, decoded.dtype) == ((3, 64, 64, 3), torch.uint8)
    # Whatever goes in, something of it comes out.
    assert latents.std(dim=0).mean() > 0.1
    assert decoded.float().std(dim=0).mean() > 1
    assert decoded.float().std(dim=(1, 2)).mean() > 5


def test_statistics_are_as_the_released_ones_and_scale_every_position(folder):
    held = torch.load(folder / "stat.pt", weights_only=True)
    assert held["mean"] is None
    assert (held["var"].shape, held["var"].dtype) == ((32, 4, 4), torch.float32)
    files = autoencoder_files({"statistics": records(folder)["statistics"]})
    stored = torch.ones(1, 32, 4, 4, dtype=torch.float16)
    latents = load_autoencoder(AUTOENCODER, files).latents(stored, None)
    torch.testing.assert_close(latents[0], 1 / (held["var"] + 1e-5).sqrt())


def test_an_encoder_that_entries_share_serves_the_largest(folder):
    config = json.loads((folder / "encoder/config.json").read_text())
    assert config["model_type"] == "dinov2_with_registers"
    assert config["image_size"] == 126  # more than 112, so that both resize positions
    large = {**AUTOENCODER, "encoder_size": 112}
    statistics = download("s", {"folder": str(folder), "files": ["stat8.pt"]}, out=folder.parent / "s.json")
    files = autoencoder_files({"encoder": records(folder)["encoder"], "statistics": statistics})
    images = torch.zeros(1, 128, 128, 3, dtype=torch.uint8)
    assert load_autoencoder(large, files).encode_latents(images).shape == (1, 32, 8, 8)


@pytest.mark.parametrize(("name", "keys"), [("main", None), ("guide", {"step", "epoch", "model", "ema"})])
def test_networks_come_flat_and_as_training_checkpoints(folder, name, keys):
    path = folder / name / "stage2_model.pt"
    held = torch.load(path, weights_only=True)
    assert keys is None or keys < set(held)
    assert keys is not None or held["t_embedder.W"].std() > 0.5
    network = load_model("rae", path, num_heads=MODEL["num_heads"])
    assert {"family": "rae", **network.options}.items() >= MODEL.items()
    x = torch.randn(2, 32, 4, 4, generator=torch.manual_seed(0))
    velocity = network(x, torch.tensor([0.2, 0.9]), torch.tensor([0, 3]))
    assert velocity.std() > 0.01


def test_a_network_becomes_a_checkpoint_where_its_entry_says_what_it_is(folder, tmp_path):
    out, file = tmp_path / "out/model.safetensors", folder / "guide/stage2_model.pt"

    def take_in(**changes):
        settings = {"checkpoint": "guide", "weights": {"file": str(file), "model": MODEL | changes}}
        import_weights(settings, file=file, out=out)

    take_in()
    assert load_model("rae", out).options == load_model("rae", file).options
    for change, sentence in (
        ({"input_size": 16}, "made for latents of 4x4 (their pos_embed says so) but the entry's latents are 16x16"),
        ({"in_channels": 768}, "have in_channels 32 but the entry says 768"),
        ({"hidden_size": [48, 96]}, "have hidden_size [48, 64] but the entry says [48, 96]"),
        ({"depth": [1, 2]}, "have depth [2, 1] but the entry says [1, 2]"),
        ({"num_classes": 1000}, "have num_classes 3 but the entry says 1000"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            take_in(**change)


def test_the_entry_says_where_a_trunk_ends_that_is_as_wide_as_the_head(folder, tmp_path):
    model = MODEL | {"hidden_size": [48, 48], "depth": [1, 2]}
    network = build_model("rae", **{key: value for key, value in model.items() if key != "family"})
    torch.save(network.state_dict(), tmp_path / "stage2_model.pt")
    found = network_from_file(model, tmp_path / "stage2_model.pt")
    assert found.options == network.options
    x, t, y = torch.randn(2, 32, 4, 4), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(found(x, t, y), network.eval()(x, t, y))


def test_equal_seeds_give_equal_files(tmp_path):
    first, again, other = (make(tmp_path / "stand-ins", seed) for seed in (0, 0, 1))
    assert first == again
    assert len(first) == 6
    assert [path for path in first if first[path] == other[path]] == [f"{tmp_path}/stand-ins/encoder/config.json"]


def test_inspect_tells_the_parts_apart(folder):
    assert describe(folder / "stat.pt")["kind"] == "latent statistics"
    assert describe(folder / "stat.pt")["shapes"] == {"mean": None, "var": [32, 4, 4]}
    decoder = describe(folder / "decoder/model.pt")
    found = {name: decoder[name] for name in ("channels", "width", "mlp_width", "layers", "patch_size", "grid")}
    assert found == {"channels": 32, "width": 32, "mlp_width": 40, "layers": 2, "patch_size": 16, "grid": 4}
    network = describe(folder / "main/stage2_model.pt")
    assert (network["kind"], network["family"], network["hidden_size"]) == ("weights", "rae", [48, 64])


def test_a_part_that_no_autoencoder_has_is_told(folder):
    with pytest.raises(UserError, match="'encodr' is no part of an autoencoder; did you mean 'encoder'"):
        autoencoder_files({"encodr": records(folder)["encoder"]})
