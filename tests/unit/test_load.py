"""Reading and writing weights: the peers' file formats, ours, and what users get told about the wrong ones."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mixflow.models import (
    REPA,
    DiTDH,
    SiT,
    build_model,
    convert_weights,
    describe_weights,
    export_weights,
    load_model,
    read_state_dict,
    save_model,
)
from mixflow.runtime.errors import UserError
from mixflow.runtime.weights_header import (
    options_from_shapes,
    plain_names,
    safetensors_header,
    safetensors_shapes,
    saved_model_options,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "sit"
OPTIONS = dict(
    input_size=8,
    in_channels=4,
    patch_size=2,
    hidden_size=32,
    depth=2,
    num_heads=2,
    num_classes=10,
    label_dropout=0.1,
    learn_sigma=True,
)
REPA_OPTIONS = {name: value for name, value in OPTIONS.items() if name != "learn_sigma"} | dict(
    depth=3, encoder_depth=2, z_dims=[24, 16], projector_dim=40, qk_norm=False
)
REPA_GOLDEN = GOLDEN.parent / "repa"
RAE_OPTIONS = dict(
    input_size=4,
    in_channels=3,
    hidden_size=[24, 40],
    depth=[3, 2],
    num_heads=[2, 2],
    num_classes=10,
    label_dropout=0.1,
    swiglu=True,
    rms_norm=True,
    qk_norm=False,
    pos_embed=True,
)
RAE_GOLDEN = GOLDEN.parent / "rae"
RAE_TRAINERS = {  # checkpoint of RAE's train.py, by date
    "2025-12": lambda state, other, optimizer, scheduler: {
        "step": 1251,
        "epoch": 1,
        "model": other,
        "ema": state,
        "optimizer": optimizer,
        "scheduler": scheduler,
    },
    "2025-10": lambda state, other, optimizer, scheduler: {
        "model": other,
        "ema": state,
        "opt": optimizer,
        "scheduler": scheduler,
        "train_steps": 1251,
        "config_path": "configs/stage2/training.yaml",
        "training_cfg": {"epochs": 1400, "optimizer": {"betas": [0.9, 0.95]}, "clip_grad": 1.0},
        "cli_overrides": {"data_path": "imagenet", "precision": "fp32", "global_seed": None},
    },
}
SIZES = {name: value for name, value in OPTIONS.items() if name not in ("num_heads", "label_dropout")}


def network(**changes):
    torch.manual_seed(0)
    net = SiT(**(OPTIONS | changes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    return net.eval()


def repa(**changes):
    torch.manual_seed(0)
    net = REPA(**(REPA_OPTIONS | changes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    return net.eval()


def rae(**changes):
    torch.manual_seed(0)
    net = DiTDH(**(RAE_OPTIONS | changes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    return net.eval()


def shapes(net):
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def legacy(state, encoder_depth=2):
    """REPA's present key names -> its former ones."""
    renamed = {}
    for name, tensor in state.items():
        stem, _, rest = name.partition(".")
        number, _, tail = rest.partition(".")
        behind = stem == "blocks" and int(number) >= encoder_depth
        renamed[f"decoder_blocks.{int(number) - encoder_depth}.{tail}" if behind else name] = tensor
    return renamed


def stripped(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("projectors")}


def velocity(net):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(
        2, net.options["in_channels"], net.options["input_size"], net.options["input_size"], generator=generator
    )
    with torch.no_grad():
        return net(x, torch.tensor([0.2, 0.7]), torch.tensor([1, 3]))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Attack:
    """Unpickling this without care would create the file `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


# Our own files ------------------------------------------------------------------------------------------------------


def test_saved_network_comes_back_whole(tmp_path):
    net = network()
    save_model(tmp_path / "model.safetensors", net.state_dict(), net.options)
    loaded = load_model("sit", tmp_path / "model.safetensors")
    assert loaded.options == OPTIONS
    assert not loaded.training
    assert not loaded.pos_embed.requires_grad
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())
    assert same(loaded.state_dict(), net.state_dict())
    assert torch.equal(velocity(loaded), velocity(net))


def test_saved_network_without_null_class_comes_back_whole(tmp_path):
    net = network(label_dropout=0.0)
    save_model(tmp_path / "model.safetensors", net.state_dict(), net.options)
    loaded = load_model("sit", tmp_path / "model.safetensors")
    assert loaded.options == net.options
    assert loaded.null_label is None
    assert describe_weights(tmp_path / "model.safetensors")["num_classes"] == 10
    with pytest.raises(UserError, match=r"was saved with label_dropout 0.0 where 0.1 is asked for"):
        load_model("sit", tmp_path / "model.safetensors", label_dropout=0.1)


def test_label_dropout_can_be_changed_for_training(tmp_path):
    net = network()
    save_model(tmp_path / "model.safetensors", net.state_dict(), net.options)
    assert load_model("sit", tmp_path / "model.safetensors", label_dropout=0.2).label_dropout == 0.2


def test_equal_weights_give_equal_bytes(tmp_path):
    net = network()
    backwards = OrderedDict(reversed(net.state_dict().items()))
    shuffled_options = dict(reversed(net.options.items()))
    for _ in range(3):
        save_model(tmp_path / "first.safetensors", net.state_dict(), net.options)
        save_model(tmp_path / "second.safetensors", backwards, shuffled_options)
        assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    assert list(safetensors_header(tmp_path / "first.safetensors")["__metadata__"]) == ["mixflow"]


def test_saved_file_has_ordinary_permissions_and_leaves_no_rubbish(tmp_path):
    (tmp_path / "ordinary").touch()
    save_model(tmp_path / "model.safetensors", network().state_dict(), OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "ordinary"]
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_failed_save_keeps_the_old_file(tmp_path):
    net = network()
    path = tmp_path / "model.safetensors"
    save_model(path, net.state_dict(), net.options)
    before = path.read_bytes()
    weight = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save_model(path, {"a": weight, "b": weight}, net.options)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_loaded_network_does_not_depend_on_the_file_or_the_given_tensors(tmp_path):
    net = network()
    path = tmp_path / "model.safetensors"
    save_model(path, net.state_dict(), net.options)
    loaded, expected = load_model("sit", path), velocity(net)
    with open(path, "r+b") as file:
        file.truncate(100)
    assert torch.equal(velocity(loaded), expected)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    loaded = load_model("sit", state, num_heads=2)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(velocity(loaded), expected)


# The peers' files ---------------------------------------------------------------------------------------------------

WRAPS = {
    "flat": lambda state, other: state,
    "ema": lambda state, other: {
        "model": other,
        "ema": state,
        "opt": {"state": {}},
        "args": argparse.Namespace(lr=1e-4),
    },
    "model": lambda state, other: {"model": state, "steps": 7},
    "state_dict": lambda state, other: {"state_dict": state, "epoch": 3},
}
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_torch_files(tmp_path, suffix, wrap):
    net, other = network(), {name: tensor + 1 for name, tensor in network().state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(WRAPS[wrap](net.state_dict(), other), path)
    assert same(read_state_dict(path), net.state_dict())
    assert torch.equal(velocity(load_model("sit", path, num_heads=2)), velocity(net))
    assert describe_weights(path)["wrapper"] == (None if wrap == "flat" else wrap)


def test_torch_file_of_the_time_before_zip(tmp_path):
    net = network()
    torch.save({"ema": net.state_dict()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(load_model("sit", tmp_path / "old.pt", num_heads=2).state_dict(), net.state_dict())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_ddp_and_compile_are_dropped(tmp_path, prefix):
    net = network()
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    assert same(load_model("sit", {"ema": state}, num_heads=2).state_dict(), net.state_dict())
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert same(read_state_dict(tmp_path / "model.safetensors"), net.state_dict())


def test_prefix_of_compiled_blocks_is_dropped():
    net = network()
    state = {name.replace("blocks.1.", "blocks.1._orig_mod."): t for name, t in net.state_dict().items()}
    assert same(load_model("sit", state, num_heads=2).state_dict(), net.state_dict())


def test_other_precisions_become_float32():
    net = network()
    state = {name: tensor.bfloat16() for name, tensor in net.state_dict().items()}
    loaded = load_model("sit", state, num_heads=2).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
    assert same(loaded, {name: tensor.float() for name, tensor in state.items()})


@pytest.mark.parametrize(
    "changes",
    [
        {"learn_sigma": False},
        {"num_classes": 1000},
        {"patch_size": 4},
        {"patch_size": 1, "input_size": 4},
        {"in_channels": 16},
        {"in_channels": 3, "learn_sigma": False, "input_size": 16},
        {"depth": 12},
    ],
)
def test_sizes_come_from_shapes(changes):
    options = OPTIONS | changes
    assert load_model("sit", network(**changes).state_dict(), num_heads=2).options == options


@pytest.mark.parametrize(("hidden_size", "num_heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_published_widths_are_known(hidden_size, num_heads):
    state = network(hidden_size=hidden_size, depth=1, num_heads=num_heads).state_dict()
    assert load_model("sit", state).options["num_heads"] == num_heads


def test_label_table_without_null_class():
    state = network(label_dropout=0.0).state_dict()
    net = load_model("sit", state, num_heads=2, label_dropout=0)
    assert net.options["num_classes"] == 10
    assert net.null_label is None
    assert load_model("sit", state, num_heads=2).options["num_classes"] == 9  # what shapes alone must mean


def test_positions_are_loaded_not_recomputed():
    state = network().state_dict() | {"pos_embed": torch.full((1, 16, 32), 0.25)}
    assert torch.equal(load_model("sit", state, num_heads=2).pos_embed, state["pos_embed"])


# REPA's files -------------------------------------------------------------------------------------------------------


def test_saved_repa_network_comes_back_whole(tmp_path):
    for qk_norm in (False, True):
        net = repa(qk_norm=qk_norm)
        save_model(tmp_path / "model.safetensors", net.state_dict(), net.options | {"family": "repa"})
        for options in ({}, net.options):
            loaded = load_model("repa", tmp_path / "model.safetensors", **options)
            assert loaded.options == net.options
            assert same(loaded.state_dict(), net.state_dict())
            assert torch.equal(velocity(loaded), velocity(net))
            assert not loaded.pos_embed.requires_grad


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_legacy_names_tell_the_aligned_block(tmp_path, wrap, prefix):
    net = repa()
    state = {prefix + name: tensor for name, tensor in legacy(net.state_dict()).items()}
    torch.save(WRAPS[wrap](state, {name: tensor + 1 for name, tensor in state.items()}), tmp_path / "last.pt")
    loaded = load_model("repa", tmp_path / "last.pt", num_heads=2)
    assert loaded.options == REPA_OPTIONS
    assert same(loaded.state_dict(), net.state_dict())
    with pytest.raises(UserError, match="has encoder_depth 2 where 3 is asked for"):
        load_model("repa", tmp_path / "last.pt", num_heads=2, encoder_depth=3)
    description = describe_weights(tmp_path / "last.pt")
    assert (description["encoder_depth"], description["key_names"]) == (2, "REPA's legacy ones")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert options_from_shapes("repa", shapes)["encoder_depth"] == 2
    assert list(plain_names(state).values()) == list(net.state_dict())


def test_training_arguments_in_the_file_tell_the_aligned_block(tmp_path):
    net = repa()
    arguments = argparse.Namespace(encoder_depth=2, cfg_prob=0.1)
    checkpoint = {"model": net.state_dict(), "ema": net.state_dict(), "opt": {"state": {}, "param_groups": [1]}}
    torch.save(checkpoint | {"args": arguments, "steps": 400_000}, tmp_path / "0400000.pt")
    assert load_model("repa", tmp_path / "0400000.pt", num_heads=2).options == REPA_OPTIONS
    description = describe_weights(tmp_path / "0400000.pt")
    assert description["beside"] == {
        "model": f"OrderedDict of {len(net.state_dict())}",
        "opt": "dict of 2",
        "args": "Namespace",
        "steps": 400_000,
    }
    assert (description["family"], description["wrapper"], description["z_dims"]) == ("repa", "ema", [24, 16])


def test_the_aligned_block_is_the_peers_default_or_must_be_given():
    assert load_model("repa", repa(depth=9).state_dict(), num_heads=2).encoder_depth == 8
    assert load_model("repa", repa(depth=9).state_dict(), num_heads=2, encoder_depth=4).encoder_depth == 4
    with pytest.raises(UserError, match=r"has hidden_size 32 and depth 3.*give the option encoder_depth"):
        load_model("repa", repa().state_dict(), num_heads=2)
    with pytest.raises(UserError, match=r"encoder_depth 4 is not one of the blocks 1 to 3"):
        load_model("repa", repa().state_dict(), num_heads=2, encoder_depth=4)


def test_a_repa_file_without_projectors_serves_for_sampling():
    net = repa()
    loaded = load_model("repa", stripped(net.state_dict()), num_heads=2, z_dims=[24, 16], projector_dim=40)
    assert loaded.options["z_dims"] == []
    assert torch.equal(velocity(loaded), velocity(net))
    with pytest.raises(UserError, match=r"has z_dims \[24, 16\] where \[24\] is asked for"):
        load_model("repa", net.state_dict(), num_heads=2, encoder_depth=2, z_dims=[24])
    state = net.state_dict()
    del state["projectors.0.0.bias"], state["projectors.1.4.weight"]
    with pytest.raises(UserError, match=r"missing 'projectors.0.0.bias'; unexpected 'projectors.1.0.weight'"):
        load_model("repa", state, num_heads=2, encoder_depth=2)


def test_released_repa_sizes_are_told_from_the_peers_key_lists():
    for name, entry in json.loads((REPA_GOLDEN / "state_dict_keys.json").read_text()).items():
        sizes = options_from_shapes("repa", {key: tuple(shape) for key, shape in entry["keys"].items()})
        assert (sizes["z_dims"], sizes["projector_dim"], sizes["qk_norm"]) == ([768], 2048, False)
        assert (sizes["input_size"], sizes["num_classes"], sizes["patch_size"]) == (32, 1000, 2)
        assert sizes["depth"] == {"B": 12, "L": 24, "X": 28}[name[4]]
        assert not {"learn_sigma", "encoder_depth", "num_heads"} & sizes.keys()


# RAE's files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "swiglu": False, "rms_norm": False},
        {"pos_embed": False, "label_dropout": 0.0},
        {"hidden_size": [24, 24], "depth": [1, 3], "num_heads": [2, 6]},
    ],
)
def test_saved_rae_network_comes_back_whole(tmp_path, changes):
    net = rae(**changes)
    path = tmp_path / "model.safetensors"
    save_model(path, net.state_dict(), net.options | {"family": "rae"})
    as_tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in net.options.items()}
    for options in ({}, net.options, as_tuples):
        loaded = load_model("rae", path, **options)
        assert type(loaded) is DiTDH
        assert loaded.options == net.options
        assert not loaded.training
        assert same(loaded.state_dict(), net.state_dict())
        assert torch.equal(velocity(loaded), velocity(net))
        assert not any(weight.requires_grad for weight in (loaded.pos_embed, loaded.t_embedder.W) if weight is not None)
    found = options_from_shapes("rae", safetensors_shapes(path), null_row=net.label_dropout > 0)
    told = {"label_dropout"} | ({"depth"} if len(set(net.options["hidden_size"])) == 1 else set())
    assert found == {name: value for name, value in net.options.items() if name not in told}
    assert saved_model_options(path) == net.options | {"family": "rae"}
    description = describe_weights(path)
    assert (description["family"], description["architecture"]) == ("rae", "an RAE network (DiT with a wide head)")
    assert description.items() >= net.options.items()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_rae_files_tell_all_but_the_label_dropout(tmp_path, wrap, prefix):
    net = rae()
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    torch.save(WRAPS[wrap](state, {name: tensor + 1 for name, tensor in state.items()}), tmp_path / "stage2_model.pt")
    loaded = load_model("rae", tmp_path / "stage2_model.pt", num_heads=[2, 2])
    assert loaded.options == RAE_OPTIONS
    assert same(loaded.state_dict(), net.state_dict())


@pytest.mark.parametrize("trainer", RAE_TRAINERS)
def test_rae_training_checkpoints(tmp_path, trainer):
    net, other = rae(), rae()
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=2e-4, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    other.train()(torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 1])).square().mean().backward()
    optimizer.step()
    scheduler.step()
    checkpoint = RAE_TRAINERS[trainer](
        net.state_dict(), other.state_dict(), optimizer.state_dict(), scheduler.state_dict()
    )
    torch.save(checkpoint, tmp_path / "ep-last.pt")
    assert same(load_model("rae", tmp_path / "ep-last.pt").state_dict(), net.state_dict())
    description = describe_weights(tmp_path / "ep-last.pt")
    assert (description["wrapper"], description["depth"], description["num_heads"]) == ("ema", [3, 2], [2, 2])
    assert description["beside"].keys() == checkpoint.keys() - {"ema"}
    del checkpoint["ema"]
    torch.save(checkpoint, tmp_path / "ep-last.pt")
    assert same(load_model("rae", tmp_path / "ep-last.pt").state_dict(), other.state_dict())


def test_the_depth_of_equally_wide_trunk_and_head_must_be_given(tmp_path):
    net = rae(hidden_size=[24, 24])
    torch.save(net.state_dict(), tmp_path / "stage2_model.pt")
    assert load_model("rae", tmp_path / "stage2_model.pt", depth=[3, 2]).options == net.options
    assert describe_weights(tmp_path / "stage2_model.pt")["depth"] is None
    with pytest.raises(UserError, match=r"has hidden_size \[24, 24\], from which depth cannot be told: give the op"):
        load_model("rae", tmp_path / "stage2_model.pt")
    with pytest.raises(UserError, match=r"does not fit a DiTDH of hidden_size \[24, 24\], depth \[2, 2\] \(unexpected"):
        load_model("rae", tmp_path / "stage2_model.pt", depth=[2, 2])


def test_rae_positions_frequencies_and_rotations_are_loaded_not_recomputed():
    state = rae().state_dict()
    for name in ("pos_embed", "t_embedder.W", "enc_feat_rope.freqs_cos", "dec_feat_rope.freqs_sin"):
        state[name] = torch.randn_like(state[name])
    assert same(load_model("rae", state).state_dict(), state)


def test_released_rae_sizes_are_told_from_the_peers_key_lists():
    for name, entry in json.loads((RAE_GOLDEN / "state_dict_keys.json").read_text()).items():
        width, depth, heads = {"XL": (1152, 28, 16), "B": (768, 12, 12), "S": (384, 12, 6)}[name.removeprefix("DiTDH-")]
        assert options_from_shapes("rae", {key: tuple(shape) for key, shape in entry["keys"].items()}) == dict(
            input_size=16,
            in_channels=768,
            hidden_size=[width, 2048],
            depth=[depth, 2],
            num_heads=[heads, 16],
            num_classes=1000,
            swiglu=True,
            rms_norm=True,
            qk_norm=False,
            pos_embed=True,
        )


@pytest.mark.parametrize("model", ["main", "guide"])
def test_our_rae_files_are_the_peers_again(tmp_path, model):
    peer = safetensors.torch.load_file(RAE_GOLDEN / f"weights_{model}_hot.safetensors")
    net = load_model("rae", peer)
    save_model(tmp_path / "model.safetensors", net.state_dict(), net.options | {"family": "rae"})
    export_weights(tmp_path / "model.safetensors", tmp_path / "stage2_model.pt", velocity_head=True)
    flat = torch.load(tmp_path / "stage2_model.pt", weights_only=True)
    assert same(flat, peer)
    plain_module(shapes_of(peer)).load_state_dict(flat, strict=True, assign=True)
    convert_weights(tmp_path / "stage2_model.pt", tmp_path / "again.safetensors")
    assert same(load_model("rae", tmp_path / "again.safetensors").state_dict(), net.state_dict())


# Conversion and export ----------------------------------------------------------------------------------------------


def test_unsafe_files_are_converted_on_trust_only(tmp_path, caplog):
    net = repa()
    path, mark, out = tmp_path / "unsafe.pt", tmp_path / "mark", tmp_path / "safe.safetensors"
    arguments = argparse.Namespace(encoder_depth=2, data_dir=Attack(mark))
    torch.save({"ema": net.state_dict(), "args": arguments, "steps": 7}, path)
    with pytest.raises(UserError, match="cannot be loaded safely"):
        convert_weights(path, out)
    assert not mark.exists()
    assert not out.exists()
    with caplog.at_level("WARNING"):
        convert_weights(path, out, trust=True)
    assert mark.exists()  # the file's own code, which is why trust is asked for
    assert "any code in it runs now" in caplog.text
    assert load_model("repa", out, num_heads=2).options == REPA_OPTIONS
    assert same(read_state_dict(out), net.state_dict())


def test_safe_files_are_converted_without_trust_or_warning(tmp_path, caplog):
    shared = torch.ones(4)
    torch.save({"state_dict": {"module.a": shared, "module.b": shared}}, tmp_path / "weights.pt")
    with caplog.at_level("WARNING"):
        convert_weights(tmp_path / "weights.pt", tmp_path / "out.safetensors", trust=True)
    assert not caplog.text
    assert same(read_state_dict(tmp_path / "out.safetensors"), {"a": shared, "b": shared})


def test_conversions_that_cannot_be_done(tmp_path):
    with pytest.raises(UserError, match=r"absent.pt' does not exist"):
        convert_weights(tmp_path / "absent.pt", tmp_path / "out.safetensors", trust=True)
    with pytest.raises(UserError, match=r"out.pt' does not end in .safetensors"):
        convert_weights(tmp_path / "absent.pt", tmp_path / "out.pt", trust=True)
    torch.save({"ema": network().state_dict(), "args": Attack(tmp_path)}, tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "weights.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b"cposix\n", b"cpeers\n"))
    with pytest.raises(UserError, match=r"holds objects of a program that is not installed here \(No module.*'peers'"):
        convert_weights(tmp_path / "weights.pt", tmp_path / "out.safetensors", trust=True)


def plain_module(shapes):
    """A module of nothing but parameters under the given names, as strict as the peers' networks are when loading."""
    root = torch.nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(torch.empty(shape, device="meta")))
    return root


def shapes_of(state):
    return {name: list(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("model", ["a", "b"])
@pytest.mark.parametrize("family", ["sit", "repa"])
def test_exported_weights_load_strictly_under_the_peers_names(tmp_path, family, model):
    source = (GOLDEN if family == "sit" else REPA_GOLDEN) / f"model_{model}.safetensors"
    told = {"a": dict(num_heads=4), "b": dict(num_heads=3)}[model] | ({"encoder_depth": 2} if family == "repa" else {})
    net = load_model(family, source, **told)
    save_model(tmp_path / "model.safetensors", net.state_dict(), net.options | {"family": family})
    export_weights(tmp_path / "model.safetensors", tmp_path / "peer.pt")
    payload = torch.load(tmp_path / "peer.pt", weights_only=True)
    state = payload if family == "sit" else payload["ema"]  # where SiT's find_model and REPA's generate.py look
    assert ("ema" in payload) == (family == "repa")
    assert shapes_of(state) == shapes_of(safetensors.torch.load_file(source))
    plain_module(shapes_of(state)).load_state_dict(state, strict=True, assign=True)
    assert same(dict(state), net.state_dict())
    assert all(tensor.dtype == torch.float32 and type(tensor) is torch.Tensor for tensor in state.values())
    assert same(load_model(family, tmp_path / "peer.pt", **told).state_dict(), net.state_dict())


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-XL/2", "REPA-XL/2"])
def test_networks_of_the_peers_key_lists_have_just_those_names(name):
    family, size = name.split("-")
    entry = json.loads((GOLDEN.parent / family.lower() / "state_dict_keys.json").read_text())[f"SiT-{size}"]
    sizes = options_from_shapes(family.lower(), {key: tuple(shape) for key, shape in entry["keys"].items()})
    with torch.device("meta"):
        net = {"SiT": SiT, "REPA": REPA}[family](
            num_heads={"S": 6, "X": 16}[size[0]], **sizes, **({"encoder_depth": 8} if family == "REPA" else {})
        )
    plain_module(entry["keys"]).load_state_dict(net.state_dict(), strict=True, assign=True)


def test_export_of_the_velocity_half_of_the_head(tmp_path):
    net = network()
    save_model(tmp_path / "model.safetensors", net.state_dict(), net.options | {"family": "sit"})
    export_weights(tmp_path / "model.safetensors", tmp_path / "eight.pt")
    export_weights(tmp_path / "model.safetensors", tmp_path / "four.pt", velocity_head=True)
    assert describe_weights(tmp_path / "four.pt")["learn_sigma"] is False
    assert torch.equal(velocity(load_model("sit", tmp_path / "four.pt", num_heads=2)), velocity(net))
    assert same(read_state_dict(tmp_path / "eight.pt"), net.state_dict())


def test_export_says_what_repas_loader_would_miss(tmp_path, caplog):
    net = repa(z_dims=[])
    save_model(tmp_path / "model.safetensors", net.state_dict(), net.options | {"family": "repa"})
    with caplog.at_level("WARNING"):
        export_weights(tmp_path / "model.safetensors", tmp_path / "peer.pt")
    assert "has no projectors: REPA's generate.py will miss the keys 'projectors.*'" in caplog.text
    with pytest.raises(UserError, match=r"peer.safetensors' does not end in .pt"):
        export_weights(tmp_path / "model.safetensors", tmp_path / "peer.safetensors")
    torch.save({"cls_token": torch.zeros(2)}, tmp_path / "vit.pt")
    with pytest.raises(UserError, match=r"vit.pt' holds a vision transformer, which no peer here loads"):
        export_weights(tmp_path / "vit.pt", tmp_path / "peer.pt")


# What users get told ------------------------------------------------------------------------------------------------


def test_unknown_family_and_options():
    with pytest.raises(UserError, match=r"'sitt' is not a family of networks; did you mean 'sit'\?"):
        load_model("sitt", {})
    with pytest.raises(UserError, match=r"'num_head' is not an option of family 'sit'; did you mean 'num_heads'\?"):
        load_model("sit", network().state_dict(), num_head=2)
    with pytest.raises(UserError, match=r"has depth 2 where 3 is asked for"):
        load_model("sit", network().state_dict(), num_heads=2, depth=3)


def test_heads_of_unlisted_widths_must_be_given():
    with pytest.raises(UserError, match=r"the given state dict has hidden_size 32.*give the option num_heads"):
        load_model("sit", network().state_dict())
    with pytest.raises(UserError, match=r"hidden_size 32 is not a multiple of num_heads 5"):
        load_model("sit", network().state_dict(), num_heads=5)


def test_heads_that_contradict_our_file(tmp_path):
    save_model(tmp_path / "model.safetensors", network().state_dict(), OPTIONS)
    assert load_model("sit", tmp_path / "model.safetensors", num_heads=2).options == OPTIONS
    path = tmp_path / "model.safetensors"
    # Shapes cannot tell the heads, but the file says them.
    with pytest.raises(UserError, match=rf"weights file '{path}' has num_heads 2 where 4 is asked for"):
        load_model("sit", path, num_heads=4)


def test_missing_unexpected_and_misshapen_weights_are_named():
    state = network().state_dict()
    for name in [name for name in state if name.startswith("blocks.1.mlp.")]:
        del state[name]
    state["blocks.0.attn.rope"] = torch.zeros(1)
    state["blocks.0.attn.proj.bias"] = torch.zeros(7)
    with pytest.raises(UserError) as error:
        load_model("sit", state, num_heads=2)
    assert "missing 'blocks.1.mlp.fc1.weight', 'blocks.1.mlp.fc1.bias', 'blocks.1.mlp.fc2.weight' and 1 more" in str(
        error.value
    )
    assert "unexpected 'blocks.0.attn.rope'" in str(error.value)
    assert "misshapen 'blocks.0.attn.proj.bias' [7]" in str(error.value)
    assert "SiT of hidden_size 32, depth 2, patch_size 2" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "held"),
    [
        (["encoder.down_blocks.0.weight"], "a diffusers autoencoder"),
        (["transformer_blocks.0.attn.to_q.weight"], "a diffusers transformer such as SD3"),
        (["cls_token", "blocks.0.attn.qkv.weight"], "a vision transformer"),
        (["r_embedder.W", "s_embedder.proj.weight"], "a MeanFlow network of two times"),
        (["blocks.0.mlp.w12.weight", "blocks.0.adaLN_modulation.1.weight"], "a DiT with SwiGLU, as LightningDiT's"),
        (["anything"], "no network that mixflow knows"),
    ],
)
def test_other_architectures_are_named(tmp_path, keys, held):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({key: torch.zeros(2) for key in keys}, path)
    for family, name in (("sit", "SiT"), ("rae", "DiT-DH")):
        with pytest.raises(UserError, match=rf"file '{path}' cannot be loaded as {name}.*seems to hold {held}"):
            load_model(family, path)
    description = describe_weights(path)
    assert description["family"] is None
    assert description["architecture"].startswith(held)


@pytest.mark.parametrize("form", ["projectors", "legacy names", "qk-norm"])
def test_repa_weights_are_no_sit(form):
    state = repa(qk_norm=form == "qk-norm").state_dict()
    state = state if form == "projectors" else stripped(legacy(state) if form == "legacy names" else state)
    with pytest.raises(UserError, match=r"seems to hold a (REPA network|SiT with qk-norm).*: use the family 'repa'"):
        options_from_shapes("sit", {name: tuple(tensor.shape) for name, tensor in state.items()})
    if form != "legacy names":
        with pytest.raises(UserError, match=r"the given state dict seems to hold .*: use the family 'repa'"):
            load_model("sit", state, num_heads=2)


def test_sit_weights_are_no_repa():
    with pytest.raises(UserError, match=r"cannot be loaded as REPA, for its head has 8 channels.*use the family 'sit'"):
        load_model("repa", network().state_dict(), num_heads=2)


def test_rae_weights_are_no_sit_and_sit_weights_are_no_rae():
    for family in ("sit", "repa"):
        with pytest.raises(UserError, match=r"seems to hold an RAE network .*: use the family 'rae'"):
            load_model(family, rae().state_dict())
    with pytest.raises(UserError, match=r"cannot be loaded as DiT-DH, for 's_embedder.proj.weight' is missing and"):
        load_model("rae", network().state_dict())
    with pytest.raises(UserError, match=r"seems to hold a REPA network: use the family 'repa'"):
        load_model("rae", repa().state_dict())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("s_embedder.proj.weight", (24, 3, 2, 2)),
        ("x_embedder.proj.weight", (40, 4, 1, 1)),
        ("enc_feat_rope.freqs_cos", (15, 12)),
        ("dec_feat_rope.freqs_cos", (16, 12)),
        ("y_embedder.embedding_table.weight", (11,)),
        ("blocks.4.attn.proj.bias", (41,)),
    ],
)
def test_shapes_of_no_rae_network(name, shape):
    with pytest.raises(UserError, match="belong to no DiT-DH on square latents with one token per pixel"):
        options_from_shapes("rae", shapes(rae()) | {name: shape})


def test_options_that_contradict_a_rae_file():
    state = rae().state_dict()
    with pytest.raises(UserError, match=r"has num_heads \[2, 2\] where \[2, 4\] is asked for"):
        load_model("rae", state, num_heads=(2, 4))
    with pytest.raises(UserError, match=r"has hidden_size \[24, 40\] where \[24, 48\] is asked for"):
        load_model("rae", state, hidden_size=[24, 48])
    with pytest.raises(UserError, match=r"'patch_size' is not an option of family 'rae'"):
        load_model("rae", state, patch_size=1)
    del state["blocks.4.mlp.w3.bias"], state["pos_embed"]
    with pytest.raises(UserError, match=r"does not fit a DiTDH of .*\(missing 'blocks.4.mlp.w3.bias'\)"):
        load_model("rae", state)


def test_options_of_fresh_rae_networks_are_checked():
    assert build_model("rae", **RAE_OPTIONS).options == RAE_OPTIONS
    with pytest.raises(UserError, match=r"depth is 28 where a rae network has two numbers: give \[trunk, head\]"):
        build_model("rae", **(RAE_OPTIONS | {"depth": 28}))
    with pytest.raises(UserError, match=r"num_heads is \[2, 2, 2\] where a rae network has two numbers"):
        build_model("rae", **(RAE_OPTIONS | {"num_heads": [2, 2, 2]}))
    with pytest.raises(UserError, match=r"hidden_size 40 is not a multiple of 4 x num_heads 4"):
        build_model("rae", **(RAE_OPTIONS | {"num_heads": [2, 4]}))
    with pytest.raises(UserError, match="needs the option 'hidden_size'"):
        build_model("rae", **{name: value for name, value in RAE_OPTIONS.items() if name != "hidden_size"})


def test_the_family_in_our_own_files_counts_more_than_shapes(tmp_path):
    net = repa(z_dims=[])  # whose shapes are those of a SiT
    save_model(tmp_path / "model.safetensors", net.state_dict(), net.options | {"family": "repa"})
    with pytest.raises(UserError, match=r"model.safetensors' holds a network of family 'repa', not 'sit'"):
        load_model("sit", tmp_path / "model.safetensors")
    assert describe_weights(tmp_path / "model.safetensors")["family"] == "repa"


@pytest.mark.parametrize(
    ("name", "shape"),
    [("pos_embed", (1, 15, 32)), ("final_layer.linear.weight", (20, 32)), ("x_embedder.proj.weight", (32, 16))],
)
def test_shapes_of_no_square_sit(name, shape):
    state = network().state_dict() | {name: torch.zeros(shape)}
    with pytest.raises(UserError, match="belong to no SiT on square latents"):
        load_model("sit", state, num_heads=2)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path, mark = tmp_path / "attack.pt", tmp_path / "mark"
    torch.save({"ema": network().state_dict(), "args": Attack(mark)}, path)
    command = rf"`python -m mixflow convert-weights {path} --trust --out {path.with_suffix('.safetensors')}`"
    with pytest.raises(UserError, match=rf"'{path}' cannot be loaded safely, for it holds 'posix\.mkdir'.*{command}"):
        load_model("sit", path, num_heads=2)
    torch.save({"ema": network().state_dict(), "args": argparse.Namespace(x=Attack(mark))}, path)
    with pytest.raises(UserError, match="cannot be loaded safely"):
        load_model("sit", path, num_heads=2)
    assert not mark.exists()


def test_unsafe_contents_of_an_old_torch_file_are_named(tmp_path):
    path, mark = tmp_path / "attack.pt", tmp_path / "mark"
    torch.save({"ema": {}, "args": Attack(mark)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"cannot be loaded safely, for it holds 'posix\.mkdir'"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps({"args": Attack(mark)}, protocol=2))
    with pytest.raises(UserError, match=f"'{path}'"):
        read_state_dict(path)
    assert not mark.exists()


def test_namespaces_that_hold_more_than_plain_values_are_explained(tmp_path):
    arguments = argparse.Namespace(data_path=Path("images"))
    torch.save({"ema": network().state_dict(), "args": arguments}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"cannot be loaded safely, for it holds 'pathlib[\w.]*'"):
        load_model("sit", tmp_path / "weights.pt", num_heads=2)


def test_allowing_namespaces_does_not_outlast_the_load(tmp_path):
    torch.save({"ema": network().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "weights.pt")
    load_model("sit", tmp_path / "weights.pt", num_heads=2)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_truncated_files(tmp_path, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(network().state_dict(), path)
    else:
        save_model(path, network().state_dict(), OPTIONS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"weights file '{path}'.*download or make it again"):
        load_model("sit", path)


def test_files_of_another_kind_under_a_known_ending(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(UserError, match="is truncated or is not a torch file"):
        load_model("sit", tmp_path / "weights.pt")
    (tmp_path / "page.pt").write_text("<html>quota exceeded</html>")
    with pytest.raises(UserError, match="is truncated or is not a torch file"):
        load_model("sit", tmp_path / "page.pt")
    header = b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}'
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=r"odd.safetensors' is garbled"):
        load_model("sit", tmp_path / "odd.safetensors")


def test_files_that_hold_something_else(tmp_path):
    for content in ([1, 2], {"epoch": 3}, {"ema": {}}, {1: torch.zeros(3)}, torch.zeros(3)):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(UserError, match=r"weights file '.*weights.pt' holds"):
            load_model("sit", tmp_path / "weights.pt")
    for name in ("absent.pt", "absent.safetensors"):
        with pytest.raises(UserError, match=rf"{name}' does not exist"):
            load_model("sit", tmp_path / name)
    with pytest.raises(UserError, match=r"has none of the endings .safetensors"):
        load_model("sit", tmp_path / "weights.bin")


def test_options_of_fresh_networks_are_checked():
    assert build_model("sit", **OPTIONS).options == OPTIONS
    with pytest.raises(UserError, match="needs the option 'depth'"):
        build_model("sit", **{name: value for name, value in OPTIONS.items() if name != "depth"})
    with pytest.raises(UserError, match="input_size 9 is not a multiple of patch_size 2"):
        build_model("sit", **(OPTIONS | {"input_size": 9}))
    with pytest.raises(UserError, match="hidden_size 30 is not a multiple of 4"):
        build_model("sit", **(OPTIONS | {"hidden_size": 30}))
    with pytest.raises(UserError, match=r"'width' is not an option of family 'sit'"):
        build_model("sit", **OPTIONS, width=3)


# Descriptions and headers -------------------------------------------------------------------------------------------


def test_describe_weights(tmp_path):
    net = network()
    expected = OPTIONS | {
        "family": "sit",
        "architecture": "a SiT network",
        "wrapper": None,
        "keys": 32,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "dtype": "float32",
    }
    save_model(tmp_path / "ours.safetensors", net.state_dict(), net.options)
    assert describe_weights(tmp_path / "ours.safetensors") == expected
    torch.save({"ema": net.bfloat16().state_dict()}, tmp_path / "peer.pt")
    foreign = expected | {"wrapper": "ema", "dtype": "bfloat16", "num_heads": None}
    del foreign["label_dropout"]
    assert describe_weights(tmp_path / "peer.pt") == foreign
    bare = network(learn_sigma=False).state_dict()
    torch.save(bare, tmp_path / "bare.pt")
    assert describe_weights(tmp_path / "bare.pt")["architecture"].startswith("a SiT network, or a REPA network without")


@pytest.mark.parametrize("model", ["a", "b"])
def test_header_tells_shapes_and_sizes_of_the_peers_models(model):
    path = GOLDEN / f"model_{model}.safetensors"
    shapes = safetensors_shapes(path)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in safetensors.torch.load_file(path).items()}
    config = json.loads(safetensors_header(path)["__metadata__"]["config"])
    assert options_from_shapes("sit", shapes) == {name: value for name, value in config.items() if name != "num_heads"}
    assert saved_model_options(path) == {}


def test_released_sizes_are_told_from_the_peers_key_lists():
    for name, entry in json.loads((GOLDEN / "state_dict_keys.json").read_text()).items():
        sizes = options_from_shapes("sit", {key: tuple(shape) for key, shape in entry["keys"].items()})
        assert sizes["patch_size"] == int(name[-1])
        assert (sizes["input_size"], sizes["num_classes"], sizes["learn_sigma"]) == (32, 1000, True)
        assert sizes["depth"] == {"S": 12, "B": 12, "L": 24, "X": 28}[name[4]]


def test_header_of_our_files(tmp_path):
    save_model(tmp_path / "model.safetensors", network().state_dict(), OPTIONS)
    assert saved_model_options(tmp_path / "model.safetensors") == OPTIONS
    assert options_from_shapes("sit", safetensors_shapes(tmp_path / "model.safetensors")) == SIZES


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02\x00\x00\x00\x00\x00\x00\x00[]",
        b"\xff" * 8 + b"{}",
        b"\x04\x00\x00\x00\x00\x00\x00\x00{{}}",
        b"\x08\x00\x00\x00\x00\x00\x00\x00" + b'{"a": 1}',
        b"\x3f\x00\x00\x00\x00\x00\x00\x00"
        + b'{"a":{"dtype":"F32","shape":"[2]","data_offsets":[0,8]}}       '
        + b"\0" * 8,
    ],
)
def test_garbled_headers(tmp_path, content):
    path = tmp_path / "garbled.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"weights file '{path}' is truncated or is not a safetensors file"):
        safetensors_shapes(path)


def test_longer_or_shorter_data_than_the_header_says(tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copyfile(GOLDEN / "model_b.safetensors", path)
    whole = path.read_bytes()
    for content in (whole[:-4], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"has {len(content)} bytes where its header asks for {len(whole)}"):
            safetensors_shapes(path)


def test_headers_are_read_without_torch():
    code = "import sys, mixflow.runtime.weights_header; assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
