"""REPA against numbers that its authors' code produced (tests/golden/repa), and against its own definition."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from mixflow.flow import INTERPOLANTS
from mixflow.models import REPA, SiT, build_model, check_projectors, load_model, sit_options
from mixflow.runtime.errors import UserError
from mixflow.sampling import DIFFUSIONS
from mixflow.training.alignment import aligned_flow_matching_loss, alignment_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "repa"
TOLD = {"a": dict(num_heads=4, encoder_depth=2), "b": dict(num_heads=3, encoder_depth=3)}  # what shapes cannot tell
PATHS = {"linear": INTERPOLANTS["linear"], "cosine": INTERPOLANTS["gvp"]}  # the peer's names
TINY = dict(
    input_size=8,
    in_channels=4,
    patch_size=2,
    hidden_size=32,
    depth=3,
    num_heads=2,
    num_classes=10,
    label_dropout=0.1,
    encoder_depth=2,
    z_dims=[24, 16],
    projector_dim=40,
    qk_norm=False,
)
FLOAT64 = 3e-7  # the features of t are float32 in the peer's float64 runs too, and their last digit depends on the CPU


def golden(model):
    net = load_model("repa", GOLDEN / f"model_{model}.safetensors", **TOLD[model])
    return net, load_file(GOLDEN / f"forward_{model}.safetensors")


def tiny(**changes):
    """A network whose output is not zero: every weight random."""
    torch.manual_seed(0)
    net = REPA(**(TINY | changes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    return net


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    return x, torch.rand(n, generator=generator), torch.randint(10, (n,), generator=generator)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", ["a", "b"])
@torch.no_grad()
def test_velocity_and_projections_are_the_peers(model):
    net, g = golden(model)
    for dtype, suffix, tolerance in [(torch.float32, "", 1e-5), (torch.float64, ".f64", FLOAT64)]:
        net.to(dtype)
        velocity, projections = net(g["x"].to(dtype), 1 - g["t"].to(dtype), g["y"], with_projections=True)
        close(velocity, -g[f"out{suffix}"], tolerance)
        assert len(projections) == sum(name.startswith("zs.") for name in g) / 2
        for number, projection in enumerate(projections):
            close(projection, g[f"zs.{number}{suffix}"], tolerance)


@pytest.mark.parametrize("model", ["a", "b"])
@torch.no_grad()
def test_intermediates_are_the_peers(model):
    net, g = golden(model)
    seen = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
    net(g["x"], 1 - g["t"], g["y"])
    names = [name.removeprefix("act.") for name in g if name.startswith("act.")]
    assert len(names) == 4 + 4 * net.options["depth"]
    for name in names:
        close(seen[name], g[f"act.{name}"], 4e-5)


@pytest.mark.parametrize("model", ["a", "b"])
@torch.no_grad()
def test_train_mode_with_given_label_dropout_is_the_peers(model):
    net, g = golden(model)
    net.train()
    drop = g["train.u"] < 0.1
    assert drop.any()
    assert not drop.all()
    assert torch.equal(net.drop_labels(g["train.y"], drop), g["train.y_effective"])
    close(net(g["train.x"], 1 - g["train.t"], g["train.y"], drop), -g["train.out"], 1e-5)


@pytest.mark.parametrize("law", ["uniform", "lognormal"])
@pytest.mark.parametrize("path", PATHS)
def test_losses_and_gradients_are_the_peers(path, law):
    net = load_model("repa", GOLDEN / "model_b.safetensors", **TOLD["b"])
    g = load_file(GOLDEN / "loss_b.safetensors")
    g |= {name: g[f"{path}.{law}.{name}"] for name in ("t", "noise", "denoising_loss", "proj_loss", "total")}
    targets = [g["z_target.0"], g["z_target.1"]]
    t = 1 - g["t"]

    def loss(coefficient):
        return aligned_flow_matching_loss(
            lambda x, t: net(x, t, g["y"], with_projections=True),
            *(g["noise"], g["images"], t, t, PATHS[path], targets, coefficient),
        )

    total = loss(0.5).mean()
    close(loss(0.0), g["denoising_loss"], 1e-5)
    close((loss(1.0) - loss(0.0)).mean(), g["proj_loss"][0], 1e-5)
    close(total, g["total"][0], 1e-5)
    if (path, law) != ("linear", "uniform"):
        return
    total.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if name != "pos_embed"}
    table = gradients.pop("y_embedder.embedding_table.weight")
    close(table[g["y"]], g["grad.y_embedder.rows"], 1e-5)
    assert set(table.abs().sum(1).nonzero().flatten().tolist()) == set(g["y"].tolist())
    assert gradients.keys() == {name.removeprefix("grad.") for name in g if name.startswith("grad.")} - {
        "y_embedder.rows"
    }
    for name, gradient in gradients.items():
        close(gradient, g[f"grad.{name}"], 1e-5)
    assert net.pos_embed.grad is None


def test_four_optimiser_steps_are_the_peers():
    net = load_model("repa", GOLDEN / "model_a.safetensors", **TOLD["a"]).train()
    g = load_file(GOLDEN / "train_a.safetensors")
    ema = copy.deepcopy(net)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, fused=True)
    for step in range(4):
        names = ("images", "noise", "y", "u", "z_target", "denoising_loss", "proj_loss", "total", "grad_norm")
        images, noise, y, u, target, denoising_loss, proj_loss, total, grad_norm = (
            g[f"step{step}.{name}"] for name in names
        )
        t = 1 - g[f"step{step}.t"]
        x = PATHS["linear"].interpolate(noise, images, t)
        velocity, projections = net(x, t, y, drop=u < 0.1, with_projections=True)
        denoising = (velocity - (images - noise)).square().mean(dim=(1, 2, 3))
        alignment = alignment_loss(projections, [target])
        close(denoising, denoising_loss, 5e-6)
        close(alignment.mean(), proj_loss[0], 2e-6)
        loss = (denoising + 0.5 * alignment).mean()
        close(loss, total[0], 2e-6)
        optimizer.zero_grad()
        (40 * loss if step == 2 else loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        close(norm, grad_norm[0], 1e-5 * grad_norm.item())
        assert norm > 1 or step != 2
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), net.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
    # Adam's first steps are lr * sign(gradient): a gradient of rounding size can move a weight by a part of 4e-4.
    for module, kind, tolerance in [(net, "model", 2e-6), (ema, "ema", 1e-8)]:
        state = module.state_dict()
        names = [name for name in g if name.startswith(f"final.{kind}.")]
        assert len(names) >= 25
        for name in names:
            close(state[name.removeprefix(f"final.{kind}.")], g[name], tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_score_and_diffusion_are_the_peers(path):
    g = load_file(GOLDEN / "functions.safetensors")
    t = 1 - g["t"]
    close(PATHS[path].score(-g["v"], g["x"], t), g[f"score.{path}"], 1e-12 * g[f"score.{path}"].abs().max().item())
    # The peer's dx = ... + sqrt(diffusion) dW is 2 w(t) here, with SiT's w = sigma of the linear path, on both paths.
    close(2 * DIFFUSIONS["linear"](PATHS[path], t, 1.0), g["diffusion"], 1e-12)


@pytest.mark.parametrize("name", ["B/2", "L/2", "XL/2"])
def test_published_sizes_have_the_peers_keys_and_parameter_counts(name):
    peer = json.loads((GOLDEN / "state_dict_keys.json").read_text())[f"SiT-{name}"]
    with torch.device("meta"):
        net = REPA(**sit_options(name), input_size=32, in_channels=4, num_classes=1000, encoder_depth=8, z_dims=[768])
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == peer["keys"]
    assert sum(p.numel() for p in net.parameters()) == peer["n_params"]
    assert sum(p.numel() for p in net.projectors.parameters()) == peer["projector_params"]


def test_initial_weights_are_those_of_sit_and_xavier_projectors():
    net = build_model("repa", **(TINY | {"hidden_size": 128, "projector_dim": 256, "qk_norm": True}))
    x, t, y = inputs()
    velocity, projections = net(x, t, y, with_projections=True)
    assert velocity.abs().max() == 0
    assert all(projection.std() > 0 for projection in projections)
    for name, weight in net.projectors.state_dict().items():
        if name.endswith("bias"):
            assert weight.abs().max() == 0
        else:
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.99 * bound < weight.abs().max().item() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    for name, weight in net.state_dict().items():
        if "_norm." in name:
            assert torch.equal(weight, torch.full((64,), 1.0 if name.endswith("weight") else 0.0))
    assert not net.pos_embed.requires_grad


def test_the_aligned_block_is_counted_from_one_and_projections_do_not_change_the_velocity():
    for encoder_depth in (1, 2, 3):
        net = tiny(encoder_depth=encoder_depth).eval()
        tokens = {}
        for number, block in enumerate(net.blocks, start=1):
            block.register_forward_hook(lambda _m, _i, output, n=number, seen=tokens: seen.update({n: output}))
        velocity, projections = net(*inputs(), with_projections=True)
        assert [list(projection.shape) for projection in projections] == [[3, 16, 24], [3, 16, 16]]
        for projector, projection in zip(net.projectors, projections, strict=True):
            assert torch.equal(projector(tokens[encoder_depth]), projection)
        assert torch.equal(net(*inputs()), velocity)


def test_sampling_never_computes_projections():
    net = tiny().eval()
    for projector in net.projectors:
        projector.register_forward_hook(lambda *_: pytest.fail("a projector was called"))
    net(*inputs())
    stripped = tiny(z_dims=[]).eval()
    assert not any(name.startswith("projectors") for name in stripped.state_dict())
    stripped.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("projectors")})
    assert torch.equal(stripped(*inputs()), net(*inputs()))


def test_paper_time_is_sit_time_turned_around():
    net = tiny(z_dims=[]).eval()
    options = {name: net.options[name] for name in net.options if name in SiT(**sit_like()).options}
    sit = SiT(**options, learn_sigma=False).eval()
    sit.load_state_dict(net.state_dict())
    x, t, y = inputs()
    close(net(x, t, y), -sit(x, 1 - t, y), 0)
    scalar = torch.tensor(0.3)
    close(net(x, scalar, y), net(x, scalar.expand(3), y), 1e-6)


def sit_like():
    return {n: TINY[n] for n in TINY if n not in ("encoder_depth", "z_dims", "projector_dim", "qk_norm")} | {
        "learn_sigma": False
    }


def test_qk_norm_normalises_each_head_by_shared_affine_weights():
    net = tiny(qk_norm=True).eval()
    attention = net.blocks[0].attn
    assert [list(attention.q_norm.weight.shape), attention.q_norm.eps] == [[16], 1e-5]
    x = torch.randn(2, 16, 32)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # [B,heads,N,16]

    def normed(x, norm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    scores = normed(q, attention.q_norm) @ normed(k, attention.k_norm).mT / 4
    close(attention(x), attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), 1e-5)
    names = [name for name in net.state_dict() if "_norm." in name]
    assert len(names) == 3 * 4
    assert {name.split("attn.")[1] for name in names} == {f"{n}_norm.{w}" for n in "qk" for w in ("weight", "bias")}


def test_gradients_reach_every_weight_but_the_frozen_positions():
    net = tiny(qk_norm=True).train()
    x, t, y = inputs()
    velocity, projections = net(x, t, y, with_projections=True)
    (velocity.square().mean() + sum(projection.square().mean() for projection in projections)).backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (name == "pos_embed"), name
        if name != "pos_embed":
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast_stays_close_to_float32(qk_norm):
    net = tiny(qk_norm=qk_norm).eval()
    exact, exact_projections = net(*inputs(), with_projections=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, projections = net(*inputs(), with_projections=True)
    for a, b in zip([rounded, *projections], [exact, *exact_projections], strict=True):
        assert ((a - b).norm() / b.norm()).item() < 0.03


def test_compiles_in_one_piece():
    net = tiny().eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    velocity, projections = compiled(*inputs(), with_projections=True)
    assert len(projections) == 2
    close(velocity, net(*inputs()), 1e-6)
    close(compiled(*inputs()), velocity, 1e-6)


@pytest.mark.parametrize("aligned", [True, False])
def test_distributed_data_parallel_takes_both_ways_of_training(tmp_path, aligned):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net = tiny().train()
        net.projectors.requires_grad_(aligned)
        wrapped = DistributedDataParallel(net)
        for _ in range(2):  # a weight left out of the first step is refused in the second
            out = wrapped(*inputs(), drop=torch.zeros(3, dtype=torch.bool), with_projections=aligned)
            velocity, projections = out if aligned else (out, [])
            sum(x.square().mean() for x in [velocity, *projections]).backward()
        assert (net.projectors[0][0].weight.grad is not None) == aligned
    finally:
        distributed.destroy_process_group()


def test_what_users_get_told_who_want_to_align():
    check_projectors(tiny(), (24, 16), "'x'")
    with pytest.raises(UserError, match=r"'x' has no projectors .*train it without align"):
        check_projectors(tiny(z_dims=[]), [24], "'x'")
    with pytest.raises(UserError, match=r"'x' has projectors to \[24, 16\] features where the encoders have \[768\]"):
        check_projectors(tiny(), [768], "'x'")
    with pytest.raises(UserError, match=r"'x' is a SiT, which has no projectors to align: use the family 'repa'"):
        check_projectors(SiT(**sit_like()), [24], "'x'")
    with pytest.raises(UserError, match="encoder_depth 4 is not one of the blocks 1 to 3"):
        build_model("repa", **(TINY | {"encoder_depth": 4}))
    with pytest.raises(UserError, match="needs the option 'z_dims'"):
        build_model("repa", **{name: value for name, value in TINY.items() if name != "z_dims"})
