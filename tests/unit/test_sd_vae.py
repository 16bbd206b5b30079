"""The SD VAE against diffusers' own encode and decode, on a tiny network of the same kind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixflow.autoencoders import load_autoencoder
from mixflow.autoencoders import sd_vae as module
from mixflow.runtime.errors import UserError

SETTINGS = {"kind": "sd_vae", "scale": 0.18215, "channels": 4, "downsampling": 8, "precision": "fp32"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
POSTERIOR = load_file(Path(__file__).parents[1] / "golden" / "autoencoder" / "posterior.safetensors")


def tiny_vae():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def folder(vae, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return path


def files_of(folder):
    return {name: folder / name for name in ("config.json", WEIGHTS)}


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 32, 32, 3), generator=torch.manual_seed(1)).to(torch.uint8)


def test_posterior_of_both_mirrors_equals_diffusers(folder, vae, images):
    codec = load_autoencoder(SETTINGS, files_of(folder))
    assert codec.mirrors
    assert codec.is_random
    stored = codec.encode(images)
    assert (stored.shape, stored.dtype) == ((3, 2, 8, 4, 4), torch.float16)
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(3, 4, 4, 4)
    for mirror, seen in enumerate((pixels, pixels.flip(-1))):
        posterior = vae.encode(seen).latent_dist
        mean, log_variance = stored[:, mirror].float().chunk(2, dim=1)
        torch.testing.assert_close(mean, posterior.mean, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(log_variance, posterior.logvar, atol=1e-3, rtol=1e-3)
        expected = (posterior.mean + posterior.std * noise) * 0.18215
        found = codec.latents(stored[:, mirror], noise)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(codec.latents(stored[:, mirror], None), posterior.mean * 0.18215, atol=1e-3, rtol=0)
    assert (stored[:, 0] - stored[:, 1].flip(-1)).abs().max() > 1e-2  # why both are stored


def test_latents_equal_the_peers_and_need_no_files():
    """golden posterior: REPA stores mean and standard deviation where we store mean and log-variance."""
    mean, std = POSTERIOR["moments"].chunk(2, dim=1)
    codec = load_autoencoder(SETTINGS)
    stored = torch.cat([mean, 2 * std.log()], dim=1)
    torch.testing.assert_close(codec.latents(stored, POSTERIOR["noise"]), POSTERIOR["z"], atol=1e-6, rtol=1e-6)
    # In float16, as the cache keeps it: far below the noise of the posterior itself.
    halves = codec.latents(stored.half(), POSTERIOR["noise"])
    assert (halves - POSTERIOR["z"]).abs().max() < 2e-3
    with pytest.raises(UserError, match=r"sd_vae .* with its files only"):
        codec.decode(mean, "round")


@pytest.mark.parametrize("to_uint8", ["round", "truncate"])
def test_decode_equals_diffusers_in_chunks(folder, vae, to_uint8, monkeypatch):
    latents = 0.5 * torch.randn(3, 4, 4, 4, generator=torch.manual_seed(2))
    decoded = vae.decode(latents / 0.18215).sample
    levels = 127.5 * decoded + 128 if to_uint8 == "round" else 255 * (decoded + 1) / 2
    expected = levels.clamp(0, 255).floor().permute(0, 2, 3, 1)
    monkeypatch.setattr(module, "CHUNK_PIXELS", 2 * 32 * 32)
    found = load_autoencoder(SETTINGS, files_of(folder)).decode(latents, to_uint8)
    assert (found.shape, found.dtype) == ((3, 32, 32, 3), torch.uint8)
    assert (found.float() - expected).abs().max() <= 1  # a level at a rounding boundary
    assert (found.float() - expected).abs().mean() < 1e-3


def test_caller_in_bf16_does_not_change_a_float32_decoder(folder):
    codec = load_autoencoder(SETTINGS, files_of(folder))
    latents = torch.randn(2, 4, 4, 4)
    alone = codec.decode(latents)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.decode(latents), alone)
    half = load_autoencoder({**SETTINGS, "precision": "bf16"}, files_of(folder)).decode(latents)
    assert 0 < (half.float() - alone.float()).abs().mean() < 3


def test_files_of_2022_with_old_attention_names_are_read(folder, vae, images, tmp_path):
    weights = load_file(folder / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in weights.items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        renamed[name] = value
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = load_autoencoder(SETTINGS, files_of(tmp_path)).encode(images)
    assert torch.equal(found, load_autoencoder(SETTINGS, files_of(folder)).encode(images))


def test_values_that_the_cache_cannot_hold_are_refused(folder, images, tmp_path):
    weights = load_file(folder / WEIGHTS)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({**weights, "quant_conv.bias": torch.full((8,), 7e4)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"gave a value of 7\d,\d{3}, but the cache keeps float16.*65,504"):
        load_autoencoder(SETTINGS, files_of(tmp_path)).encode(images)
    save_file({**weights, "quant_conv.bias": torch.full((8,), float("nan"))}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="values that are not finite in fp32: fetch its files again"):
        load_autoencoder(SETTINGS, files_of(tmp_path)).encode(images)
    # A log-variance beyond any meaning is clamped, as by diffusers, rather than refused.
    bias = torch.cat([torch.zeros(4), torch.full((4,), 7e4)])
    save_file({**weights, "quant_conv.bias": bias}, tmp_path / WEIGHTS)
    assert load_autoencoder(SETTINGS, files_of(tmp_path)).encode(images)[:, :, 4:].max() == 20


def test_wrong_and_incomplete_folders_are_told(folder, tmp_path):
    with pytest.raises(UserError, match=rf"no config.json among {WEIGHTS}: add it to its files"):
        load_autoencoder(SETTINGS, {WEIGHTS: folder / WEIGHTS})
    with pytest.raises(UserError, match=f"lacks config.json and {WEIGHTS}"):
        load_autoencoder(SETTINGS, files_of(tmp_path))
    with pytest.raises(UserError, match="has 4 channels and downsampling 8 where its entry says 16 and 8"):
        load_autoencoder({**SETTINGS, "channels": 16}, files_of(folder))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in weights.items() if name != "quant_conv.bias"}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"do not fit its config.json .*'quant_conv.bias'"):
        load_autoencoder(SETTINGS, files_of(tmp_path))
    (tmp_path / WEIGHTS).write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read"):
        load_autoencoder(SETTINGS, files_of(tmp_path))
    with pytest.raises(UserError, match="precision 'fp8' is not known"):
        load_autoencoder({**SETTINGS, "precision": "fp8"}, files_of(folder))
    with pytest.raises(UserError, match="kind 'sd_vea' is not known; did you mean 'sd_vae'"):
        load_autoencoder({**SETTINGS, "kind": "sd_vea"}, files_of(folder))
