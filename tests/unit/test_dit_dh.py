"""DiT-DH against numbers that RAE's own code produced (tests/golden/rae), and against its own definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from mixflow.flow import Linear, flow_matching_loss, time_pair
from mixflow.models import DiTDH, build_model, load_model
from mixflow.training import Recipe, train

GOLDEN = Path(__file__).parents[1] / "golden" / "rae"
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())
VARIANTS = json.loads((GOLDEN / "variants.json").read_text())
SIZES = {
    "DiTDH-XL": dict(hidden_size=[1152, 2048], depth=[28, 2], num_heads=[16, 16]),
    "DiTDH-B": dict(hidden_size=[768, 2048], depth=[12, 2], num_heads=[12, 16]),
    "DiTDH-S": dict(hidden_size=[384, 2048], depth=[12, 2], num_heads=[6, 16]),
}
TINY = dict(input_size=4, in_channels=3, hidden_size=[24, 40], depth=[2, 2], num_heads=[2, 2], num_classes=10)
FROZEN = {"pos_embed", "t_embedder.W"}
SHIFT = math.sqrt(48)  # of 256 pixels: 16 x 16 x 768 against 4096


def golden(model="main"):
    return load_model("rae", GOLDEN / f"weights_{model}_hot.safetensors"), load_file(GOLDEN / "forward.safetensors")


def tiny(**changes):
    """A network whose output is not zero: every weight random."""
    torch.manual_seed(0)
    net = DiTDH(**(TINY | changes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 4, 4, generator=generator)
    return x, torch.rand(n, generator=generator), torch.randint(10, (n,), generator=generator)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Equal to the peer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["main", "guide"])
@torch.no_grad()
def test_velocity_is_the_peers(model):
    net, g = golden(model)
    close(net(g["x"], 1 - g["t"], g["y"]), -g[f"out_{model}_hot"], 2e-5)
    peer = CONFIGS[model]
    assert net.options == {
        "label_dropout": peer["class_dropout_prob"],
        "swiglu": peer["use_swiglu"],
        "rms_norm": peer["use_rmsnorm"],
        "qk_norm": peer["use_qknorm"],
        "pos_embed": peer["use_pos_embed"],
    } | {name: peer[name] for name in ("input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")}


@torch.no_grad()
def test_intermediates_are_the_peers():
    net, g = golden()
    seen = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _m, given, output, name=name: seen.update({name: (given, output)}))
    net(g["x"], 1 - g["t"], g["y"])
    outputs = {
        "t_emb": "t_embedder",
        "y_emb": "y_embedder",
        "s_embed": "s_embedder",
        "x_embed": "x_embedder",
        "s_proj": "s_projector",
        "block0_attn": "blocks.0.attn",
        "block3_attn": "blocks.3.attn",
        "final": "final_layer",
        **{f"block{number}": f"blocks.{number}" for number in range(5)},
    }
    for peer, ours in outputs.items():
        close(seen[ours][1], g[f"internal_{peer}"], 2e-5)
    close(seen["s_projector"][0][0], g["internal_s_before_proj"], 2e-5)
    # Our blocks are handed the conditions after the SiLU that the peer's blocks begin with.
    close(seen["blocks.0"][0][1][:, 0], torch.nn.functional.silu(g["internal_c"]), 2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants_are_the_peers(variant):
    """Query and key norms, plain MLPs, LayerNorms, no projector, no positions, no null class: told by the shapes."""
    g, peer = load_file(GOLDEN / "variants.safetensors"), VARIANTS[variant]
    start = f"{variant}/weights/"
    untold = {"depth": peer["depth"]} if variant == "equal_widths" else {}
    untold |= {"label_dropout": 0} if "no_null" in variant else {}
    net = load_model("rae", {name.removeprefix(start): g[name] for name in g if name.startswith(start)}, **untold)
    close(net(g["x"], 1 - g["t"], g["y"]), -g[f"{variant}/out"], 2e-5)
    for ours, theirs in (
        ("swiglu", "use_swiglu"),
        ("rms_norm", "use_rmsnorm"),
        ("qk_norm", "use_qknorm"),
        ("pos_embed", "use_pos_embed"),
    ):
        assert net.options[ours] == peer.get(theirs, CONFIGS["main"][theirs])
    for option in ("input_size", "hidden_size", "depth", "num_heads", "num_classes"):
        assert net.options[option] == peer[option]


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_peers_keys_and_parameter_counts(name):
    peer = json.loads((GOLDEN / "state_dict_keys.json").read_text())[name]
    with torch.device("meta"):
        net = build_model("rae", **SIZES[name], input_size=16, in_channels=768, num_classes=1000)
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == peer["keys"]
    assert sum(parameter.numel() for parameter in net.parameters()) == peer["n_params"]
    assert sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad) == peer["n_trained"]
    published = {"DiTDH-XL": (838_675_796, 838_380_628), "DiTDH-B": (294_295_892,), "DiTDH-S": (196_455_764,)}[name]
    assert (peer["n_params"], peer["n_trained"])[: len(published)] == published


def test_rotary_tables_are_the_peers():
    for model in ("main", "guide"):
        options = {name: CONFIGS[model][name] for name in TINY}
        fresh, peer = DiTDH(**options).state_dict(), load_file(GOLDEN / f"weights_{model}_hot.safetensors")
        names = [name for name in peer if "rope" in name]
        assert len(names) == 4
        for name in names:
            close(fresh[name], peer[name], 1e-6)


# Equal to the peer's training ----------------------------------------------------------------------------------------


def loss_of(net, g, noise, t, m):
    """Losses [6] of the golden data in paper time."""
    keep = torch.zeros(6, dtype=torch.bool)
    return flow_matching_loss(lambda x, t: net(x, t, g["y"], drop=keep), noise, g["x1"], t, m, Linear())


@torch.no_grad()
def test_losses_are_the_peers():
    net = golden()[0]
    g = load_file(GOLDEN / "train_loss.safetensors")
    t = 1 - g["t"]
    close(Linear().interpolate(g["x0"], g["x1"], t), g["xt"], 1e-6)
    close(Linear().velocity(g["x0"], g["x1"], t), -g["ut"], 1e-6)
    close(net(g["xt"], t, g["y"]), -g["pred_hot"], 2e-5)
    close(loss_of(net, g, g["x0"], t, t), g["loss_hot"], 1e-5)


@torch.no_grad()
def test_mixflow_on_top_is_the_authors():
    """Beta(2,1), then the shift, then the slowing below the shifted time: the model card's lines in RAE's transport."""
    net = golden()[0]
    g = load_file(GOLDEN / "train_loss.safetensors")
    uniforms = torch.stack([0.999 * g["mix_u_t"], g["mix_u_m"], torch.zeros(6)])  # the peer's times end at 0.999
    t, m = time_pair(uniforms, "mixflow", gamma=0.4, shift=SHIFT)
    close(t, 1 - g["mix_t"], 1e-6)
    close(m, 1 - g["mix_mt"], 1e-6)
    close(Linear().interpolate(g["x0"], g["x1"], m), g["mix_xt"], 1e-5)
    close(loss_of(net, g, g["x0"], t, m), g["mix_loss_hot"], 1e-5)


@pytest.mark.parametrize(("law", "peer"), [("uniform", "uniform"), ("logit_normal", "logit-normal_0_1")])
@pytest.mark.parametrize(("name", "shift"), [("shift1", 1.0), ("shift256", SHIFT)])
def test_laws_of_time_are_the_peers(law, peer, name, shift):
    g = load_file(GOLDEN / "train_loss.safetensors")
    raw = g["sample_uniform_raw"].double()
    end = torch.tensor(0.999, dtype=torch.float64)
    share = end if law == "uniform" else torch.special.ndtr(end.logit())  # of the law that lies below 0.999
    t, m = time_pair(torch.stack([1 - share * raw] * 3), law, shift=shift)
    close(t, 1 - g[f"sample_{peer}_{name}_t"], 1e-5)
    assert torch.equal(t, m)


def test_gradients_are_the_peers():
    net = golden()[0]
    g, step = load_file(GOLDEN / "train_loss.safetensors"), load_file(GOLDEN / "train_step.safetensors")
    t = 1 - g["t"]
    loss = loss_of(net, g, g["x0"], t, t).mean()
    close(loss, step["loss_mean"][0], 1e-5)
    loss.backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (name in FROZEN), name
        if name not in FROZEN:
            norm = step[f"grad_norm.{name}"]
            close(parameter.grad.norm(), norm, 1e-5 * max(norm.item(), 1))
            if f"grad.{name}" in step:
                close(parameter.grad, step[f"grad.{name}"], 1e-5)


def test_one_step_of_training_is_the_peers(tmp_path):
    net = golden()[0]
    g, after = load_file(GOLDEN / "train_loss.safetensors"), load_file(GOLDEN / "train_step.safetensors")
    t = 1 - g["t"]
    recipe = Recipe(
        num_steps=1,
        batch_size=6,
        learning_rate=2e-4,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        warmup_steps=0,
        gradient_clip=1.0,
        ema_decay=0.9995,
    )
    accelerator = Accelerator(cpu=True)
    ema, history = train(
        accelerator, net, lambda wrapped, *_: loss_of(wrapped, g, g["x0"], t, t), recipe, tmp_path / "resume.pt"
    )
    close(history["loss"][0], after["loss_mean"].item(), 1e-5)
    assert after["grad_norm_before_clip"] > 1
    assert ema.keys() == net.state_dict().keys()
    # Adam's first step is lr * sign(gradient): where a gradient is of rounding size, so is the step's sign.
    # The average moves by 1e-7 at most, which one unit in the last place tells from 0 in most weights.
    for state, kind, rtol, atol in [(net.state_dict(), "param_after", 0, 1e-6), (ema, "ema_after", 1.2e-7, 0)]:
        names = [name.removeprefix(f"{kind}.") for name in after if name.startswith(f"{kind}.")]
        assert len(names) > 40
        for name in names:
            clear = after[f"grad.{name}"].abs() > 1e-5 if name not in FROZEN else ...
            torch.testing.assert_close(state[name][clear], after[f"{kind}.{name}"][clear], rtol=rtol, atol=atol)
            close(state[name], after[f"{kind}.{name}"], 2 * 2e-4)


# By its own definition -----------------------------------------------------------------------------------------------


def test_initial_weights_are_the_peers_choice():
    net = build_model("rae", **(TINY | dict(hidden_size=(96, 128), in_channels=64, num_classes=500)))
    x = torch.randn(2, 64, 4, 4)
    assert net(x, torch.tensor([0.2, 0.9]), torch.tensor([1, 2])).abs().max() == 0
    for name, weight in net.state_dict().items():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name.endswith("embedder.proj.bias"):
            assert weight.abs().max() == 0, name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name.endswith("embedder.proj.weight"):
            bound = (6 / (weight.shape[0] + 64)) ** 0.5
            assert 0.98 * bound < weight.abs().max().item() <= bound, name
        elif name.startswith("y_embedder") or (name.startswith("t_embedder.mlp") and name.endswith("weight")):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name == "t_embedder.W":
            assert weight.std().item() == pytest.approx(1, rel=0.15)
        elif name.endswith(("weight", "bias")):  # torch's own linears
            bound = 1 / net.get_parameter(name.replace("bias", "weight")).shape[1] ** 0.5
            assert 0.9 * bound < weight.abs().max().item() <= bound, name
    assert {name for name, parameter in net.named_parameters() if not parameter.requires_grad} == FROZEN


def test_gradients_reach_every_weight_but_the_frozen_ones():
    net = tiny(qk_norm=True).train()
    net(*inputs()).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (name in FROZEN), name
        if name not in FROZEN:
            assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_one_time_for_all_is_that_time_for_each():
    net = tiny().eval()
    x, _, y = inputs()
    time = torch.tensor(0.3)
    close(net(x, time, y), net(x, time.expand(3), y), 1e-6)


def test_labels_are_dropped_at_random_in_train_mode_only():
    net = tiny(label_dropout=0.5)
    x, t, y = inputs()
    null = torch.full_like(y, net.null_label)
    with torch.no_grad():
        assert torch.equal(net.eval()(x, t, y, drop=torch.ones(3, dtype=torch.bool)), net(x, t, null))
        assert torch.equal(net(x, t, y), net(x, t, y))
    dropped = net.train().drop_labels(torch.zeros(1000, dtype=torch.int64), None)
    assert set(dropped.tolist()) == {0, 10}
    assert 400 < (dropped == 10).sum() < 600
    assert tiny(label_dropout=0).null_label is None


def test_rotation_depends_on_relative_places_only():
    """Rotated queries and keys have logits that are those of the same shift anywhere; angles by brute force."""
    rope, grid, quarter = DiTDH(**TINY).enc_feat_rope, 4, 3  # 24 channels, 2 heads
    x = torch.randn(1, 1, 16, 12)
    expected = torch.empty_like(x)
    for row in range(grid):
        for column in range(grid):
            for pair in range(6):
                place = row if pair < quarter else column
                angle = place * 10_000 ** (-(pair % quarter) / quarter)
                a, b = x[0, 0, row * grid + column, 2 * pair : 2 * pair + 2].tolist()
                turned = [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
                expected[0, 0, row * grid + column, 2 * pair : 2 * pair + 2] = torch.tensor(turned)
    close(rope(x), expected, 1e-6)


def test_compiles_in_one_piece():
    net = tiny(depth=[1, 1]).eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    close(compiled(*inputs()), net(*inputs()), 1e-6)


def test_distributed_data_parallel_finds_every_trained_weight_used(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(tiny().train())
        for _ in range(2):  # a weight left out of the first step is refused in the second
            wrapped(*inputs(), drop=torch.zeros(3, dtype=torch.bool)).square().mean().backward()
    finally:
        distributed.destroy_process_group()


# bf16 ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_autocast_stays_as_close_to_float32_as_the_peers():
    net, g = golden()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = -net(g["x"], 1 - g["t"], g["y"]).float()

    def distance(a, b):
        return ((a - b).norm() / b.norm()).item()

    assert distance(rounded, g["out_main_hot_bf16_autocast"]) < 0.03
    assert distance(rounded, g["out_main_hot"]) < 1.2 * distance(g["out_main_hot_bf16_autocast"], g["out_main_hot"])


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"rms_norm": False}])
def test_streams_norms_and_angles_are_float32_under_autocast(changes):
    net = tiny(**changes).eval()
    seen = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _m, given, output, name=name: seen.update({name: (given[0], output)}))
    with torch.autocast("cpu", torch.bfloat16):
        for x in (inputs()[0], inputs()[0].bfloat16()):
            net(x, *inputs()[1:])
            for name, (given, output) in seen.items():
                stream = name.startswith("blocks.") and name.count(".") == 1
                if stream or "norm" in name.removesuffix("embedder.norm"):
                    assert given.dtype == output.dtype == torch.float32, name
            assert seen["t_embedder.mlp"][0].dtype == seen["s_projector"][0].dtype == torch.float32
            assert seen["blocks.0.attn.qkv"][1].dtype == seen["blocks.3.mlp"][1].dtype == torch.bfloat16


# Part of the weights' names, and by how much they grow; ten times as much or more does no harm to float32 either.
EXTREMES = [
    ("attn.qkv", 1e1, 1e5),
    ("attn.proj", 1e3, 1e8),
    ("norm", 1e1, 1e5),
    ("adaLN_modulation", 5, 1e2),
    ("mlp", 2, 5),
    ("s_embedder", 1e3, 1e8),
    ("x_embedder", 1e14, 1e14),
    ("y_embedder", 1e1, 1e3),
]


@pytest.mark.parametrize(("part", "in_training", "in_sampling"), EXTREMES)
def test_extreme_activations_give_no_nan_under_autocast(part, in_training, in_sampling):
    for factor in (in_training, in_sampling):
        net = tiny().train()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if part in name:
                    parameter.mul_(factor)
        x, t, y = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            velocity = net(x, t, y, drop=torch.zeros(3, dtype=torch.bool)).float()
        assert velocity.isfinite().all()
        if factor == in_training:
            (velocity / (1 + velocity.detach().abs().max())).mean().backward()
            assert all(parameter.grad.isfinite().all() for parameter in net.parameters() if parameter.requires_grad)
