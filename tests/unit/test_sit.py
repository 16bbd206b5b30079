"""SiT against numbers that its authors' code produced (tests/golden/sit), and against its own definition."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm.layers
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import Attention
from torch.nn import functional as F

from mixflow.config import SIT_SIZES
from mixflow.models import SiT, build_model, load_model, sit_options
from mixflow.models.sit import sincos_positions, timestep_features
from mixflow.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "sit"
HEADS = {"a": 4, "b": 3}
TINY = dict(
    input_size=8, in_channels=4, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10, learn_sigma=True
)


def golden(model):
    net = load_model("sit", GOLDEN / f"model_{model}.safetensors", num_heads=HEADS[model])
    return net, load_file(GOLDEN / f"forward_{model}.safetensors")


def tiny(**changes):
    """A network whose output is not zero: every weight random."""
    torch.manual_seed(0)
    net = SiT(**(TINY | changes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    return net


def inputs(n=3, size=8, channels=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, size, size, generator=generator)
    return x, torch.rand(n, generator=generator), torch.randint(10, (n,), generator=generator)


# The peer's float64 runs have float32 features of t, whose last digit depends on the CPU.
FLOAT64 = 5e-7


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", ["a", "b"])
@torch.no_grad()
def test_output_is_the_peers(model):
    net, g = golden(model)
    close(net(g["x"], g["t"], g["y"]), g["out"], 1e-5)
    close(net.double()(g["x"].double(), g["t"], g["y"]), g["out.f64"], FLOAT64)


@pytest.mark.parametrize("model", ["a", "b"])
@torch.no_grad()
def test_intermediates_are_the_peers(model):
    net, g = golden(model)
    seen = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
    net(g["x"], g["t"], g["y"])
    names = [name.removeprefix("act.") for name in g if name.startswith("act.") and name != "act.final_layer"]
    assert len(names) == 3 + 4 * net.options["depth"]
    for name in names:
        close(seen[name], g[f"act.{name}"], 4e-5)
    # The peer computes the discarded half of the head too.
    head_channels = net.final_layer.head_channels
    peer_tokens = g["act.final_layer"].unflatten(-1, (-1, head_channels))
    close(seen["final_layer"], peer_tokens[..., :4].flatten(-2), 1e-5)
    close(net.unpatchify(g["act.final_layer"]), g["unpatchify_full"], 0)
    close(g["unpatchify_full"][:, :4], g["out"], 0)


@pytest.mark.parametrize("model", ["a", "b"])
@torch.no_grad()
def test_timestep_embedding_is_the_peers(model):
    net, g = golden(model)
    close(timestep_features(g["temb.t"]), g["temb.freq256"], 1e-7)
    close(net.t_embedder(g["temb.t"]), g["temb.out"], 1e-5)


def test_timestep_features_are_float32_whatever_the_weights():
    t = torch.rand(4, dtype=torch.float64)
    assert timestep_features(t).dtype == torch.float32
    assert torch.equal(timestep_features(t), timestep_features(t.float()))
    net = tiny().bfloat16()
    x, t, y = inputs()
    assert net(x.bfloat16(), t, y).dtype == torch.bfloat16


@pytest.mark.parametrize("model", ["a", "b"])
@pytest.mark.parametrize("scale", ["1.0", "1.5", "4.0"])
@torch.no_grad()
def test_guidance_on_a_doubled_batch_is_the_peers(model, scale):
    net, g = golden(model)
    for dtype, key, tolerance in [(torch.float32, "out", 1e-5), (torch.float64, "out.f64", FLOAT64)]:
        net.to(dtype)
        x, t = g["x"].to(dtype), g["t"]
        null = torch.full_like(g["y"], net.null_label)
        both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([g["y"], null]))
        conditional, unconditional = both.chunk(2)
        guided = (unconditional + float(scale) * (conditional - unconditional))[
            :, :3
        ]  # the peer leaves channel 3 alone
        expected = torch.cat([torch.cat([guided, half[:, 3:]], dim=1) for half in (conditional, unconditional)])
        close(expected, g[f"cfg{scale}.{key}"], tolerance * float(scale) * 2)


@pytest.mark.parametrize("model", ["a", "b"])
@torch.no_grad()
def test_train_mode_with_given_label_dropout_is_the_peers(model):
    net, g = golden(model)
    net.train()
    drop = g["train.u"] < 0.1
    assert drop.any()
    assert not drop.all()
    assert torch.equal(net.drop_labels(g["train.y"], drop), g["train.y_effective"])
    close(net(g["train.x"], g["train.t"], g["train.y"], drop), g["train.out"], 1e-5)
    nothing = torch.zeros_like(drop)
    close(net(g["train.x"], g["train.t"], g["train.y_effective"], nothing), g["train.out"], 1e-5)


def test_four_optimiser_steps_are_the_peers():
    net = load_model("sit", GOLDEN / "model_a.safetensors", num_heads=4).train()
    g = load_file(GOLDEN / "train_a.safetensors")
    discarded = net.state_dict()["final_layer.linear.weight"].unflatten(0, (4, 8))[:, 4:].clone()
    ema = copy.deepcopy(net)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    for step in range(4):
        x1, x0, t, y, u = (g[f"step{step}.{name}"] for name in ("x1", "x0", "t", "y", "u"))
        t_ = t[:, None, None, None]
        loss = (net(t_ * x1 + (1 - t_) * x0, t, y, u < 0.1) - (x1 - x0)).square().mean(dim=(1, 2, 3))
        close(loss, g[f"step{step}.loss"], 5e-6)
        optimizer.zero_grad()
        loss.mean().backward()
        if step == 0:
            check_first_gradients(net, g)
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), net.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
    # Adam's first steps are lr * sign(gradient): a gradient of rounding size can move a weight by a part of 4e-4.
    for module, kind, tolerance in [(net, "model", 2e-6), (ema, "ema", 1e-8)]:
        state = module.state_dict()
        names = [name for name in g if name.startswith(f"final.{kind}.")]
        assert len(names) >= 11
        for name in names:
            close(state[name.removeprefix(f"final.{kind}.")], g[name], tolerance)
    after = net.state_dict()["final_layer.linear.weight"].unflatten(0, (4, 8))[:, 4:]
    assert torch.equal(after, discarded)


def check_first_gradients(net, g):
    """Compare with the peer's; the label table's are kept as the rows that are not zero."""
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.requires_grad}
    table = gradients.pop("y_embedder.embedding_table.weight")
    prefix = "step0.grad."
    rows = g[f"{prefix}y_embedder.embedding_table.weight.rows"]
    close(table[rows], g[f"{prefix}y_embedder.embedding_table.weight.values"], 1e-7)
    assert set(table.abs().sum(1).nonzero().flatten().tolist()) == set(rows.tolist())
    kept = {
        name.removeprefix(prefix) for name in g if name.startswith(prefix) and not name.endswith(("rows", "values"))
    }
    assert gradients.keys() == kept
    for name, gradient in gradients.items():
        close(gradient, g[prefix + name], 2e-7)
    assert net.pos_embed.grad is None


@pytest.mark.parametrize("name", ["S/2", "B/2", "B/4", "L/2", "XL/2", "XL/8"])
def test_published_sizes_have_the_peers_keys_and_parameter_counts(name):
    peer = json.loads((GOLDEN / "state_dict_keys.json").read_text())[f"SiT-{name}"]
    with torch.device("meta"):
        net = SiT(**sit_options(name), input_size=32, in_channels=4, num_classes=1000, learn_sigma=True)
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == peer["keys"]
    assert sum(p.numel() for p in net.parameters()) == peer["n_params"]
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == peer["n_trainable"]


def test_size_names():
    assert sit_options("XL/2") == {**SIT_SIZES["XL"], "patch_size": 2}
    with pytest.raises(UserError, match=r"'XL2' is not a SiT size; did you mean 'XL/2'\?"):
        sit_options("XL2")


def test_position_table_is_the_peers():
    table = load_file(GOLDEN / "model_a.safetensors")["pos_embed"]
    close(sincos_positions(4, 64), table, 1e-7)
    assert torch.equal(SiT(**TINY).pos_embed, sincos_positions(4, 32))


def test_initial_output_is_exactly_zero_and_the_head_learns_first():
    torch.manual_seed(0)
    net = build_model("sit", **TINY).train()
    x, t, y = inputs()
    out = net(x, t, y)
    assert torch.equal(out, torch.zeros_like(x))
    (out - x).square().mean().backward()
    assert net.final_layer.linear.weight.grad.abs().max() > 0


def test_initial_weights_have_the_peers_spread():
    torch.manual_seed(0)
    net = build_model("sit", **(TINY | {"hidden_size": 128, "num_heads": 4, "num_classes": 1000}))
    state = net.state_dict()
    normal = ["t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"]
    xavier = [f"blocks.1.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    for name in normal:
        assert state[name].std().item() == pytest.approx(0.02, rel=0.03)
    for name in [*xavier, "x_embedder.proj.weight"]:
        weight = state[name].flatten(1)
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.99 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    drawn = {*normal, *xavier, "x_embedder.proj.weight", "pos_embed"}
    for name, weight in state.items():
        if name not in drawn and not name.startswith("blocks.0"):
            assert weight.abs().max() == 0, name


def test_gradients_reach_every_weight_but_the_frozen_positions():
    net = tiny().train()
    x, t, y = inputs()
    net(x, t, y).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (name == "pos_embed"), name
        if name != "pos_embed":
            assert parameter.grad.abs().max() > 0, name
    head = net.final_layer.linear.weight.grad.unflatten(0, (4, 8))
    assert head[:, :4].abs().amax(dim=2).min() > 0
    assert head[:, 4:].abs().max() == 0


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_velocity_rows_equal_the_first_half_of_the_full_head(learn_sigma):
    net = tiny(learn_sigma=learn_sigma).eval()
    x, t, y = inputs()
    normed = {}
    net.final_layer.norm_final.register_forward_hook(lambda _m, _i, output: normed.update(x=output))
    out = net(x, t, y)
    c = net.t_embedder(t) + net.y_embedder(y)
    shift, scale = net.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
    full = net.unpatchify(F.linear(normed["x"] * (1 + scale) + shift, *net.final_layer.linear.parameters()))
    assert full.shape[1] == (8 if learn_sigma else 4)
    close(out, full[:, :4], 1e-6)


def test_scalar_time_is_embedded_once_and_means_the_same_for_all():
    net = tiny().eval()
    x, _, y = inputs()
    rows = []
    net.t_embedder.register_forward_hook(lambda _m, _i, output: rows.append(len(output)))
    t = torch.tensor(0.3)
    close(net(x, t, y), net(x, t.expand(3), y), 1e-6)
    assert rows == [1, 3]


@pytest.mark.parametrize(("input_size", "patch_size", "channels"), [(4, 2, 4), (6, 1, 3), (12, 4, 4), (64, 8, 1)])
def test_any_square_input_size(input_size, patch_size, channels):
    net = tiny(input_size=input_size, patch_size=patch_size, in_channels=channels).eval()
    x, t, y = inputs(2, input_size, channels)
    out = net(x, t, y)
    assert out.shape == x.shape
    # Cutting into patches by hand (token = its patch, channel fastest) and putting together again changes nothing.
    pixels = torch.arange(x.numel()).reshape(x.shape).float()
    p, h = patch_size, input_size // patch_size
    tokens = pixels.reshape(2, channels, h, p, h, p).permute(0, 2, 4, 3, 5, 1).reshape(2, h * h, -1)
    assert torch.equal(net.unpatchify(tokens), pixels)


def test_label_dropout_is_random_in_train_mode_only():
    net = tiny(label_dropout=0.1)
    y = torch.randint(10, (20_000,))
    torch.manual_seed(3)
    dropped = net.train().drop_labels(y, None) == net.null_label
    assert net.null_label == 10
    # Five standard deviations of a binomial fraction are 0.0106.
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.0106)
    assert torch.equal(net.eval().drop_labels(y, None), y)
    mask = torch.arange(len(y)) % 2 == 0
    assert torch.equal(net.drop_labels(y, mask) == 10, mask)


def test_without_label_dropout_there_is_no_null_class():
    net = tiny(label_dropout=0.0).train()
    assert net.null_label is None
    assert net.state_dict()["y_embedder.embedding_table.weight"].shape == (10, 32)
    x, t, y = inputs()
    assert torch.equal(net(x, t, y), net(x, t, y))


def test_attention_is_fused_whatever_timm_is_told(monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    timm.layers.set_fused_attn(False)
    try:
        assert not Attention(32).fused_attn
        net = tiny().eval()
    finally:
        timm.layers.set_fused_attn(True)
    net(*inputs())
    assert len(calls) == 2


def test_autocast_stays_close_to_float32():
    net = tiny().eval()
    x, t, y = inputs()
    exact = net(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(x, t, y)
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.03
