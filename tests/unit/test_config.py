"""The config: what it refuses and how it says so, and which slices a change touches."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

from mixflow import config as module
from mixflow.config import (
    Config,
    FixedStep,
    check_image,
    check_latents,
    check_weights_file,
    load_config,
    resolve,
    slice_key,
    to_json,
)
from mixflow.config.samplers import CORRECTIONS
from mixflow.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG, REHEARSAL = ROOT / "config.yaml", ROOT / "rehearsal.yaml"

BASE = yaml.safe_load("""
image: docker://localhost/mixflow
datasets:
  digits: {kind: digits, resolution: 32, num_classes: 10, num_held_out: 360, seed: 0, reference: digits}
autoencoders:
  pixels: {kind: pixels}
latents:
  digits: {dataset: digits, autoencoder: pixels, shard_size: 512}
checkpoints:
  base:
    train:
      init: scratch
      latents: digits
      model: {family: sit, hidden_size: 64, depth: 3, num_heads: 4, patch_size: 8, learn_sigma: false,
              label_dropout: 0.1}
      interpolant: linear
      law: uniform
      gamma: 0.0
      shift: 1.0
      num_steps: 3000
      batch_size: 128
      learning_rate: 1.0e-3
      betas: [0.9, 0.999]
      weight_decay: 0.0
      warmup_steps: 100
      gradient_clip: 1.0
      ema_decay: 0.999
      horizontal_flip: false
      precision: fp32
      compile: false
      seed: 0
  mixflow:
    extends: base
    train: {init: base, law: mixflow, gamma: 0.8, num_steps: 1500, model: null}
samplers:
  euler50:
    solver: euler
    num_steps: 50
    guidance: {scale: 1.0, channels: all, interval: [0.0, 1.0]}
    labels: balanced
    num_images: 2000
    to_uint8: round
    state: float32
    precision: fp32
    seed: 100
  euler50-cfg2:
    extends: euler50
    guidance: {scale: 2.0}
extractors:
  small: {kind: classifier, latents: digits, width: 32, num_features: 64, num_steps: 600, batch_size: 128,
          learning_rate: 2.0e-3, seed: 0}
references:
  digits: {latents: digits, extractor: small}
tables:
  demo:
    title: Demo
    paper: false
    columns: [{sampler: euler50, metric: fd}, {sampler: euler50-cfg2, metric: accuracy}]
    rows: [{checkpoint: base, label: base}, {checkpoint: mixflow, label: MixFlow, paper: [1.5, null]}]
    figures: [samples]
  quoted:
    title: Quoted
    paper: true
    columns: [{label: 250 steps, metric: fid}]
    rows: [{quoted: true, name: sit, label: SiT, paper: [9.35]}]
""")


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Return BASE with values set at dotted paths (slashes, for names hold dots); a value of ... removes the key."""
    raw = copy.deepcopy(BASE)
    for path, value in copy.deepcopy(changes).items():
        *parents, last = path.split("/")
        node: Any = raw
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[int(last)] = value
        elif value is ...:
            del node[last]
        else:
            node[last] = value
    return raw


TRAIN = "checkpoints/base/train"
WEIGHTS = {"file": "own.pt", "latents": "digits", "model": BASE["checkpoints"]["base"]["train"]["model"]}
SDE = {
    "extends": "euler50",
    "solver": "euler_maruyama",
    "diffusion": {"form": "sigma", "norm": 1.0},
    "last_step": "mean",
    "last_step_size": 0.04,
}

DOPRI5 = {
    "solver": "dopri5", "atol": 1e-6, "rtol": 1e-3, "labels": "balanced", "num_images": 100, "to_uint8": "round",
    "guidance": {"scale": 1.0, "channels": "all", "interval": [0.0, 1.0]}, "state": "float32", "precision": "fp32",
    "seed": 0,
}  # fmt: skip
SCALING = {"factor": 1.01, "start": 0.1}
SHIFT = {"window": 0.03, "interval": [0.01, 0.7]}
CORRECTION = {"band": "low", "strength": 0.02}
ROLLOUT = {"step_size": 0.025, "weight": 1.0, "min_remaining": 0.05}
CLOCK = {"interpolant": "linear", "width": 4, "num_steps": 10, "batch_size": 8, "learning_rate": 1e-3,
         "precision": "fp32", "seed": 0}  # fmt: skip

# ImageNet in an autoencoder's latents, a published network, and its post-training with REPA's alignment.
IMAGENET: dict[str, Any] = {
    "downloads/vae": {"repo": "a/vae", "revision": "main", "files": ["config.json", "vae.safetensors"]},
    "downloads/dino": {"url": "https://example.org/dino.pth", "files": ["dino.pth"]},
    "downloads/own": {"folder": "weights", "files": ["own.pt"]},
    "datasets/imagenet": {"kind": "imagenet", "folder": "data", "resolution": 64, "num_classes": 5, "num_images": 50,
                          "reference": "digits"},
    "autoencoders/vae": {"kind": "sd_vae", "download": "vae", "channels": 4, "downsampling": 8, "scale": 0.18215,
                         "precision": "fp32"},
    "latents/imagenet": {"dataset": "imagenet", "autoencoder": "vae", "shard_size": 16},
    "latents/imagenet-pixels": {"dataset": "imagenet", "autoencoder": "pixels", "shard_size": 16},
    "encoders/dino": {"kind": "dinov2", "download": "dino", "num_features": 64},
    "checkpoints/own": {"weights": {"download": "own", "latents": "imagenet", "model": {
        "family": "repa", "hidden_size": 64, "depth": 3, "num_heads": 4, "patch_size": 2, "label_dropout": 0.1,
        "encoder_depth": 2, "z_dims": [64], "projector_dim": 32, "qk_norm": False}}},
    "checkpoints/aligned": {"extends": "base", "train": {"init": "own", "latents": "imagenet", "model": None,
        "align": {"encoder": "dino", "images": "imagenet-pixels", "coefficient": 0.5}}},
}  # fmt: skip

# RAE: representation latents that are encoded from pixels while training, post-training, and a sampler with a guide.
RAE: dict[str, Any] = {
    "downloads/encoder": {"folder": "rae", "files": ["config.json", "model.safetensors"]},
    "downloads/decoder": {"folder": "rae", "files": ["model.pt"]},
    "downloads/statistics": {"folder": "rae", "files": ["stat.pt"]},
    "downloads/weights": {"folder": "rae", "files": ["stage2_model.pt"]},
    "datasets/imagenet": IMAGENET["datasets/imagenet"],
    "autoencoders/rae": {"kind": "rae", "encoder_kind": "dinov2_with_registers", "encoder": "encoder",
                         "decoder": "decoder", "statistics": "statistics",
                         "encoder_size": 56, "encoder_patch": 14, "decoder_heads": 2, "channels": 32,
                         "downsampling": 16, "precision": "fp32"},
    "latents/imagenet-pixels": IMAGENET["latents/imagenet-pixels"],
    "latents/imagenet-rae": {"dataset": "imagenet", "autoencoder": "rae", "encoded_from": "imagenet-pixels"},
    "checkpoints/rae": {"weights": {"download": "weights", "latents": "imagenet-rae", "model": {
        "family": "rae", "hidden_size": [32, 48], "depth": [2, 1], "num_heads": [2, 2], "label_dropout": 0.1}}},
    "checkpoints/rae-small": {"extends": "rae", "weights": {"model": {"hidden_size": [16, 48], "depth": [1, 1]}}},
    "checkpoints/rae-mixflow": {"extends": "base", "train": {
        "init": "rae", "latents": "imagenet-rae", "model": None, "law": "mixflow", "gamma": 0.4, "shift": 6.9,
        "horizontal_flip": True, "decay": {"start_step": 10, "end_step": 20, "learning_rate": 1e-5}}},
    "samplers/rae": {"extends": "euler50", "num_images": 20, "labels": "balanced_shuffled",
                     "grid": {"shift": 4.0, "end": 0.9}},
    "samplers/rae-guided": {"extends": "rae", "guidance": {"scale": 1.5, "guide": "rae-small"}},
    "tables/rae": {"title": "RAE", "paper": False, "columns": [{"sampler": "rae-guided", "metric": "fd"}],
                   "rows": [{"checkpoint": "rae-mixflow", "label": "MixFlow"}]},
}  # fmt: skip

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({**RAE, "autoencoders/rae/encoder_size": 112},
     "latents.imagenet-rae.autoencoder: 'rae' sees images at 112 pixels, which makes 8x8 tokens, but latents of 64 "
     "pixels are 4x4: set encoder_size to 56"),
    ({**RAE, "autoencoders/rae/encoder_size": 60},
     "autoencoders.rae.encoder_size: 60 is no multiple of encoder_patch 14: RAE takes 224 pixels for images of 256"),
    ({**RAE, "autoencoders/rae/statistics": "stats"},
     "autoencoders.rae.statistics: 'stats' is not one of the downloads; did you mean 'statistics'?"),
    ({**RAE, "latents/imagenet-rae/shard_size": 16},
     "latents.imagenet-rae: latents have either 'shard_size' (they are cached) or 'encoded_from' (they are encoded"),
    ({**RAE, "latents/imagenet-rae/mirrors": True},
     "latents.imagenet-rae.mirrors: says what a cache holds, but with 'encoded_from' there is none: leave it out"),
    ({**RAE, "latents/imagenet-rae/encoded_from": "imagenet-pixel"},
     "latents.imagenet-rae.encoded_from: 'imagenet-pixel' is not one of the latents; did you mean 'imagenet-pixels'?"),
    ({**RAE, "latents/imagenet-rae/encoded_from": "digits"},
     "latents.imagenet-rae.encoded_from: 'digits' holds 'digits', not 'imagenet': name pixels of that dataset"),
    ({**RAE, "latents/imagenet-rae": {"dataset": "imagenet", "autoencoder": "rae", "shard_size": 16}},
     "latents.imagenet-rae.mirrors: missing, and nothing has a default: write false (0 GB), or true (0 GB), which"),
    ({**RAE, "latents/imagenet-rae": {
        "dataset": "imagenet", "autoencoder": "rae", "shard_size": 16, "mirrors": False}},
     "checkpoints.rae-mixflow.train.horizontal_flip: the cached latents 'imagenet-rae' hold no mirror images, and "
     "tokens of a mirror image are not the flipped tokens: write false, or mirrors: true there"),
    ({**IMAGENET, "latents/imagenet/mirrors": True},
     "latents.imagenet.mirrors: goes with an autoencoder of kind rae, and 'vae' is of kind sd_vae: leave it out"),
    ({**RAE, "checkpoints/rae/weights/model/size": "DH-XL"},
     "checkpoints.rae.weights.model.hidden_size: [32, 48] contradicts size: DH-XL: write one of the two"),
    ({**RAE, "checkpoints/rae/weights/model/num_heads": [3, 2]},
     "checkpoints.rae.weights.model.hidden_size: 32 of the trunk is no multiple of four times its num_heads 3"),
    ({**RAE, "checkpoints/rae-mixflow/train/model": {"family": "rae", "hidden_size": [32, 64], "depth": [2, 1],
                                                     "num_heads": [2, 2], "label_dropout": 0.1,
                                                     "patch_size": None, "learn_sigma": None}},
     "checkpoints.rae-mixflow.train.model.hidden_size: [32, 64] differs from the [32, 48] of 'rae', which it starts "
     "from: leave model out to inherit it"),
    ({**RAE, "checkpoints/rae-mixflow/train/law": ["mixflow", "logit_normal"]},
     "checkpoints.rae-mixflow.train.law: ['mixflow', 'logit_normal'] is not one law: mixflow draws t ~ Beta(2,1) in "
     "the place of logit_normal or any other, and slows m on top: write one of them"),
    ({**RAE, "checkpoints/rae-mixflow/train/law": "logit_normal+mixflow"},
     "checkpoints.rae-mixflow.train.law: 'logit_normal+mixflow' is not one law: mixflow draws t ~ Beta(2,1) in"),
    ({**RAE, "checkpoints/rae-mixflow/train/time_dist_type": "logit-normal_0_1"},
     "checkpoints.rae-mixflow.train.time_dist_type: 'logit-normal_0_1' is how RAE's files name the law of t, which is "
     "'law' here: write law: mixflow, whose Beta(2,1) takes its place, or law: logit_normal for RAE's own training"),
    ({**RAE, "checkpoints/rae-mixflow/train/decay/end_step": 10},
     "checkpoints.rae-mixflow.train.decay.start_step: 10 is not before end_step 10: lower it"),
    ({**RAE, "samplers/rae/num_images": 21},
     "samplers.rae-guided.num_images: 21 is no multiple of the 5 classes of 'rae-mixflow', as labels: "
     "balanced_shuffled asks for: write one, or take labels: balanced"),
    ({**RAE, "samplers/rae/grid/end": 1.5}, "samplers.rae.grid.end: 1.5 is out of range: it must be at most 1"),
    ({**RAE, "samplers/rae-guided/guidance/guide": "rae-smal"},
     "samplers.rae-guided.guidance.guide: 'rae-smal' is not one of the checkpoints; did you mean 'rae-small'?"),
    ({**RAE, "samplers/rae-guided/guidance/guide": "base"},
     "samplers.rae-guided.guidance.guide: 'base' makes latents 32x32x1 of 'pixels', but those of 'rae-mixflow' are "
     "4x4x32 of 'rae': take a sampler whose guide was trained on the same latents"),
    ({**RAE, "checkpoints/rae-small/weights/interpolant": "gvp"},
     "samplers.rae-guided.guidance.guide: 'rae-small' has another interpolant than 'rae-mixflow': name another guide"),
    ({**RAE, "samplers/rae-guided/guidance/scale": 1.0},
     "samplers.rae-guided.guidance.guide: has no effect at scale 1.0: leave it out, or write another scale"),
    ({**RAE, "samplers/rae-guided/guidance/channels": 1},
     "samplers.rae-guided.guidance.channels: 1, but a guide acts on all channels: write all"),
    ({f"{TRAIN}/learning_rate": "1e-5"},
     "checkpoints.base.train.learning_rate: '1e-5' is text, YAML needs a dot: write 1.0e-5"),
    ({f"{TRAIN}/learning_rate": "1.0e5"},
     "checkpoints.base.train.learning_rate: '1.0e5' is text, YAML needs a sign in the exponent: write 1.0e+5"),
    ({f"{TRAIN}/learning_rate": "1e-4x"},
     "checkpoints.base.train.learning_rate: '1e-4x' is text where a number is needed: write a number"),
    ({f"{TRAIN}/learning_rate": True}, "checkpoints.base.train.learning_rate: True is not a number: write a number"),
    ({f"{TRAIN}/learning_rate": 0.0}, "checkpoints.base.train.learning_rate: 0.0 is out of range: it must be above 0"),
    ({f"{TRAIN}/num_steps": "1e4"},
     "checkpoints.base.train.num_steps: '1e4' is text, YAML reads no exponents here: write 10000"),
    ({f"{TRAIN}/num_steps": 2.5},
     "checkpoints.base.train.num_steps: 2.5 is not a whole number: write a whole number"),
    ({f"{TRAIN}/gamma": 1.5}, "checkpoints.base.train.gamma: 1.5 is out of range: it must be at most 1"),
    ({f"{TRAIN}/gamma": 0.4},
     "checkpoints.base.train.gamma: 0.4 has no effect under law 'uniform': write 0.0, or a law of mixflow, matched, "
     "blind"),
    ({"checkpoints/mixflow/train/gamma": 0},
     "checkpoints.mixflow.train.gamma: law 'mixflow' needs a gamma above 0: write one, or take law 'beta' (m = t)"),
    ({f"{TRAIN}/law": "mixfow"}, "checkpoints.base.train.law: 'mixfow' is not known; did you mean 'mixflow'?"),
    ({f"{TRAIN}/precision": "fp31"}, "checkpoints.base.train.precision: 'fp31' is not known; did you mean 'fp32'?"),
    ({f"{TRAIN}/compile": "maybe"},
     "checkpoints.base.train.compile: 'maybe' is neither true nor false: write one of them"),
    ({f"{TRAIN}/learning_rat": 0.1},
     "checkpoints.base.train: 'learning_rat' is not a key here; did you mean 'learning_rate'?"),
    ({f"{TRAIN}/learning_rate": ...},
     "checkpoints.base.train.learning_rate: missing, and nothing has a default: add it"),
    ({f"{TRAIN}/model": ...}, "checkpoints.base.train.model: missing, and nothing has a default: add it"),
    ({f"{TRAIN}/model/num_heads": 5},
     "checkpoints.base.train.model.hidden_size: 64 is not divisible by num_heads (5)"),
    ({f"{TRAIN}/model/patch_size": 5},
     "checkpoints.base: patch_size 5 does not divide the latents of 'digits', which are 32 wide: take one that does"),
    ({f"{TRAIN}/model/size": "B/2"},
     "checkpoints.base.train.model.depth: 3 contradicts size: B/2: write one of the two"),
    ({f"{TRAIN}/model": {"family": "sit", "size": "XXL/2", "learn_sigma": False, "label_dropout": 0.1}},
     "checkpoints.base.train.model.size: 'XXL/2' is not known; did you mean 'XL/2'?"),
    ({f"{TRAIN}/latents": "digit"},
     "checkpoints.base.train.latents: 'digit' is not one of the latents; did you mean 'digits'?"),
    ({f"{TRAIN}/init": "scrath"},
     "checkpoints.base.train.init: 'scrath' is not one of the checkpoints; did you mean 'scratch'?"),
    ({f"{TRAIN}/init": "mixflow"},
     "checkpoints.base.train.init: base -> mixflow -> base never ends: start one from scratch"),
    ({"checkpoints/mixflow/train/model": {"depth": 4}},
     "checkpoints.mixflow.train.model.depth: 4 differs from the 3 of 'base', which it starts from: leave model out to "
     "inherit it"),
    ({"checkpoints/mixflow/extends": "bas"},
     "checkpoints.mixflow.extends: 'bas' is not one of the checkpoints; did you mean 'base'?"),
    ({"checkpoints/base/extends": "mixflow"},
     "checkpoints.base.extends: base -> mixflow -> base never ends: remove one of them"),
    ({"checkpoints/base/weights": WEIGHTS},
     "checkpoints.base: a checkpoint has either 'train', 'weights' or 'exact': write one of them"),
    ({"checkpoints/Base": {}},
     "checkpoints: the entry name 'Base' cannot be used in paths: take lower-case letters, digits, dots, hyphens and "
     "underscores, a letter or digit first, and not the word 'scratch'"),
    ({"checkpoints/../x": {}}, "checkpoints: the entry name '..' cannot be used in paths"),
    ({"samplers/euler50/num_steps": 0}, "samplers.euler50.num_steps: 0 is out of range: it must be at least 1"),
    ({"samplers/euler50/solver": "eulr"}, "samplers.euler50.solver: 'eulr' is not known; did you mean 'euler'?"),
    ({"samplers/euler50/solver": ...}, "samplers.euler50.solver: missing, and nothing has a default: add it"),
    ({"samplers/euler50/num_step": 3}, "samplers.euler50: 'num_step' is not a key here; did you mean 'num_steps'?"),
    ({"samplers/euler50/guidance/interval": [0.9, 0.1]},
     "samplers.euler50.guidance.interval: [0.9, 0.1] is in the wrong order: write [0.1, 0.9]"),
    ({"samplers/euler50/guidance/interval": [0.1, 1.2]},
     "samplers.euler50.guidance.interval.1: 1.2 is out of range: it must be at most 1"),
    ({"samplers/euler50/guidance/channels": 0},
     "samplers.euler50.guidance.channels: 0 is not a number of channels: write a whole number above 0, or all"),
    ({"samplers/euler50/guidance/channels": 3},
     "samplers.euler50.guidance.channels: 3 is more than the 1 of the latents of 'base': write a smaller number, or"),
    ({f"{TRAIN}/model/label_dropout": 0.0},
     "samplers.euler50-cfg2.guidance.scale: 2 cannot be used with 'base', whose label_dropout 0 leaves it without a "
     "null class: take a sampler with scale 1.0"),
    ({"samplers/sde": {**SDE, "time_shift": SHIFT}},
     "samplers.sde.time_shift: is defined for ODE solvers of fixed steps, not for euler_maruyama: take euler or heun"),
    ({"samplers/euler50": {**DOPRI5, "epsilon_scaling": SCALING}},
     "samplers.euler50.epsilon_scaling: is defined for ODE solvers of fixed steps, not for dopri5: take euler or heun"),
    ({"samplers/euler50/solver": "midpoint", "samplers/euler50/differential_correction": CORRECTION},
     "samplers.euler50.differential_correction: is defined for euler and heun, not for midpoint: take one of them"),
    ({"samplers/euler50/differential_correction": {**CORRECTION, "band": "high"}},
     "samplers.euler50.differential_correction.band: 'high' is not known"),
    ({"samplers/euler50/epsilon_scaling": {**SCALING, "start": 0}},
     "samplers.euler50.epsilon_scaling.start: 0 is out of range: it must be above 0"),
    ({"samplers/euler50/epsilon_scaling": {**SCALING, "factor": 0.0}},
     "samplers.euler50.epsilon_scaling.factor: 0.0 is out of range: it must be above 0"),
    ({"samplers/euler50/epsilon_scaling": SCALING, f"{TRAIN}/interpolant": "gvp"},
     "samplers.euler50.epsilon_scaling: its formula is that of the linear path, and the interpolant of 'base' is gvp: "
     "take a checkpoint with interpolant linear"),
    ({"samplers/euler50/time_shift": {**SHIFT, "interval": [0.7, 0.1]}},
     "samplers.euler50.time_shift.interval: [0.7, 0.1] is in the wrong order: write [0.1, 0.7]"),
    ({"samplers/euler50/time_shift": SHIFT},
     "samplers.euler50.time_shift: there is no clock for 'digits', the latents of 'base': add an entry of that name"),
    ({"samplers/euler50/differential_correction": CORRECTION, "datasets/digits/resolution": 31,
      f"{TRAIN}/model/patch_size": 31},
     "samplers.euler50.differential_correction.band: low takes blocks of 2x2, into which the latents of 'base', 31 "
     "wide, cannot be cut: write pixel"),
    ({f"{TRAIN}/self_rollout": ROLLOUT, f"{TRAIN}/interpolant": "gvp"},
     "checkpoints.base.train.self_rollout: its target is a straight line to the data, which interpolant 'gvp' does not "
     "follow: write linear, or leave it out"),
    ({f"{TRAIN}/self_rollout": {**ROLLOUT, "step_size": 0.0}},
     "checkpoints.base.train.self_rollout.step_size: 0.0 is out of range: it must be above 0"),
    ({f"{TRAIN}/input_perturbation": -0.1},
     "checkpoints.base.train.input_perturbation: -0.1 is out of range: it must be at least 0"),
    ({f"{TRAIN}/endpoint_target": {"min_remaining": 0.05}, f"{TRAIN}/law": "matched", f"{TRAIN}/gamma": 0.8},
     "checkpoints.base.train.endpoint_target: under law 'matched' the input lies where the label says, so that it is "
     "the plain target: leave it out, or take a law of mixflow, blind, uniform_slowed"),
    ({"samplers/sde": {**SDE, "last_step": "none"}},
     "samplers.sde.last_step_size: 0.04 contradicts last_step: none: write 0.0"),
    ({"samplers/sde": SDE, "checkpoints/own": {"weights": WEIGHTS}, "tables/demo/columns/0/sampler": "sde",
      "tables/demo/rows/0/checkpoint": "own"},
     "checkpoints.own.weights.interpolant: missing, but the SDE sampler 'sde' needs it: add linear or gvp"),
    ({"datasets/digits/num_held_out": 1797},
     "datasets.digits.num_held_out: 1797 leaves none of the 1797 digits: write a smaller number"),
    ({"datasets/digits/reference": "digit"},
     "datasets.digits.reference: 'digit' is not one of the references; did you mean 'digits'?"),
    ({"references/digits/extractor": "smal"},
     "references.digits.extractor: 'smal' is not one of the extractors; did you mean 'small'?"),
    ({"latents/digits/autoencoder": "pixel"},
     "latents.digits.autoencoder: 'pixel' is not one of the autoencoders; did you mean 'pixels'?"),
    ({"tables/demo/rows/0/checkpoint": "bass"},
     "tables.demo.rows.bass.checkpoint: 'bass' is not one of the checkpoints; did you mean 'base'?"),
    ({"tables/demo/columns/0/sampler": "euler5"},
     "tables.demo.columns.0.sampler: 'euler5' is not one of the samplers; did you mean 'euler50'?"),
    ({"tables/demo/columns/0/sampler": ...},
     "tables.demo.columns.0.sampler: missing, but the row of 'base' is to be measured: add it"),
    ({"tables/demo/columns/0/metric": "fdd"}, "tables.demo.columns.0.metric: 'fdd' is not known; did you mean 'fd'?"),
    ({"tables/demo/columns/0/metric": "fid"},
     "tables.demo.columns.0.metric: 'fid' cannot be had from digits, with which 'base' is compared; did you mean "
     "'fd'?"),
    ({"tables/demo/rows/1/checkpoint": "base"},
     "tables.demo.rows: 'base' stands there 2 times: give one of them another name"),
    ({"tables/demo/rows/0/name": "a b"}, "tables.demo.rows: the name 'a b' cannot be used in paths"),
    ({"tables/demo/rows/1/paper": [1.5]},
     "tables.demo.rows.mixflow.paper: 1 numbers for 2 columns: write one for each, null where the paper has none"),
    ({"tables/demo/rows/0": {"label": "x"}},
     "tables.demo.rows.0: the row 'x' needs a 'checkpoint': name one, or write quoted: true"),
    ({"tables/demo/rows/0/label": 5}, "tables.demo.rows.0.label: 5 is not text: put it in quotes"),
    ({"tables/demo/figures": ["sample"]}, "tables.demo.figures.0: 'sample' is not known; did you mean 'samples'?"),
    ({**IMAGENET, "downloads/vae/url": "https://example.org/x"},
     "downloads.vae: a download has one of 'repo', 'url' and 'folder', here repo and url: write one, set others null"),
    ({**IMAGENET, "downloads/vae/revision": ...},
     "downloads.vae.revision: goes with 'repo', so that a moving repository is noticed: write both or neither"),
    ({**IMAGENET, "downloads/vae/sha256": {"confg.json": "0" * 64}},
     "downloads.vae.sha256.confg.json: is not one of the files; did you mean 'config.json'?"),
    ({**IMAGENET, "downloads/vae/sha256": {"config.json": "0"}}, "downloads.vae.sha256.config.json: '0' does not fit"),
    ({**IMAGENET, "autoencoders/vae/download": "va"},
     "autoencoders.vae.download: 'va' is not one of the downloads; did you mean 'vae'?"),
    ({**IMAGENET, "datasets/imagenet/resolution": 60},
     "latents.imagenet.autoencoder: 'vae' takes colour images whose size is a multiple of 8, but 'imagenet' has 3 "
     "channels at 60: name another dataset or autoencoder"),
    ({**IMAGENET, "checkpoints/own/weights/file": "own.pt"},
     "checkpoints.own.weights: weights have either 'file' or 'download': write one of the two"),
    ({**IMAGENET, "checkpoints/own/weights/sha256": "0" * 64},
     "checkpoints.own.weights.sha256: stands in the entry of the download: move it there"),
    ({**IMAGENET, "checkpoints/own/weights/model/encoder_depth": 4},
     "checkpoints.own.weights.model.encoder_depth: 4 is beyond the 3 blocks: lower it"),
    ({**IMAGENET, "encoders/dino/num_features": 768},
     "checkpoints.aligned.train.align.encoder: 'dino' has 768 features but the projectors of 'aligned' have [64]: name "
     "the encoder that they were made for"),
    ({**IMAGENET, "checkpoints/aligned/train/align/images": "imagenet"},
     "checkpoints.aligned.train.align.images: 'imagenet' holds no pixels: name latents with the autoencoder pixels"),
    ({**IMAGENET, "checkpoints/aligned/train/align/images": "digits"},
     "checkpoints.aligned.train.align.images: 'digits' holds 'digits', the latents are of 'imagenet': name pixels of "
     "the same dataset"),
    ({"encoders/dino": IMAGENET["encoders/dino"], "downloads/dino": IMAGENET["downloads/dino"],
      f"{TRAIN}/align": {"encoder": "dino", "images": "digits", "coefficient": 0.5}},
     "checkpoints.base.train.align: a sit network has no projectors to align: take family repa, or leave it out"),
    ({"references/digits/download": "x"},
     "references.digits: a reference has either 'latents' or 'download': write one of the two"),
    ({"tables/demo/rows/0/samplers": {"euler5": "euler50"}},
     "tables.demo.rows.base.samplers: no column has the sampler 'euler5' to take the place of"),
    ({"tables/demo/rows/1/against": "bas"},
     "tables.demo.rows.mixflow.against: 'bas' is not a row of this table; did you mean 'base'?"),
    ({"tables/demo/rows/1/against": "mixflow"},
     "tables.demo.rows.mixflow.against: a row cannot be its own control: name another one"),
    ({"tables/demo/rows/0": {"quoted": True, "name": "own", "label": "x", "paper": [1.0, None]},
      "tables/demo/rows/1/against": "own"},
     "tables.demo.rows.mixflow.against: 'own' is quoted, so nothing is measured there to compare: leave it out"),
    ({"tables/demo/rows/0": {"quoted": True, "name": "own", "label": "x", "paper": [1.0, None], "against": "mixflow"}},
     "tables.demo.rows.own.against: 'own' is quoted, so nothing is measured there to compare: leave it out"),
    ({"tables/demo/rows/0/paper_labels": "random"},
     "tables.demo.rows.0.paper_labels: the row 'base' has no numbers of the paper: leave it out"),
    ({"tables/demo/rows/1/paper_labels": "even"},
     "tables.demo.rows.1.paper_labels: 'even' is not known; known: balanced, random"),
    ({"tables/demo/rows/0/samplers": {"euler50": "euler5"}},
     "tables.demo.rows.base.samplers: 'euler5' is not one of the samplers; did you mean 'euler50'?"),
    ({"sampler": {}}, "'sampler' is not a key here; did you mean 'samplers'?"),
    ({"samplers": ...}, "samplers: missing, and nothing has a default: add it"),
    ({"samplers": 3}, "samplers: 3 is not a mapping: write keys and values"),
    ({"samplers/euler50": 3}, "samplers.euler50: 3 is not a mapping: write keys and values"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES, ids=[sentence[:60] for _, sentence in MISTAKES])
def test_mistakes_are_named_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(changed(changes))
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_base_is_right() -> None:
    resolve(BASE)  # else the mistakes above could be found for other reasons


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml' does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("datasets:\n  digits: {kind: digits\nlatents: 3\n")
    with pytest.raises(UserError, match=r"broken\.yaml' line 3 is not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="holds no sections"):
        load_config(tmp_path / "list.yaml")


def as_text(value: Any) -> Any:
    """Return what Snakemake's `--config` makes of nested values: text at every leaf."""
    if isinstance(value, dict):
        return {key: as_text(part) for key, part in value.items()}
    if isinstance(value, list):
        return [as_text(part) for part in value]
    return value if isinstance(value, str) else yaml.safe_dump(value).removesuffix("...\n").strip()


def test_values_from_the_command_line_are_text() -> None:
    raw = as_text(changed({"checkpoints/mixflow/train/model": ...}))
    assert raw["checkpoints"]["base"]["train"]["num_steps"] == "3000"
    assert resolve(raw) == resolve(BASE)
    raw["checkpoints"]["base"]["train"]["learning_rate"] = "1e-3"
    with pytest.raises(UserError, match=r"write 1\.0e-3"):
        resolve(raw)


def test_whole_numbers_and_decimals_give_one_slice() -> None:
    whole = resolve(changed({"samplers/euler50-cfg2/guidance/scale": 2}))
    assert to_json(whole.slice("sample", "base", "euler50-cfg2")) == to_json(
        resolve(BASE).slice("sample", "base", "euler50-cfg2")
    )


def test_size_shorthand() -> None:
    model = {"family": "sit", "size": "XL/8", "learn_sigma": True, "label_dropout": 0.1}
    resolved = resolve(changed({f"{TRAIN}/model": model})).slice("train", "base")["train"]["model"]
    assert resolved == {
        "family": "sit", "hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 8, "learn_sigma": True,
        "label_dropout": 0.1, "input_size": 32, "in_channels": 1, "num_classes": 10,
    }  # fmt: skip


def test_post_training_inherits_its_model() -> None:
    config = resolve(BASE)
    assert config.slice("train", "mixflow")["train"]["model"] == config.slice("train", "base")["train"]["model"]
    own = {"own": {"weights": WEIGHTS}, "own-mixflow": {"extends": "mixflow", "train": {"init": "own"}}}
    config = resolve(changed({f"checkpoints/{name}": entry for name, entry in own.items()}))
    assert config.slice("train", "own-mixflow")["train"]["model"]["depth"] == 3
    assert config.parent("own-mixflow") == "own"
    assert config.imported_checkpoints() == ["own"]
    assert config.slice("import_weights", "own")["weights"]["model"]["num_heads"] == 4


def test_null_takes_keys_and_entries_away() -> None:
    config = resolve(changed({f"{TRAIN}/gradient_clip": None, "tables/quoted": None}))
    assert "gradient_clip" not in config.slice("train", "base")["train"]
    assert config.paper_tables() == []


def test_lookups() -> None:
    config = resolve(BASE)
    assert config.parent("mixflow") == "base"
    assert config.parent("base") is None
    assert config.latents_of("mixflow") == "digits"
    assert config.reference_of("mixflow") == "digits"
    assert config.paper_tables() == ["quoted"]
    assert config.cells("quoted") == []
    assert config.cells("demo", "mixflow") == [("mixflow", "euler50"), ("mixflow", "euler50-cfg2")]
    with pytest.raises(UserError, match="did you mean 'mixflow'"):
        config.slice("row", "demo", "mixflo")
    with pytest.raises(UserError, match="did you mean 'demo'"):
        config.slice("render", "dem")


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({}, 50),
        ({"solver": "heun", "num_steps": 10}, 20),
        ({"solver": "rk4", "num_steps": 10}, 40),
        ({"guidance": {"scale": 2.0}}, 100),
        ({"num_steps": 10, "guidance": {"scale": 2.0, "interval": [0.3, 0.7]}}, 15),  # t = .3 .4 .5 .6 .7
        ({**SDE, "num_steps": 250}, 250),
        ({"solver": "heun_repa", "num_steps": 10}, 19),
        # REPA: "250 steps, hi 0.7: 172 of 250 calls guided"
        ({**SDE, "num_steps": 250, "guidance": {"scale": 1.8, "interval": [0.3, 1.0]}}, 250 + 172),
        ({"solver": "dopri5", "num_steps": None, "atol": 1e-6, "rtol": 1e-3}, None),
    ],
)
def test_network_calls_per_image(settings: dict[str, Any], calls: int | None) -> None:
    config = resolve(changed({"samplers/other": {"extends": "euler50", **settings}}))
    assert config.slice("evaluate", "base", "other").get("network_calls_per_image") == calls


@pytest.mark.parametrize(
    ("settings", "calls", "read", "described"),
    [
        ({"epsilon_scaling": SCALING}, 50, 0, "Euler 50, noise / 1.01 from t = 0.1"),
        ({"time_shift": SHIFT}, 50, 35, "Euler 50, labels by the clock within 0.015 for t in [0.01, 0.7]"),
        ({"time_shift": SHIFT, "solver": "heun", "num_steps": 10}, 20, 14, None),  # steps from and to .1 ... .7
        ({"time_shift": SHIFT, "guidance": {"scale": 2.0}}, 100, 35, None),  # both calls are told the same
        ({"differential_correction": CORRECTION}, 50, 0, "Euler 50, low correction 0.02"),
    ],
)
def test_corrections_cost_no_calls_of_the_network(
    settings: dict[str, Any], calls: int, read: int, described: str | None
) -> None:
    config = resolve(changed({"clocks": {"digits": CLOCK}, "samplers/other": {"extends": "euler50", **settings}}))
    assert config.slice("evaluate", "base", "other")["network_calls_per_image"] == calls
    sampler = config.samplers["other"]
    assert isinstance(sampler, FixedStep)
    assert len(sampler.clock_times) == read
    assert ("clock" in config.slice("sample", "base", "other")) == (read > 0)
    assert described is None or sampler.description == described


def test_entries_without_an_arm_have_no_key_of_one() -> None:
    """What was made before there were arms is what the config asks for still."""
    config = resolve(changed({}))
    assert not {"input_perturbation", "self_rollout", "endpoint_target"} & config.slice("train", "base")["train"].keys()
    sampled = config.slice("sample", "base", "euler50")
    assert not {*CORRECTIONS, "clock"} & {*sampled, *sampled["sampler"]}


def every_slice(config: Config) -> dict[str, str]:
    """Return the JSON of every job's settings."""
    jobs: list[tuple[str, ...]] = [
        ("cache_latents", name) for name, entry in config.latents.items() if entry.encoded_from is None
    ]
    jobs += [("train", name) for name in config.trained_checkpoints()]
    jobs += [("download", name) for name in config.downloads]
    jobs += [("import_weights", name) for name in config.imported_checkpoints()]
    jobs += [("train_extractor", name) for name, entry in config.extractors.items() if entry.kind == "classifier"]
    jobs += [("make_reference", name) for name in config.references]
    for table, entry in config.tables.items():
        jobs += [(stage, *pair) for pair in config.cells(table) for stage in ("sample", "evaluate")]
        jobs += [("row", table, row.key) for row in entry.rows] + [("render", table)]
    return {" ".join(job): to_json(config.slice(*job)) for job in jobs}


ALL_SAMPLES = {f"sample {c} {s}" for c in ("base", "mixflow") for s in ("euler50", "euler50-cfg2")}
ALL_METRICS = {name.replace("sample", "evaluate") for name in ALL_SAMPLES}
GUIDED = {name for name in ALL_SAMPLES | ALL_METRICS if name.endswith("cfg2")}
ROWS = {"row demo base", "row demo mixflow"}

TOUCHED: list[tuple[dict[str, Any], set[str]]] = [
    # a change in config.yaml, and the jobs whose settings differ; what depends on their files runs again through those
    ({"checkpoints/mixflow/train/gamma": 0.4}, {"train mixflow", "row demo mixflow"}),
    ({"checkpoints/mixflow/train/seed": 7}, {"train mixflow", "row demo mixflow"}),
    ({"checkpoints/mixflow/train/gradient_clip": 2.0}, {"train mixflow"}),
    ({"checkpoints/mixflow/train/gradient_clip": None}, {"train mixflow"}),
    ({f"{TRAIN}/betas": [0.9, 0.95]}, {"train base", "train mixflow"}),  # mixflow extends base
    ({f"{TRAIN}/model/depth": 4}, {"train base", "train mixflow"} | ALL_SAMPLES),
    ({"samplers/euler50-cfg2/seed": 3}, GUIDED | {"render demo"}),
    ({"samplers/euler50-cfg2/guidance/scale": 3.0}, GUIDED | ROWS | {"render demo"}),
    ({"samplers/euler50/num_images": 99}, ALL_SAMPLES | ALL_METRICS | {"render demo"}),
    ({"latents/digits/shard_size": 64}, {"cache_latents digits"}),
    ({"datasets/digits/seed": 1}, {"cache_latents digits"}),
    ({"extractors/small/learning_rate": 0.1}, {"train_extractor small"}),
    ({"extractors/small/width": 8}, {"train_extractor small", "make_reference digits"} | ALL_METRICS),
    ({"tables/demo/rows/1/samplers": {"euler50": "euler50-cfg2"}}, {"row demo mixflow"}),
    ({"tables/demo/title": "Other"}, {"render demo"}),
    ({"tables/demo/rows/1/note": "x"}, {"row demo mixflow"}),
    ({"tables/demo/rows/1/against": "base"}, {"row demo mixflow"}),
    ({"tables/demo/rows/1/paper_labels": "random"}, {"row demo mixflow"}),
    ({"tables/quoted/rows/0/paper": [9.4]}, {"row quoted sit"}),
    ({"checkpoints/unused": {"extends": "mixflow"}}, {"train unused"}),
    ({"samplers/unused": {"extends": "euler50"}}, set()),
]


@pytest.mark.parametrize(("changes", "touched"), TOUCHED, ids=[" ".join(changes) for changes, _ in TOUCHED])
def test_a_change_touches_only_what_depends_on_it(changes: dict[str, Any], touched: set[str]) -> None:
    before, after = every_slice(resolve(BASE)), every_slice(resolve(changed(changes)))
    assert {job for job in after if after[job] != before.get(job)} == touched


def test_slices_hold_no_nulls_and_are_canonical() -> None:
    config = load_config(CONFIG)
    for job, text in every_slice(config).items():
        if not job.startswith("row"):  # where null stands for a number that the paper does not have
            assert "null" not in text, job
        assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    shuffled = yaml.safe_load(CONFIG.read_text())
    shuffled["checkpoints"] = dict(reversed(shuffled["checkpoints"].items()))
    for entry in shuffled["samplers"].values():
        items = list(entry.items())
        entry.clear()
        entry.update(reversed(items))
    assert every_slice(resolve(shuffled)) == every_slice(config)


def test_slice_key_is_stable() -> None:
    import hashlib

    expected = hashlib.sha256(b'{"a":1,"b":[1.5,true]}\nff').hexdigest()[:16]
    assert slice_key({"b": [1.5, True], "a": 1}, "ff") == expected
    assert slice_key({"b": [1.5, True], "a": 1}) != expected


def test_the_shipped_config_and_its_rehearsal() -> None:
    config, rehearsal = load_config(CONFIG), load_config(CONFIG, REHEARSAL)
    assert config.paper_tables() == ["main", "table4", "gamma", "time_laws", "table8", "imagenet512"]
    sections = [name for name, entries in config if isinstance(entries, dict)]
    assert {"downloads", "datasets", "checkpoints", "samplers", "tables"} <= set(sections)
    for section in sections:
        assert list(getattr(rehearsal, section)) == list(getattr(config, section))
    assert max(entry.train.num_steps for entry in rehearsal.checkpoints.values() if entry.train) <= 100
    arms = [config.checkpoints[row.checkpoint].train for row in config.tables["digits"].rows[1:] if row.checkpoint]
    recipes = [{**arm.model_dump(), "law": None, "gamma": None} for arm in arms if arm]
    assert len(recipes) == 4
    assert all(recipe == recipes[0] for recipe in recipes), "the arms must differ in the law alone"


def test_gains_of_table_4_are_those_of_the_paper() -> None:
    """The paper prints the gains too; a mistyped number would break them."""
    table = load_config(CONFIG).tables["table4"]
    numbers = np.array([row.paper for row in table.rows])
    gains = [[2.33, 2.34, 2.58, 0.55, 0.64, 0.78], [1.48, 1.73, 1.96, 0.16, 0.16, 0.19],
             [1.73, 2.11, 2.68, 0.18, 0.24, 0.28]]  # fmt: skip
    np.testing.assert_allclose(numbers[0::2] - numbers[1::2], gains, atol=1e-9)


def test_the_paper_s_tables_agree_where_they_overlap() -> None:
    tables = load_config(CONFIG).tables
    main = {row.key: row.paper for row in tables["main"].rows}
    for row in tables["table4"].rows:
        assert row.paper is not None
        assert main[row.key] == (row.paper[0], row.paper[3])
    rae = {row.key: row.paper for row in tables["table8"].rows if row.key.startswith("rae")}
    assert {key: (paper[0], paper[5]) for key, paper in rae.items() if paper} == {key: main[key] for key in rae}


def test_controls_are_trained_as_long() -> None:
    """Rows that say what MixFlow adds are compared with one that differs in the law alone."""
    config = load_config(CONFIG)
    pairs = {
        (table, row.key): row.against
        for table in ("digits", "main", "gamma", "time_laws", "imagenet512")
        for row in config.tables[table].rows
        if row.against
    }
    of_base = ("time_laws", "sit-b2-256-continued")  # the paper's question whether more training does it
    assert pairs.pop(of_base) == "sit-b2-256"
    assert len(pairs) == 3 + 5 + 6 + 4 + 1
    for (_, name), control in pairs.items():
        ours, other = config.checkpoints[name].train, config.checkpoints[control].train
        assert ours is not None
        assert other is not None
        assert ours.dump("law", "gamma") == other.dump("law", "gamma")
        assert other.gamma == 0


def test_the_paper_s_labels_are_one_per_number() -> None:
    """The same number of the paper in two tables was made with the same labels."""
    labels: dict[tuple[str, float], set[str | None]] = {}
    for table in load_config(CONFIG).tables.values():
        for row in table.rows:
            for number in filter(None, row.paper or ()):
                labels.setdefault((row.key.removeprefix("authors-"), number), set()).add(row.paper_labels)
    assert all(len(found) == 1 for found in labels.values())


# --- schema ----------------------------------------------------------------------------------------------------------


def test_schema_file_is_up_to_date() -> None:
    fix = "run: python -m mixflow.config --write-schema"
    assert (ROOT / module.SCHEMA_FILE).read_text() == module.schema_text(), fix


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = yaml.safe_load(module.schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_schema_accepts_what_is_shipped(validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(yaml.safe_load(CONFIG.read_text()))
    validator.validate(yaml.safe_load(REHEARSAL.read_text()))


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": {}},
        {"samplers/Euler": {}},
        {"samplers/euler50/num_step": 3},
        {"checkpoints/base/train/learning_rat": 0.1},
        {"checkpoints/base/train/learning_rate": "1e-5"},
        {"checkpoints/base/train/model/dept": 3},
        {"checkpoints/base/train/law": "mixfow"},
        {"tables/demo/rows/0/chekpoint": "base"},
        {"tables/demo/columns/0/metric": "fdd"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_schema_refuses_typos(validator: jsonschema.Draft202012Validator, changes: dict[str, Any]) -> None:
    assert not validator.is_valid(changed(changes))


def test_schema_holds_no_defaults_and_requires_nothing() -> None:
    def keys(node: Any) -> set[str]:
        if isinstance(node, dict):
            return set(node) | set().union(*map(keys, node.values()))
        return set().union(*map(keys, node)) if isinstance(node, list) else set()

    assert not {"default", "required"} & keys(yaml.safe_load(module.schema_text()))


# --- the rest of the package -----------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    """The Snakefile imports it on every call, on the head node."""
    code = "import sys, mixflow.config; print(sorted({'torch', 'numpy', 'snakemake'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_names_agree_with_the_other_rooms() -> None:
    from mixflow.flow import INTERPOLANTS
    from mixflow.flow.time_laws import LAWS
    from mixflow.sampling.solvers import DIFFUSIONS, LAST_STEPS, SOLVERS

    def names(entry: type, field: str) -> set[str]:
        return set(typing.get_args(entry.model_fields[field].annotation))  # type: ignore[attr-defined]

    assert names(module.Train, "law") == set(LAWS)
    assert names(module.Train, "interpolant") == set(INTERPOLANTS)
    assert names(module.Diffusion, "form") == set(DIFFUSIONS)
    assert names(module.EulerMaruyama, "last_step") == set(LAST_STEPS)
    solvers = [names(entry, "solver") for entry in (module.FixedStep, module.Dopri5, module.EulerMaruyama)]
    assert set().union(*solvers) == set(SOLVERS)


# --- files -----------------------------------------------------------------------------------------------------------


def write_latents(folder: Path) -> Path:
    shards = []
    for name, size in (("train-00000.safetensors", 100), ("train-00001.safetensors", 40)):
        (folder / name).write_bytes(b"x" * size)
        shards.append({"file": name, "bytes": size, "sha256": "0" * 64, "count": 1})
    index = folder / "index.json"
    index.write_text(json.dumps({"splits": {"train": {"shards": shards[:1]}, "held_out": {"shards": shards[1:]}}}))
    return index


def test_check_latents(tmp_path: Path) -> None:
    check_latents(tmp_path / "index.json")  # not made yet
    index = write_latents(tmp_path)
    check_latents(index)
    shard = tmp_path / "train-00001.safetensors"
    shard.write_bytes(b"x" * 39)
    with pytest.raises(UserError, match=r"train-00001\.safetensors' has 39 bytes where the index says 40: delete '"):
        check_latents(index)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001\.safetensors' is missing: delete '"):
        check_latents(index)
    index.write_text("{")
    with pytest.raises(UserError, match="is not the index of a latent cache"):
        check_latents(index)


def test_check_image(tmp_path: Path) -> None:
    check_image(str(tmp_path))  # a folder is an image too
    check_image(f"docker://ghcr.io/a/b@sha256:{'0' * 64}")
    check_image(f"docker://ghcr.io/a/b:1.0@sha256:{'0' * 64}")
    with pytest.raises(UserError, match=r"image: '.*none\.sif' does not exist: convert one"):
        check_image(str(tmp_path / "none.sif"))
    for image in ("docker://ghcr.io/a/b", "docker://ghcr.io/a/b:1.0", "docker://a/b@sha256:0123"):
        with pytest.raises(UserError, match="has no digest: take a file that was converted from it"):
            check_image(image)


def test_check_weights_file(tmp_path: Path) -> None:
    from mixflow.models import build_model, save_model

    options = {**WEIGHTS["model"], "hidden_size": 16, "depth": 1, "num_heads": 2}
    file = tmp_path / "own.safetensors"

    def config_for(**model: Any) -> Config:
        entry = {"weights": {**WEIGHTS, "file": str(file), "model": {**options, **model}}}
        return resolve(changed({"checkpoints/own": entry}))

    with pytest.raises(UserError, match=r"checkpoints\.own\.weights\.file: '.*' does not exist"):
        check_weights_file(config_for(), "own")
    full = config_for().network_options("own")
    network = build_model(**full)
    save_model(file, network.state_dict(), full)
    assert check_weights_file(config_for(), "own") == str(file)
    with pytest.raises(UserError, match="holds a network with depth 1, the entry says depth 2: correct one of them"):
        check_weights_file(config_for(depth=2), "own")
    with pytest.raises(UserError, match="num_heads 2, the entry says num_heads 4"):
        check_weights_file(config_for(num_heads=4), "own")


def test_every_download_of_the_rehearsal_is_made_by_itself() -> None:
    """What the rehearsal asks for is among its stand-ins, so that it needs no network."""
    rehearsal = load_config(CONFIG, REHEARSAL)
    made = rehearsal.slice("stand_ins")
    parts = ("networks", "autoencoders", "encoders", "extractors", "references")
    files = {file for part in parts for file in made[part]}
    for rae in made["rae"].values():
        files |= {rae["decoder"], rae["statistics"], f"{rae['encoder']}/config.json"}
    datasets = [dataset for dataset in rehearsal.datasets.values() if dataset.kind == "imagenet"]
    assert set(made["images"]) == {dataset.folder for dataset in datasets}
    for name, download in rehearsal.downloads.items():
        if name != "sd-vae-ft-mse":  # no entry of a table uses it
            assert {f"{download.folder}/{file}" for file in download.files} & files, name


def test_a_rehearsed_table_says_that_it_is_one() -> None:
    """It has the file name of the real table."""
    config, rehearsal = load_config(CONFIG), load_config(CONFIG, REHEARSAL)
    for name in config.tables:
        assert rehearsal.slice("render", name)["title"].startswith("REHEARSAL: ")
        assert "The numbers mean nothing." in rehearsal.slice("render", name)["notes"][0]
        assert "REHEARSAL" not in config.slice("render", name)["title"]


def test_the_recipes_are_those_of_the_base_models() -> None:
    config = load_config(CONFIG)
    for name, checkpoint in config.checkpoints.items():
        recipe = checkpoint.train
        if recipe is None or name.startswith("digits"):
            continue
        optimiser = (recipe.batch_size, recipe.learning_rate, recipe.betas, recipe.weight_decay, recipe.ema_decay)
        is_repa, is_rae = name.startswith("repa"), name.startswith("rae")
        assert optimiser == ((1024, 2e-4, (0.9, 0.95), 0, 0.9995) if is_rae else (256, 1e-4, (0.9, 0.999), 0, 0.9999))
        assert (recipe.warmup_steps, recipe.interpolant) == (40 * 1251 if is_rae else 0, "linear")
        assert (recipe.gradient_clip, recipe.horizontal_flip) == (
            None if not is_repa and not is_rae else 1.0,
            not is_repa,
        )
        if is_rae:
            channels, size = config.latent_shape(recipe.latents)
            assert recipe.shift == pytest.approx((channels * size**2 / 4096) ** 0.5, rel=1e-15)
            assert recipe.decay is not None
            assert (recipe.decay.start_step, recipe.decay.end_step) == (40 * 1251, 800 * 1251)
        assert (recipe.align is not None) == is_repa
        if "mixflow" in name:  # every arm has a control of the same cost
            control = config.checkpoints[f"{recipe.init}-continued"].train
            assert control is not None
            assert control.model_dump(exclude={"law", "gamma"}) == recipe.model_dump(exclude={"law", "gamma"})
            assert (control.law, control.gamma) == ("uniform", 0.0)


def test_rae_is_trained_from_pixels_or_from_a_cache() -> None:
    config = resolve(changed(RAE))
    on_the_fly = config.slice("train", "rae-mixflow")
    assert on_the_fly["encode"] is True
    assert on_the_fly["pixel_autoencoder"] == {"kind": "pixels"}
    assert config.cache_of("imagenet-rae") == "imagenet-pixels"
    assert config.bytes_of("imagenet-rae") == 0
    with pytest.raises(UserError, match="encoded from 'imagenet-pixels' while training and have no cache"):
        config.slice("cache_latents", "imagenet-rae")

    cached = {"dataset": "imagenet", "autoencoder": "rae", "shard_size": 16, "mirrors": True}
    config = resolve(changed({**RAE, "latents/imagenet-rae": cached}))
    assert "encode" not in config.slice("train", "rae-mixflow")
    assert config.slice("cache_latents", "imagenet-rae")["mirrors"] is True
    assert config.cache_of("imagenet-rae") == "imagenet-rae"
    assert config.bytes_of("imagenet-rae") == 50 * 2 * 32 * 4 * 4 * 2


def test_the_sizes_of_the_shipped_caches() -> None:
    """The numbers that config.yaml and the documentation state, in GB."""
    config = load_config(CONFIG)
    sizes = {name: round(config.bytes_of(name) / 1e9) for name in config.latents if name.startswith("imagenet")}
    assert sizes == {
        "imagenet-256": 42,
        "imagenet-512": 168,
        "imagenet-256-pixels": 252,
        "imagenet-512-pixels": 1008,
        "imagenet-256-rae": 0,
        "imagenet-256-rae-cached": 1008,
        "imagenet-512-rae": 0,
    }


def test_an_autoencoder_asks_for_the_files_that_a_use_needs() -> None:
    config = resolve(changed(RAE))
    rae = config.autoencoder_of("imagenet-rae")
    assert rae.files_for("encode", "latents") == {"encoder": "encoder", "statistics": "statistics"}
    assert rae.files_for("latents") == {"statistics": "statistics"}
    assert rae.files_for("decode") == {"decoder": "decoder", "statistics": "statistics"}
    assert config.autoencoder_of("digits").files_for("encode", "decode") == {}


def test_autoguidance_in_the_slices() -> None:
    config = resolve(changed(RAE))
    settings = config.slice("sample", "rae-mixflow", "rae-guided")
    assert settings["guide_model"] == config.network_options("rae-small")
    assert settings["guide_model"]["hidden_size"] == [16, 48]
    assert "guide_model" not in config.slice("sample", "rae-mixflow", "rae")
    assert config.slice("evaluate", "rae-mixflow", "rae-guided")["network_calls_per_image"] == 2 * 50
    assert config.samplers["rae-guided"].description == "Euler 50, autoguidance 1.5"
    assert "guided by rae-small" in config.samplers["rae-guided"].protocol


def test_guidance_follows_the_shifted_times() -> None:
    """RAE's 50 points: 1 - linspace(0, 0.999, 50) in its own time, shifted there."""
    sampler = load_config(CONFIG).samplers["rae-euler50"]
    reversed_times = 1 - np.linspace(0, 0.999, 50)
    shift = sampler.grid.shift
    wanted = 1 - shift * reversed_times / (1 + (shift - 1) * reversed_times)
    assert sampler.call_times == pytest.approx(list(wanted[:-1]), abs=1e-12)
    assert sampler.grid.time(1) == pytest.approx(wanted[-1], abs=1e-12)
    guided = resolve(changed({"samplers/other": {
        "extends": "euler50", "num_steps": 10, "grid": {"shift": 4.0, "end": 1.0},
        "guidance": {"scale": 2.0, "interval": [0.0, 0.2]}}}))  # fmt: skip
    # k / (10 (1 + 3 (1 - k / 10))) = 0, .027, .059, .097, .143, .2
    assert guided.slice("evaluate", "base", "other")["network_calls_per_image"] == 10 + 6
