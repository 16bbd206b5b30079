"""The representation autoencoder against the peer's own tokens, latents and reconstructions (golden/rae, stage1_*)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixflow.autoencoders import load_autoencoder
from mixflow.autoencoders import rae as module
from mixflow.autoencoders.quantise import quantise_unit
from mixflow.autoencoders.rae import Decoder
from mixflow.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "rae"
IO = load_file(GOLDEN / "stage1_io.safetensors")
DECODER = load_file(GOLDEN / "stage1_decoder_weights.safetensors")
STATISTICS = {"mean": IO["stat_mean"], "var": IO["stat_var"]}
SETTINGS = {
    "kind": "rae", "encoder_size": 56, "encoder_patch": 14, "decoder_heads": 4, "channels": 32, "downsampling": 4,
    "precision": "fp32",
}  # fmt: skip
CONFIG, WEIGHTS = "encoder/config.json", "encoder/model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files in the formats of the published ones."""
    folder = tmp_path_factory.mktemp("rae")
    shutil.copy(GOLDEN / "stage1_encoder_config.json", folder / "config.json")
    shutil.copy(GOLDEN / "stage1_encoder_weights.safetensors", folder / "model.safetensors")
    torch.save(DECODER, folder / "model.pt")
    torch.save(STATISTICS, folder / "stat.pt")
    return {
        CONFIG: folder / "config.json",
        WEIGHTS: folder / "model.safetensors",
        "decoder": folder / "model.pt",
        "statistics": folder / "stat.pt",
    }


@pytest.fixture(scope="module")
def codec(files):
    return load_autoencoder(SETTINGS, files)


@pytest.fixture(scope="module")
def only_variance(files, tmp_path_factory):
    """The shape of the published statistics, which have no mean."""
    path = tmp_path_factory.mktemp("statistics") / "stat.pt"
    torch.save({"mean": None, "var": IO["stat_var"]}, path)
    return load_autoencoder(SETTINGS, {**files, "statistics": path})


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 16, 16, 3), generator=torch.manual_seed(1)).to(torch.uint8)


def with_file(files, tmp_path, role, payload):
    path = tmp_path / f"{role}.pt"
    torch.save(payload, path)
    return {**files, role: path}


def near(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@torch.no_grad()
def test_tokens_and_latents_equal_the_peers(codec, only_variance):
    tokens = codec._tokens(IO["image64"])  # resized to 56, and its positions from 5 x 5 to 4 x 4
    near(tokens.flatten(2).transpose(1, 2), IO["encoder_tokens_64"])
    near(codec.latents(tokens), IO["latent_64"])
    same_size = codec._tokens(IO["image56"])
    near(codec.latents(same_size), IO["latent_56"])
    near(only_variance.latents(same_size), IO["latent_56_var_only"])


@torch.no_grad()
def test_reconstructions_equal_the_peers(codec, only_variance):
    near(codec._decoded(IO["z"]), IO["decoded_z"])
    near(only_variance._decoded(IO["z"]), IO["decoded_z_var_only"])
    near(codec._decoded(IO["latent_64"]), IO["recon_64"])
    std = torch.sqrt(IO["stat_var"] + 1e-5)
    tokens = (IO["z"] * std + IO["stat_mean"]).flatten(2).transpose(1, 2)
    near(codec._decoder.logits(tokens), IO["decoder_logits_z"])
    near(codec._decoder.logits(IO["lat9"]), IO["decoder_logits_lat9"])  # 3 x 3 tokens, resized inside


def test_what_is_stored_and_what_it_becomes(codec, images, monkeypatch):
    assert not codec.is_random
    assert not codec.mirrors
    stored = codec.encode(images)
    assert (stored.shape, stored.dtype) == ((5, 32, 4, 4), torch.float16)
    with torch.no_grad():
        tokens = codec._tokens((images.float() / 255).permute(0, 3, 1, 2).contiguous())
    # The last norm has no gain: float16 holds its output, and errs by half a unit in its eleventh binary place.
    assert tokens.abs().max() <= 32**0.5
    assert ((stored.float() - tokens).abs() <= 2**-11 * tokens.abs() + 2**-20).all()
    mean, std = IO["stat_mean"], torch.sqrt(IO["stat_var"] + 1e-5)
    latents = codec.latents(stored)
    assert latents.dtype == torch.float32
    near(latents, (stored.float() - mean) / std, 1e-6)
    near(codec.encode_latents(images), (tokens - mean) / std)
    assert torch.equal(stored, codec.encode(images)), "latents are made beside what is stored, not in its place"
    monkeypatch.setattr(module, "CHUNK_TOKENS", 2 * 16)
    assert [len(part) for part in codec._chunks(images)] == [2, 2, 1]
    near(codec.encode(images).float(), stored.float(), 2e-3)
    near(codec.encode_latents(images), (tokens - mean) / std)


def test_a_mirror_is_the_encoding_of_the_mirror_image(codec, files, images):
    both = load_autoencoder(SETTINGS, files, mirrors=True)
    assert both.mirrors
    stored = both.encode(images)
    assert stored.shape == (5, 2, 32, 4, 4)
    assert torch.equal(stored[:, 0], codec.encode(images))
    assert torch.equal(stored[:, 1], codec.encode(images.flip(2)))
    assert (stored[:, 0] - stored[:, 1].flip(-1)).abs().max() > 1e-1  # why both are stored


@pytest.mark.parametrize("to_uint8", ["round", "truncate"])
def test_decoded_levels(codec, to_uint8, monkeypatch):
    levels = 255 * IO["decoded_z"] + (to_uint8 == "round") / 2
    expected = levels.clamp(0, 255).floor().permute(0, 2, 3, 1)
    found = codec.decode(IO["z"], to_uint8)
    assert (found.shape, found.dtype) == ((2, 16, 16, 3), torch.uint8)
    assert (found.float() - expected).abs().max() <= 1  # a level at a rounding boundary
    assert (found.float() - expected).abs().mean() < 1e-2
    monkeypatch.setattr(module, "CHUNK_TOKENS", 16)
    assert (codec.decode(IO["z"], to_uint8).float() - found.float()).abs().max() <= 1


def test_levels_are_those_of_integer_arithmetic():
    k = np.arange(256)
    for numerator, denominator, truncated, rounded in (
        (k, 255, k, k),  # levels themselves: a round trip through [-1,1] would lose some
        (100 * k + 49, 25500, k, k),
        (100 * k + 51, 25500, k, np.minimum(k + 1, 255)),
        (-k - 1, 255, 0 * k, 0 * k),
        (k + 256, 255, 0 * k + 255, 0 * k + 255),
    ):
        images = torch.from_numpy((numerator / denominator).astype(np.float32)).reshape(1, 1, 16, 16)
        for to_uint8, expected in (("truncate", truncated), ("round", rounded)):
            found = quantise_unit(images, to_uint8)
            assert found.shape == (1, 16, 16, 3)
            assert (found.numpy() == expected.reshape(1, 16, 16, 1)).all()
    # As the peer's own line has it, on numbers of every kind.
    images = torch.rand(2, 3, 8, 8, generator=torch.manual_seed(0)) * 1.2 - 0.1
    peer = images.clamp(0, 1).mul(255).permute(0, 2, 3, 1).to(torch.uint8)
    assert torch.equal(quantise_unit(images, "truncate"), peer)


def test_precision_is_the_autoencoders_own(codec, files, images):
    stored, decoded = codec.encode(images), codec.decode(IO["z"])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(images), stored)
        assert torch.equal(codec.decode(IO["z"]), decoded)
    half = load_autoencoder({**SETTINGS, "precision": "bf16"}, files)
    found = half.encode(images)
    assert found.dtype == torch.float16
    assert half.encode_latents(images).dtype == torch.float32
    assert 0 < (found.float() - stored.float()).abs().mean() < 3e-2
    assert 0 < (half.decode(IO["z"]).float() - decoded.float()).abs().mean() < 3


def test_each_part_needs_its_own_files_only(files, images):
    encoder = load_autoencoder(SETTINGS, {name: files[name] for name in (CONFIG, WEIGHTS)})
    stored = encoder.encode(images)
    with pytest.raises(UserError, match="latents with its statistics only"):
        encoder.latents(stored)
    with pytest.raises(UserError, match="latents with its statistics only"):
        encoder.encode_latents(images)
    with pytest.raises(UserError, match="decodes with its decoder only"):
        encoder.decode(IO["z"])
    statistics = load_autoencoder(SETTINGS, {"statistics": files["statistics"]})
    assert statistics.latents(stored).shape == stored.shape
    with pytest.raises(UserError, match="encodes with its encoder only"):
        statistics.encode(images)


@pytest.fixture
def pretrained():
    """Small random networks as transformers saves them, and the peer's way to their tokens."""
    from transformers import SiglipConfig, ViTMAEConfig
    from transformers.models.siglip.modeling_siglip import SiglipModel
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining

    torch.manual_seed(3)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(sizes, image_size=40, patch_size=8)
    mae = ViTMAEForPreTraining(
        ViTMAEConfig(
            **vision, decoder_hidden_size=16, decoder_intermediate_size=16, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
        )
    ).eval()  # fmt: skip
    siglip = SiglipModel(SiglipConfig(text_config=dict(sizes, vocab_size=20), vision_config=vision)).eval()

    def without_gain(norm):
        norm.weight = norm.bias = None

    def mae_tokens(pixels):
        without_gain(mae.vit.layernorm)
        mae.vit.config.mask_ratio = 0.0
        noise = torch.arange(16.0).expand(len(pixels), -1)
        return mae.vit(pixels, noise=noise, interpolate_pos_encoding=True).last_hidden_state[:, 1:]

    def siglip_tokens(pixels):
        without_gain(siglip.vision_model.post_layernorm)
        return siglip.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state

    imagenet = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return {
        "vit_mae": (mae, mae_tokens, imagenet),
        "siglip": (siglip, siglip_tokens, (torch.full((3,), 0.5), torch.full((3,), 0.5))),
    }


@pytest.mark.parametrize("kind", ["vit_mae", "siglip"])
def test_other_encoders_are_entries(pretrained, kind, tmp_path):
    network, tokens_of, (mean, std) = pretrained[kind]
    network.save_pretrained(tmp_path)
    codec = load_autoencoder(
        {**SETTINGS, "encoder_size": 32, "encoder_patch": 8, "encoder_kind": kind, "downsampling": 8},
        {CONFIG: tmp_path / "config.json", WEIGHTS: tmp_path / "model.safetensors"},
    )
    images = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.manual_seed(1)).to(torch.uint8)
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        expected = tokens_of(pixels)  # positions from 5 x 5 to 4 x 4
    near(codec.encode(images).float().flatten(2).transpose(1, 2), expected, 2e-3)
    # The decoder's output is in the encoder's normalisation.
    near(codec._pixel_mean.flatten(), mean, 0)
    near(codec._pixel_std.flatten(), std, 0)


def test_training_checkpoints_half_precision_and_computed_positions(codec, files, tmp_path):
    """What the peer's first stage and its extract_decoder.py write."""
    z = IO["z"]
    expected = codec._decoded(z)
    ours = codec._decoder.state_dict()
    assert ours.keys() == DECODER.keys()
    fresh = Decoder(width=48, depth=2, num_heads=4, mlp_width=80, num_channels=32, grid=4, patch_size=4)
    near(fresh.decoder_pos_embed, DECODER["decoder_pos_embed"], 1e-6)
    without = {name: tensor for name, tensor in DECODER.items() if name != "decoder_pos_embed"}
    near(load_autoencoder(SETTINGS, with_file(files, tmp_path, "decoder", without))._decoded(z), expected)
    inner = {f"decoder.{name}": tensor for name, tensor in DECODER.items()} | {"encoder.x": torch.zeros(1)}
    wrapped = {
        "step": 3,
        "model": {"decoder.x": torch.zeros(1)},
        "ema": {f"_orig_mod.{n}": t for n, t in inner.items()},
    }
    near(load_autoencoder(SETTINGS, with_file(files, tmp_path, "decoder", wrapped))._decoded(z), expected, 0)
    halves = {name: tensor.bfloat16() for name, tensor in DECODER.items()}
    found = load_autoencoder(SETTINGS, with_file(files, tmp_path, "decoder", halves))
    assert {tensor.dtype for tensor in found._decoder.state_dict().values()} == {torch.float32}
    assert 0 < (found._decoded(z) - expected).abs().max() < 0.2
    save_file(DECODER, tmp_path / "model.safetensors")  # of convert-weights
    assert torch.equal(
        load_autoencoder(SETTINGS, {**files, "decoder": tmp_path / "model.safetensors"})._decoded(z), expected
    )


@pytest.mark.parametrize(
    ("width", "depth", "heads", "mlp_width", "millions"),
    [(768, 12, 12, 3072, 86.4), (1024, 24, 16, 4096, 304.2), (1152, 28, 16, 4096, 415.4)],  # ViTB, ViTL, ViTXL
)
def test_published_decoders_have_their_number_of_weights(width, depth, heads, mlp_width, millions):
    with torch.device("meta"):
        decoder = Decoder(
            width=width, depth=depth, num_heads=heads, mlp_width=mlp_width, num_channels=768, grid=16, patch_size=16
        )
        assert decoder(torch.zeros(1, 256, 768)).shape == (1, 3, 256, 256)
    assert sum(tensor.numel() for tensor in decoder.state_dict().values()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("decoder_norm.bias"), r"\(missing 'decoder_norm.bias'\): download it again"),
        (lambda w: w.update(odd=torch.zeros(1)), r"\(unexpected 'odd'\)"),
        (lambda w: w.update({"decoder_norm.bias": torch.zeros(3)}), r"\(mismatched 'decoder_norm.bias'\)"),
        (
            lambda w: [w.pop(name) for name in list(w) if ".1." in name and ".key." in name],
            r"missing '.*key.weight', '.*key.bias'",
        ),
        (lambda w: w.pop("decoder_embed.weight"), "holds no decoder of RAE"),
        (lambda w: w.update({"decoder_pred.weight": torch.zeros(3 * 64, 48)}), "patches of 8 pixels .* downsampling"),
        (lambda w: w.update({"decoder_embed.weight": torch.zeros(48, 8)}), "tokens of 8 channels where .* 32"),
        (lambda w: w.update({"decoder_pos_embed": torch.zeros(1, 65, 48)}), "for 64 tokens where latents have 4 x 4"),
        (lambda w: w.update({"step": 3}), "holds no flat state dict"),
    ],
)
def test_decoders_that_do_not_fit_are_told(files, tmp_path, change, sentence):
    weights = dict(DECODER)
    change(weights)
    with pytest.raises(UserError, match=sentence):
        load_autoencoder(SETTINGS, with_file(files, tmp_path, "decoder", weights))


def test_unreadable_files_are_told(files, tmp_path):
    with pytest.raises(UserError, match="48 wide, which 5 heads do not divide: correct decoder_heads"):
        load_autoencoder({**SETTINGS, "decoder_heads": 5}, files)
    broken = tmp_path / "decoder.pt"
    broken.write_bytes(b"not a network")
    with pytest.raises(UserError, match="truncated or is not a torch file: download or make it again"):
        load_autoencoder(SETTINGS, {**files, "decoder": broken})
    broken.write_bytes(files["decoder"].read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated or is not a torch file: download or make it again"):
        load_autoencoder(SETTINGS, {**files, "decoder": broken})
    with pytest.raises(UserError, match="does not exist"):
        load_autoencoder(SETTINGS, {**files, "decoder": tmp_path / "nowhere.pt"})
    torch.save({"decoder_embed.weight": Path("x")}, broken)
    with pytest.raises(UserError, match=r"loaded safely.*may run code: .*convert-weights .*decoder.pt --trust --out"):
        load_autoencoder(SETTINGS, {**files, "decoder": broken})


@pytest.mark.parametrize(
    ("statistics", "sentence"),
    [
        ({"mean": None, "var": torch.ones(32, 8, 8)}, r"var of shape \(32, 8, 8\) where .* are \(32, 4, 4\): name"),
        ({"mean": torch.zeros(16, 4, 4), "var": None}, r"mean of shape \(16, 4, 4\) where .* \(32, 4, 4\)"),
        ({"mean": None, "var": torch.full((32, 4, 4), -1.0)}, "negative variances: download them again"),
        ({"mean": torch.full((32, 4, 4), torch.nan), "var": None}, "not finite"),
        ({"mu": torch.ones(32, 4, 4)}, "hold neither mean nor var: name the peer's stat.pt"),
        (torch.ones(32, 4, 4), "hold neither mean nor var"),
    ],
)  # fmt: skip
def test_statistics_of_something_else_are_told(files, tmp_path, statistics, sentence):
    with pytest.raises(UserError, match=sentence):
        load_autoencoder(SETTINGS, with_file(files, tmp_path, "statistics", statistics))


def test_statistics_without_a_variance(files, tmp_path):
    codec = load_autoencoder(SETTINGS, with_file(files, tmp_path, "statistics", {"mean": IO["stat_mean"], "var": None}))
    stored = torch.zeros(1, 32, 4, 4, dtype=torch.float16)
    near(codec.latents(stored)[0], -IO["stat_mean"] / (1 + 1e-5) ** 0.5)


def encoder_files(folder, weights, **config):
    config = {**json.loads((GOLDEN / "stage1_encoder_config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return {CONFIG: folder / "config.json", WEIGHTS: folder / "model.safetensors"}


def test_encoders_that_do_not_fit_are_told(files, tmp_path, images, capfd):
    weights = load_file(GOLDEN / "stage1_encoder_weights.safetensors")
    unused = ("layernorm.weight", "layernorm.bias", "embeddings.mask_token")
    needed = {name: tensor for name, tensor in weights.items() if name not in unused}
    found = load_autoencoder(SETTINGS, encoder_files(tmp_path, needed)).encode(images)
    assert torch.equal(found, load_autoencoder(SETTINGS, files).encode(images))
    norm = "encoder.layer.1.norm1.bias"
    for changed, sentence in (
        ({n: t for n, t in weights.items() if n != norm}, rf"config.json \(missing '{norm}'\): download it again"),
        ({**weights, "pooler.weight": torch.zeros(1)}, r"\(unexpected 'pooler.weight'\)"),
        ({**weights, norm: torch.zeros(3)}, rf"\(mismatched '{norm}'\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_autoencoder(SETTINGS, encoder_files(tmp_path, changed))
    with pytest.raises(UserError, match="not finite in fp32: fetch its files again"):
        load_autoencoder(SETTINGS, encoder_files(tmp_path, {**weights, norm: torch.full((32,), torch.nan)})).encode(
            images
        )
    for settings, sentence in (
        ({"encoder_patch": 7}, "patches of 14 pixels and 32 channels where its entry says 7 and 32: correct encoder_p"),
        ({"channels": 48}, "and 32 channels where its entry says 14 and 48"),
        ({"encoder_kind": "siglip"}, "of the kind 'dinov2_with_registers' where its entry says 'siglip'"),
        ({"encoder_kind": "mae"}, "encoder_kind 'mae' is not known; did you mean 'vit_mae'"),
        ({"encoder_size": 60}, "encoder_size 60 is no multiple of encoder_patch 14"),
        ({"precision": "fp8"}, "precision 'fp8' is not known"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            load_autoencoder({**SETTINGS, **settings}, {name: files[name] for name in (CONFIG, WEIGHTS)})
    with pytest.raises(UserError, match=r"no config.json among model.safetensors"):
        load_autoencoder(SETTINGS, {WEIGHTS: files[WEIGHTS]})
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read"):
        load_autoencoder(SETTINGS, {CONFIG: tmp_path / "config.json"})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model.safetensors"):
        load_autoencoder(SETTINGS, {CONFIG: tmp_path / "config.json"})
    with pytest.raises(UserError, match=r"takes images of 16 x 16 pixels .* not 32 x 16"):
        load_autoencoder(SETTINGS, files).encode(images.repeat(1, 1, 2, 1))
    assert "Loading weights" not in capfd.readouterr().err


@pytest.mark.slow
def test_compiled_networks_give_the_same(codec, files, images):
    compiled = load_autoencoder(SETTINGS, files)
    compiled.compile()
    near(compiled.encode_latents(images), codec.encode_latents(images))
    assert (compiled.decode(IO["z"]).float() - codec.decode(IO["z"]).float()).abs().max() <= 1
