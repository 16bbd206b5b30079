"""DINOv2 as target encoder, against timm's own numbers, and as extractor of FD-DINOv2, against its authors' code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from mixflow.models.dinov2 import load_dinov2, load_dinov2_class
from mixflow.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "repa"
GOLDEN_CLASS = Path(__file__).parents[1] / "golden" / "dinov2_class" / "class_features.safetensors"
SIZES = dict(embed_dim=128, depth=2, num_heads=2)


def timm_network(name="vit_base_patch14_dinov2", pretraining_grid=6, **changes):
    """One of timm's own networks, but small, every weight random; the published ones have a grid of 37."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, img_size=14 * pretraining_grid, **(SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    return net


def metas_names(state, gated=False):
    """timm's names -> those of Meta's files."""
    names = {name: name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if gated else name for name in state}
    width = state["cls_token"].shape[-1]
    return {"mask_token": torch.zeros(1, width)} | {names[name]: tensor for name, tensor in state.items()}


def images(size=64, n=2):
    return torch.randint(256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def expected_tokens(net, pixels, grid):
    """Patch tokens by timm's own forward pass, from torchvision-style preprocessing."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    x = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    x = F.interpolate(x, (14 * grid, 14 * grid), mode="bicubic", align_corners=False, antialias=False)
    net.set_input_size(img_size=(14 * grid, 14 * grid))  # timm's own resampling of the positions
    with torch.no_grad():
        return net.forward_features(x)[:, 1:]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("gated", [False, True], ids=["base", "giant"])
@pytest.mark.parametrize("source", ["timm", "meta"])
@pytest.mark.parametrize("grid", [4, 6])
def test_patch_tokens_are_timms(tmp_path, source, gated, grid):
    net = timm_network("vit_giant_patch14_dinov2" if gated else "vit_base_patch14_dinov2")
    state = net.state_dict()
    assert gated == (state["blocks.0.mlp.fc2.weight"].shape[1] * 2 == len(state["blocks.0.mlp.fc1.weight"]))
    if source == "timm":
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file(state, path)
    else:
        path = tmp_path / "dinov2_pretrain.pth"
        torch.save(metas_names(state, gated), path)
    encoder = load_dinov2(path, grid)
    assert (encoder.width, encoder.grid) == (128, grid)
    tokens = encoder(images())
    assert tokens.shape == (2, grid * grid, 128)
    close(tokens, expected_tokens(net, images(), grid))


def test_channels_may_come_first_or_last(tmp_path):
    safetensors.torch.save_file(timm_network().state_dict(), tmp_path / "model.safetensors")
    encoder = load_dinov2(tmp_path / "model.safetensors", 4)
    assert torch.equal(encoder(images()), encoder(images().permute(0, 3, 1, 2)))


def test_the_encoder_is_frozen_and_keeps_no_graph(tmp_path):
    safetensors.torch.save_file(timm_network().state_dict(), tmp_path / "model.safetensors")
    encoder = load_dinov2(tmp_path / "model.safetensors", 4)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(images()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images())
    exact = encoder(images())
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.03


def test_positions_are_resampled_as_the_peer_does(tmp_path):
    state = timm_network(pretraining_grid=37).state_dict()
    torch.save(metas_names(state), tmp_path / "dinov2.pth")
    found = load_dinov2(tmp_path / "dinov2.pth", 16).vit.pos_embed
    assert torch.equal(found, resample_abs_pos_embed(state["pos_embed"], [16, 16]))
    assert torch.equal(found[:, 0], state["pos_embed"][:, 0])


def test_preprocessing_is_the_peers(tmp_path):
    g = load_file(GOLDEN / "preprocess.safetensors")
    row, column = torch.arange(256)[:, None], torch.arange(256)[None, :]
    channels = [(3 * row + 5 * column) % 256, (row * row // 64 + column) % 256, 7 * (row ^ column) % 256]
    image = torch.stack(channels, dim=-1)[None].to(torch.uint8)
    assert torch.equal(image[:, :8, :8].permute(0, 3, 1, 2), g["img.corner8"])
    safetensors.torch.save_file(timm_network().state_dict(), tmp_path / "model.safetensors")
    out = load_dinov2(tmp_path / "model.safetensors", 16).preprocess(image)
    assert out.shape == (1, 3, 224, 224)
    close(out[:, :, :32, :32], g["dinov2.corner"])
    close(out[:, :, ::8, ::8], g["dinov2.every8"])


@pytest.mark.parametrize(("size", "width", "heads"), [("small", 384, 6), ("base", 768, 12)])
def test_published_sizes_are_told_from_their_shapes(size, width, heads):
    state = timm.create_model(f"vit_{size}_patch14_dinov2", num_classes=0, img_size=14).state_dict()
    encoder = load_dinov2(state, 1)
    assert (encoder.width, encoder.vit.blocks[0].attn.num_heads, len(encoder.vit.blocks)) == (width, heads, 12)


def test_what_users_get_told(tmp_path):
    state = timm_network().state_dict()
    with pytest.raises(UserError, match=r"cannot be loaded as DINOv2, for 'patch_embed.proj.weight' is missing"):
        load_dinov2({"head.weight": torch.zeros(2)}, 4)
    with pytest.raises(UserError, match=r"for it has patches \[16, 16\] and width 128"):
        load_dinov2(state | {"patch_embed.proj.weight": torch.zeros(128, 3, 16, 16)}, 4)
    with pytest.raises(UserError, match=r"its positions \[1, 38, 128\] are not those of a square grid"):
        load_dinov2(state | {"pos_embed": torch.zeros(1, 38, 128)}, 4)
    with pytest.raises(UserError, match=r"holds a DINOv2 with registers, which is not supported"):
        load_dinov2(state | {"register_tokens": torch.zeros(1, 4, 128)}, 4)
    with pytest.raises(UserError, match=r"does not fit a DINOv2 of width 128 and depth 2 \(unexpected 'head.weight'\)"):
        load_dinov2(state | {"head.weight": torch.zeros(2)}, 4)
    del state["blocks.1.ls1.gamma"]
    with pytest.raises(UserError, match=r"missing 'blocks.1.ls1.gamma'.*seems to hold a vision transformer"):
        load_dinov2(state, 4)
    with pytest.raises(UserError, match=r"absent.pth' does not exist"):
        load_dinov2(tmp_path / "absent.pth", 4)


# --- the class token, for FD-DINOv2 ---


# timm's arguments for the networks of the golden file; Meta rounds the gated MLP's 682 hidden features up to 688.
GOLDEN_NETWORKS = {
    "mlp": {"name": "vit_base_patch14_dinov2"},
    "gated": {"name": "vit_giant_patch14_dinov2", "mlp_ratio": 688 / 128},
}


def golden_weights(net):
    """Weights by the rule in the golden README, under Meta's key names."""
    state = timm_network(pretraining_grid=37, **GOLDEN_NETWORKS[net]).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in metas_names(state, gated=net == "gated").items()}
    generator = np.random.PCG64({"mlp": 0, "gated": 1}[net])
    weights = {}
    for name in sorted(shapes):
        uniform = (generator.random_raw(int(np.prod(shapes[name]))) >> 11) * 2.0**-53
        one = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma"))
        weights[name] = torch.from_numpy((0.4 * uniform - 0.2 + one).reshape(shapes[name]).astype(np.float32))
    return weights


def golden_images(height, width, n=3):
    k, r, c = np.ogrid[:n, :height, :width]
    channels = [3 * r + 5 * c + 11 * k, r * r // 64 + c + 60 * k, (7 + k) * (r ^ c)]
    return (np.stack(np.broadcast_arrays(*channels), axis=-1) % 256).astype(np.uint8)


@pytest.fixture(scope="module")
def golden_class():
    return load_file(GOLDEN_CLASS)


@pytest.fixture(scope="module", params=["mlp", "gated"])
def golden_network(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "dinov2_pretrain.pth"
    torch.save(golden_weights(request.param), path)
    return request.param, path


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (64, 64), (96, 160)], ids=str)
def test_class_features_are_those_of_its_authors(golden_class, golden_network, size):
    net, path = golden_network
    see = load_dinov2_class(path)
    assert (see.num_features, see.device) == (128, torch.device("cpu"))
    features = see(golden_images(*size))
    assert features.dtype == torch.float32
    close(features, golden_class[f"{net}.{size[0]}x{size[1]}"])
    assert torch.equal(features, see(torch.from_numpy(golden_images(*size))))


def test_class_features_are_timms_but_for_the_positions(golden_network):
    net, path = golden_network
    weights = golden_weights(net)
    see = load_dinov2_class(path)
    x = golden_images(224, 224)  # nothing to resize
    peer = timm_network(pretraining_grid=16, **GOLDEN_NETWORKS[net])
    state = {name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): w for name, w in weights.items()}
    del state["mask_token"]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    inputs = ((torch.from_numpy(x) / 255 - mean) / std).permute(0, 3, 1, 2)
    rules = {
        "positions of timm": resample_abs_pos_embed(weights["pos_embed"], [16, 16]),
        "positions of Meta": see._encoder.vit.pos_embed,
    }
    found = {}
    for label, positions in rules.items():
        peer.load_state_dict(state | {"pos_embed": positions})
        with torch.no_grad():
            found[label] = (peer(inputs) - see(x)).abs().max().item()
    assert found["positions of Meta"] < 1e-5
    assert found["positions of timm"] > 0.02  # what following the wrong rule would cost


def test_positions_and_inputs_are_those_of_the_authors(golden_class, golden_network):
    net, path = golden_network
    see = load_dinov2_class(path)
    close(see._encoder.vit.pos_embed.data[..., :4], golden_class[f"{net}.positions"], 1e-6)
    for height, width in [(256, 256), (512, 512), (64, 64), (96, 160)]:
        resized = see._resized(golden_images(height, width))
        assert (resized.shape, resized.dtype) == ((3, 224, 224, 3), torch.uint8)
        fed = see._encoder.normalise(resized.permute(0, 3, 1, 2))[1]
        assert torch.equal(fed[:, :24, :24], golden_class[f"input.{height}x{width}.corner"])
        assert torch.equal(fed[:, ::16, ::16], golden_class[f"input.{height}x{width}.every16"])


def test_class_features_of_timms_file_of_any_pretraining_grid(tmp_path):
    for grid in (16, 37):
        state = timm_network(pretraining_grid=grid).state_dict()
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        torch.save(metas_names(state), tmp_path / "dinov2.pth")
        timms, metas = (load_dinov2_class(tmp_path / name) for name in ("model.safetensors", "dinov2.pth"))
        assert torch.equal(timms(images()), metas(images()))
        if grid == 16:  # nothing to resample
            assert torch.equal(timms._encoder.vit.pos_embed, state["pos_embed"])


def test_class_features_keep_nothing_else_alive(tmp_path):
    safetensors.torch.save_file(timm_network().state_dict(), tmp_path / "model.safetensors")
    features = load_dinov2_class(tmp_path / "model.safetensors")(images())
    assert features.untyped_storage().nbytes() == features.nbytes
    assert not features.requires_grad


def test_class_features_are_without_tf32_and_leave_the_switches_alone(tmp_path):
    def switches():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    safetensors.torch.save_file(timm_network().state_dict(), tmp_path / "model.safetensors")
    see = load_dinov2_class(tmp_path / "model.safetensors")
    during = []
    see._encoder.vit.norm.register_forward_hook(lambda *_: during.append(switches()))
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        see(images())
        assert during == [("ieee", "ieee")]
        assert switches() == ("tf32", "tf32")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_class_features_refuse_registers(tmp_path):
    state = timm_network().state_dict()
    with pytest.raises(UserError, match=r"holds a DINOv2 with registers, which is not supported: give one without"):
        load_dinov2_class(state | {"register_tokens": torch.zeros(1, 4, 128)})
    with pytest.raises(UserError, match=r"absent.pth' does not exist"):
        load_dinov2_class(tmp_path / "absent.pth")
