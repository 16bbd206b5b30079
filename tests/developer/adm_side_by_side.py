"""Run OpenAI's evaluator, unmodified, beside ours on one small random network and print both columns of numbers.

The evaluator (TensorFlow) wants its network as a frozen graph; this script writes one with the node names, operations
and layout of the 2015 Inception graph around random weights, which mixflow then loads as it loads the real file. See
README.md for how to install and run it. Exits with 1 where a difference is larger than its tolerance.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_INT32
from torch import Tensor

from mixflow.evaluation import (
    Inception,
    frechet_distance_to,
    inception_score,
    precision_recall,
    tiny_inception_state_dict,
)

NUM_FEATURES = 2048  # the evaluator's softmax takes no other number
NUM_CLASSES = 16
SQUARED_NORM = 300  # of features, about that of the real network's: half precision does not overflow
BLOCKS = 4  # an image is BLOCKS x BLOCKS patches of one colour, under a texture
WIDTH_DIVISOR = 16
METRICS = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall"}


# --- the network


def evaluator_sized(state_dict: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a narrow network whose last block is widened to 2048 features by random mixtures of its own channels.

    The classes are few, and blind to the mean feature, so that softmax neither saturates nor always says the same.
    All numbers are ones that half precision has, which stores them in half the room.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = dict(state_dict)
    widths = {"branch1x1": 320, "branch_pool": 192} | dict.fromkeys(
        ("branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b"), 384
    )
    for branch, width in widths.items():
        node = f"Mixed_7c.{branch}"
        deviation = (wide[f"{node}.bn.running_var"] + 1e-3).sqrt()
        mixture = torch.randn(width, len(deviation), generator=generator) / len(deviation) ** 0.5
        wide[f"{node}.conv.weight"] = torch.einsum(
            "oc,cikl->oikl", mixture, wide[f"{node}.conv.weight"] / deviation[:, None, None, None]
        )
        wide[f"{node}.bn.running_mean"] = mixture @ (wide[f"{node}.bn.running_mean"] / deviation)
        wide[f"{node}.bn.running_var"] = torch.rand(width, generator=generator) + 0.5
        wide[f"{node}.bn.weight"] = torch.rand(width, generator=generator) + 0.5
        wide[f"{node}.bn.bias"] = torch.randn(width, generator=generator) / 2 - 0.5
    wide["fc.weight"] = torch.zeros(NUM_CLASSES, NUM_FEATURES)
    wide["fc.bias"] = torch.zeros(NUM_CLASSES)
    pool, _, _ = Inception(wide)(images(64, 64, seed)[0])
    factor = (SQUARED_NORM / pool.square().sum(dim=1).mean()) ** 0.5
    for branch in widths:  # ReLU passes a positive factor on
        wide[f"Mixed_7c.{branch}.bn.weight"] *= factor
        wide[f"Mixed_7c.{branch}.bn.bias"] *= factor
    pool = pool * factor
    mean = pool.mean(dim=0)
    classes = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)
    classes -= torch.outer(classes @ mean, mean) / mean.square().sum()
    wide["fc.weight"] = 2 * classes / (pool @ classes.T).std()
    return {name: tensor.half().float() for name, tensor in wide.items()}


class Graph:
    """A frozen graph, node by node, in the operations of 2015."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.definition = GraphDef()
        self.weights = weights

    def node(self, operation: str, name: str, *inputs: str, **attributes: AttrValue) -> str:
        node = self.definition.node.add(op=operation, name=name, input=inputs)
        for key, value in attributes.items():
            node.attr[key].CopyFrom(value)
        return name

    def floats(self, operation: str, name: str, *inputs: str, **attributes: AttrValue) -> str:
        return self.node(operation, name, *inputs, T=AttrValue(type=DT_FLOAT), **attributes)

    def constant(self, name: str, value: object, dtype: type = np.float32) -> str:
        array = np.asarray(value, dtype)
        kind = DT_FLOAT if dtype is np.float32 else DT_INT32
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in array.shape])
        tensor = TensorProto(dtype=kind, tensor_shape=shape, tensor_content=array.tobytes())
        return self.node("Const", name, dtype=AttrValue(type=kind), value=AttrValue(tensor=tensor))

    def conv(self, scope: str, x: str, weights: str, stride: int = 1, padding: str = "SAME") -> str:
        """Convolution, batch norm, a check for NaN and ReLU, whose output bears the name of the scope."""
        kernel = self.weights[f"{weights}.conv.weight"].permute(2, 3, 1, 0)  # height, width, in, out
        parameters = self.constant(f"{scope}/conv2d_params", kernel.numpy())
        window = {"strides": _integers(1, stride, stride, 1), "padding": _text(padding)}
        x = self.floats("Conv2D", f"{scope}/Conv2D", x, parameters, **window)
        norm = {
            name: self.constant(f"{scope}/batchnorm/{name}", self.weights[f"{weights}.bn.{key}"].numpy())
            for name, key in (
                ("moving_mean", "running_mean"),
                ("moving_variance", "running_var"),
                ("beta", "bias"),
                ("gamma", "weight"),
            )
        }
        x = self.floats(
            "BatchNormWithGlobalNormalization",
            f"{scope}/batchnorm",
            x,
            *norm.values(),
            variance_epsilon=AttrValue(f=1e-3),
            scale_after_normalization=AttrValue(b=True),
        )
        check = self.floats("CheckNumerics", f"{scope}/CheckNumerics", x, message=_text("activation input"))
        x = self.floats("Identity", f"{scope}/control_dependency", x, f"^{check}")
        return self.floats("Relu", scope, x)

    def pool(self, kind: str, name: str, x: str, size: int = 3, stride: int = 1, padding: str = "SAME") -> str:
        window = {"ksize": _integers(1, size, size, 1), "strides": _integers(1, stride, stride, 1)}
        return self.floats(kind, name, x, padding=_text(padding), **window)

    def join(self, scope: str, *branches: str) -> str:
        axis = self.constant(f"{scope}/join/concat_dim", 3, np.int32)
        return self.floats("Concat", f"{scope}/join", axis, *branches, N=AttrValue(i=len(branches)))


def _integers(*values: int) -> AttrValue:
    return AttrValue(list=AttrValue.ListValue(i=values))


def _text(value: str) -> AttrValue:
    return AttrValue(s=value.encode())


def inception_graph(weights: Mapping[str, Tensor]) -> bytes:
    """Return the graph around `weights` (torch-fidelity's key names), serialised."""
    g = Graph(weights)
    pixels = g.node("Placeholder", "Cast", dtype=AttrValue(type=DT_FLOAT))
    x = g.floats("ExpandDims", "ExpandDims", pixels, g.constant("ExpandDims/dim", 0, np.int32))
    x = g.floats("ResizeBilinear", "ResizeBilinear", x, g.constant("ResizeBilinear/size", [299, 299], np.int32))
    x = g.floats("Sub", "Sub", x, g.constant("Sub/y", 128))
    x = g.floats("Mul", "Mul", x, g.constant("Mul/y", 0.0078125))

    x = g.conv("conv", x, "Conv2d_1a_3x3", 2, "VALID")
    x = g.conv("conv_1", x, "Conv2d_2a_3x3", 1, "VALID")
    x = g.conv("conv_2", x, "Conv2d_2b_3x3")
    x = g.pool("MaxPool", "pool", x, 3, 2, "VALID")
    x = g.conv("conv_3", x, "Conv2d_3b_1x1", 1, "VALID")
    x = g.conv("conv_4", x, "Conv2d_4a_3x3", 1, "VALID")
    x = g.pool("MaxPool", "pool_1", x, 3, 2, "VALID")
    for scope, block in (("mixed", "Mixed_5b"), ("mixed_1", "Mixed_5c"), ("mixed_2", "Mixed_5d")):
        one = g.conv(f"{scope}/conv", x, f"{block}.branch1x1")
        two = g.conv(f"{scope}/tower/conv", x, f"{block}.branch5x5_1")
        two = g.conv(f"{scope}/tower/conv_1", two, f"{block}.branch5x5_2")
        three = g.conv(f"{scope}/tower_1/conv", x, f"{block}.branch3x3dbl_1")
        three = g.conv(f"{scope}/tower_1/conv_1", three, f"{block}.branch3x3dbl_2")
        three = g.conv(f"{scope}/tower_1/conv_2", three, f"{block}.branch3x3dbl_3")
        four = g.pool("AvgPool", f"{scope}/tower_2/pool", x)
        four = g.conv(f"{scope}/tower_2/conv", four, f"{block}.branch_pool")
        x = g.join(scope, one, two, three, four)
    one = g.conv("mixed_3/conv", x, "Mixed_6a.branch3x3", 2, "VALID")
    two = g.conv("mixed_3/tower/conv", x, "Mixed_6a.branch3x3dbl_1")
    two = g.conv("mixed_3/tower/conv_1", two, "Mixed_6a.branch3x3dbl_2")
    two = g.conv("mixed_3/tower/conv_2", two, "Mixed_6a.branch3x3dbl_3", 2, "VALID")
    x = g.join("mixed_3", one, two, g.pool("MaxPool", "mixed_3/pool", x, 3, 2, "VALID"))
    for number, block in enumerate(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), start=4):
        scope = f"mixed_{number}"
        one = g.conv(f"{scope}/conv", x, f"{block}.branch1x1")
        two = g.conv(f"{scope}/tower/conv", x, f"{block}.branch7x7_1")
        two = g.conv(f"{scope}/tower/conv_1", two, f"{block}.branch7x7_2")
        two = g.conv(f"{scope}/tower/conv_2", two, f"{block}.branch7x7_3")
        three = g.conv(f"{scope}/tower_1/conv", x, f"{block}.branch7x7dbl_1")
        for i in range(1, 5):
            three = g.conv(f"{scope}/tower_1/conv_{i}", three, f"{block}.branch7x7dbl_{i + 1}")
        four = g.pool("AvgPool", f"{scope}/tower_2/pool", x)
        four = g.conv(f"{scope}/tower_2/conv", four, f"{block}.branch_pool")
        x = g.join(scope, one, two, three, four)
    one = g.conv("mixed_8/tower/conv", x, "Mixed_7a.branch3x3_1")
    one = g.conv("mixed_8/tower/conv_1", one, "Mixed_7a.branch3x3_2", 2, "VALID")
    two = g.conv("mixed_8/tower_1/conv", x, "Mixed_7a.branch7x7x3_1")
    two = g.conv("mixed_8/tower_1/conv_1", two, "Mixed_7a.branch7x7x3_2")
    two = g.conv("mixed_8/tower_1/conv_2", two, "Mixed_7a.branch7x7x3_3")
    two = g.conv("mixed_8/tower_1/conv_3", two, "Mixed_7a.branch7x7x3_4", 2, "VALID")
    x = g.join("mixed_8", one, two, g.pool("MaxPool", "mixed_8/pool", x, 3, 2, "VALID"))
    for scope, block, kind in (("mixed_9", "Mixed_7b", "AvgPool"), ("mixed_10", "Mixed_7c", "MaxPool")):
        one = g.conv(f"{scope}/conv", x, f"{block}.branch1x1")
        two = g.conv(f"{scope}/tower/conv", x, f"{block}.branch3x3_1")
        two_a = g.conv(f"{scope}/tower/mixed/conv", two, f"{block}.branch3x3_2a")
        two_b = g.conv(f"{scope}/tower/mixed/conv_1", two, f"{block}.branch3x3_2b")
        three = g.conv(f"{scope}/tower_1/conv", x, f"{block}.branch3x3dbl_1")
        three = g.conv(f"{scope}/tower_1/conv_1", three, f"{block}.branch3x3dbl_2")
        three_a = g.conv(f"{scope}/tower_1/mixed/conv", three, f"{block}.branch3x3dbl_3a")
        three_b = g.conv(f"{scope}/tower_1/mixed/conv_1", three, f"{block}.branch3x3dbl_3b")
        four = g.pool(kind, f"{scope}/tower_2/pool", x)
        four = g.conv(f"{scope}/tower_2/conv", four, f"{block}.branch_pool")
        x = g.join(scope, one, two_a, two_b, three_a, three_b, four)
    x = g.pool("AvgPool", "pool_3", x, 8, 1, "VALID")
    shape = g.constant("pool_3/_reshape/shape", [1, NUM_FEATURES], np.int32)
    x = g.floats("Reshape", "pool_3/_reshape", x, shape)
    # The graph has [features, classes]; its bias, which the evaluator leaves out, is left out here.
    g.floats("MatMul", "softmax/logits/MatMul", x, g.constant("softmax/weights", weights["fc.weight"].T.numpy()))
    return g.definition.SerializeToString()


# --- the images


def images(n: int, size: int, seed: int, spread: int = 256) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return uint8 images [n, size, size, 3] and what they are made of: patches [n, 4, 4, 3], texture [size, size, 1].

    They are patches of one colour each, of values below `spread`, plus one texture for all, modulo 256.
    """
    patches = np.random.default_rng(seed).integers(0, spread, (n, BLOCKS, BLOCKS, 3), dtype=np.uint8)
    row, column = np.mgrid[:size, :size]
    texture = ((row * 7 + column * 13 + row * column // 5) % 61).astype(np.uint8)[:, :, None]
    return patches.repeat(size // BLOCKS, axis=1).repeat(size // BLOCKS, axis=2) + texture, patches, texture


# --- both evaluators


def run_peer(arguments: argparse.Namespace, *words: object) -> str:
    """Run a script with the Python that has TensorFlow, in the work folder; return what it printed."""
    command = [arguments.tf_python, *map(str, words)]
    done = subprocess.run(command, cwd=arguments.work, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def peer_metrics(output: str) -> dict[str, float]:
    """Read the five lines that the evaluator prints."""
    found = {key: re.search(rf"^{name}: (\S+)$", output, re.MULTILINE) for key, name in METRICS.items()}
    return {key: float(match[1]) for key, match in found.items() if match}


@torch.inference_mode()
def our_features(network: Inception, pixels: np.ndarray) -> list[np.ndarray]:
    """Return pool, spatial features and logits of all images."""
    parts = [network(batch) for batch in np.array_split(pixels, max(1, len(pixels) // 64))]
    return [torch.cat(part).numpy() for part in zip(*parts, strict=True)]


def our_metrics(reference: Mapping[str, np.ndarray], real: list[np.ndarray], fake: list[np.ndarray]) -> dict:
    precision, recall = precision_recall(real[0], fake[0], k=3, mode="adm")
    return {
        "is": inception_score(fake[2]),
        "fid": frechet_distance_to(reference["mu"], reference["sigma"], fake[0]),
        "sfid": frechet_distance_to(reference["mu_s"], reference["sigma_s"], fake[1]),
        "precision": precision,
        "recall": recall,
    }


def tolerances(n: int, m: int, peers: Mapping[str, float]) -> dict[str, float]:
    """Absolute: float32 softmax; float32 means and the root of a singular matrix; two images tipped by rounding."""
    distance = {name: 1e-4 * abs(peers[name]) for name in ("fid", "sfid")}
    return {"is": 1e-5 * peers["is"], **distance, "precision": 2.01 / m, "recall": 2.01 / n}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare(arguments: argparse.Namespace, network: Inception, size: int, n: int, m: int) -> tuple[bool, dict]:
    """Evaluate m samples against n reference images of one size; return whether all agree, and what was measured."""
    work = arguments.work
    real_pixels, real_patches, texture = images(n, size, arguments.seed + 1)
    fake_pixels, fake_patches, _ = images(m, size, arguments.seed + 2, spread=230)
    np.savez(work / "real.npz", arr_0=real_pixels)
    np.savez(work / "samples.npz", arr_0=fake_pixels)
    pairs = ("real.npz", "real_seen.npz", "samples.npz", "samples_seen.npz")
    versions = run_peer(arguments, Path(__file__).with_name("adm_first_pass.py"), arguments.evaluator, *pairs)
    with np.load(work / "real_seen.npz") as seen:
        real_seen = dict(seen)
    with np.load(work / "samples_seen.npz") as seen:
        fake_seen = dict(seen)
    statistics = {name: real_seen[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(work / "reference.npz", arr_0=real_pixels, **statistics)
    theirs = peer_metrics(run_peer(arguments, arguments.evaluator, "reference.npz", "samples.npz"))

    real, fake = our_features(network, real_pixels), our_features(network, fake_pixels)
    ours = our_metrics(statistics, real, fake)
    print(f"\n{m} samples against {n} images of {size} px; {versions.strip().rpartition('VERSIONS ')[2]}")
    print(f"{'':10} {'OpenAI':>22} {'mixflow':>22} {'difference':>11} {'allowed':>9}")
    agree = True
    for name, allowed in tolerances(n, m, theirs).items():
        difference = ours[name] - theirs[name]
        agree &= abs(difference) <= allowed
        print(f"{name:10} {theirs[name]:22.15g} {ours[name]:22.15g} {difference:+11.1e} {allowed:9.1e}")
    for i, name in enumerate(("pool", "spatial")):
        difference = max(relative(real[i], real_seen[name]), relative(fake[i], fake_seen[name]))
        agree &= difference <= 1e-5
        print(f"{name:10} {'largest difference / largest feature':>45} {difference:11.1e} {1e-5:9.1e}")
    record = {
        "real": real_patches,
        "samples": fake_patches,
        "texture": texture,
        "pool": fake_seen["pool"][:2],
        "spatial": fake_seen["spatial"][:2],
        "metrics": np.array([theirs[name] for name in METRICS]),
    }
    return agree, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluator", type=Path, required=True, help="evaluations/evaluator.py of guided-diffusion")
    parser.add_argument("--tf-python", default=sys.executable, help="a Python that has TensorFlow; default: this one")
    parser.add_argument("--work", type=Path, help="folder for graph, images and features; default: a temporary one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--case",
        type=int,
        nargs=3,
        action="append",
        metavar=("SIZE", "REFERENCE", "SAMPLES"),
        help="pixels (a multiple of 4) and numbers of images, any number of times; default: 64 224 160 and 320 14 10",
    )
    parser.add_argument("--golden", type=Path, help="folder to store inputs and the evaluator's numbers in")
    arguments = parser.parse_args()
    arguments.evaluator = arguments.evaluator.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = (arguments.work or Path(temporary)).resolve()
        arguments.work.mkdir(parents=True, exist_ok=True)
        weights = evaluator_sized(tiny_inception_state_dict(arguments.seed, WIDTH_DIVISOR), arguments.seed)
        (arguments.work / "classify_image_graph_def.pb").write_bytes(inception_graph(weights))
        network = Inception(weights)
        agree, records = True, {}
        for size, n, m in arguments.case or ((64, 224, 160), (320, 14, 10)):
            same, record = compare(arguments, network, size, n, m)
            agree &= same
            records |= {f"{size}__{name}": array for name, array in record.items()}
        if arguments.golden:
            arguments.golden.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(arguments.golden / "evaluator.npz", **records)
            arrays = {name: tensor.half().numpy() for name, tensor in weights.items()}
            np.savez_compressed(arguments.golden / "weights.npz", **arrays)
    print("\nthe evaluators agree" if agree else "\nTHE EVALUATORS DIFFER by more than is allowed")
    sys.exit(not agree)


if __name__ == "__main__":
    main()
