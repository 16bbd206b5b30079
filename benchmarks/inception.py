"""Inception features and FID: ours against pytorch-fid and torch-fidelity, same random weights of full size, one run.

Each library runs its own network and its own arithmetic on the same uint8 images, from pixels in memory to features. On
a GPU the peers run as they come, with TF32 in convolutions, and ours in strict float32 and with TF32.

FID must be equal where a peer's input is the same as ours: torch-fidelity's at any size, pytorch-fid's at 299 pixels
(its resize is another one) and with pixels divided by 256 (its own 255 stretches them, which the run shows beside).
`python benchmarks/inception.py [--size 256] [--batch 32]`; needs the dev requirements for pytorch-fid.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytorch_fid.fid_score
import pytorch_fid.inception
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from mixflow.evaluation import Inception, frechet_distance_to, moments, tiny_inception_state_dict
from mixflow.runtime.arithmetic import float32_products

Network = Callable[[Tensor], Tensor]  # uint8 [B,H,W,3] on the device -> features [B,2048]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="of the images that are timed, in pixels")
    parser.add_argument("--batch", type=int, action="append", help="images at a time; default 32, on a GPU 64 and 256")
    parser.add_argument("--repeats", type=int, default=5, help="the fastest batch of each counts")
    parser.add_argument("--images", type=int, default=32, help="in each of the two sets that FID compares")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ("torch", "torchvision", "pytorch-fid", "torch-fidelity", "numpy", "scipy")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    print(f"on {where}, images of {options.size} px")

    weights = random_weights(seed=0)
    ours, pytorch, fidelity = Inception(weights, device), pytorch_fid_network(weights), fidelity_network(weights)
    pytorch, fidelity = pytorch.to(device), fidelity.to(device)
    networks: dict[str, Network] = {
        "pytorch-fid": lambda images: pytorch(as_floats(images, 255))[0].flatten(start_dim=1),
        "torch-fidelity": lambda images: fidelity(images.permute(0, 3, 1, 2).contiguous())[0],
        "mixflow": lambda images: ours(images)[0],
    }
    timed = dict(networks)
    if device.type == "cuda":
        with_tf32 = Inception(weights, device, tf32=True)
        timed["mixflow, tf32"] = lambda images: with_tf32(images)[0]
    for batch in options.batch or ((64, 256) if device.type == "cuda" else (32,)):
        measure_speed(timed, batch, options, device)
    networks["pytorch-fid, x/256"] = lambda images: pytorch(as_floats(images, 256))[0].flatten(start_dim=1)
    with float32_products():  # FIDs are compared without TF32, which the peers would use on a GPU
        for size in (299, 256, 64):
            compare_fid(networks, size, options.images, device)


def as_floats(images: Tensor, white: int) -> Tensor:
    """uint8 [B,H,W,3] -> float32 [B,3,H,W], laid out as torchvision's ToTensor does."""
    return images.permute(0, 3, 1, 2).contiguous().float().div_(white)


def pytorch_fid_network(weights: dict[str, Tensor]) -> pytorch_fid.inception.InceptionV3:
    pytorch_fid.fid_score.linalg = SimpleNamespace(sqrtm=square_root)
    pytorch_fid.inception.load_state_dict_from_url = lambda url, progress: weights
    return pytorch_fid.inception.InceptionV3().eval()


def fidelity_network(weights: dict[str, Tensor]) -> FeatureExtractorInceptionV3:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(weights, path)
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))


@torch.inference_mode()
def measure_speed(networks: dict[str, Network], batch: int, options: argparse.Namespace, device: torch.device) -> None:
    images = random_images(batch, options.size, seed=0).to(device)
    seconds = dict.fromkeys(networks, float("inf"))
    for _ in range(options.repeats + 1):  # the first warms up: the fastest counts
        for name, network in networks.items():
            start = now(device)
            network(images)
            seconds[name] = min(seconds[name], now(device) - start)
    print(f"\nbatch {batch:4}           images/s   mixflow / this")
    for name, taken in seconds.items():
        print(f"{name:20} {batch / taken:10.1f} {taken / seconds['mixflow']:12.2f}")


@torch.inference_mode()
def compare_fid(networks: dict[str, Network], size: int, n: int, device: torch.device) -> None:
    real, fake = random_images(n, size, seed=1), random_images(n, size, seed=2, contrast=160)
    print(f"\nFID of {n} against {n} images of {size} px")
    values = {}
    for name, network in networks.items():
        if name.startswith("pytorch-fid") and size != 299:
            continue  # its resize is not the one of 2015
        features = [torch.cat([network(x.to(device)) for x in images.split(32)]).cpu() for images in (real, fake)]
        start = time.perf_counter()
        values[name] = FIDS[name.split(",")[0]](*features)
        seconds = time.perf_counter() - start
        print(f"{name:20} {values[name]:20.12g}   {seconds:6.2f} s beside the network")
    for name, value in values.items():
        if name != "mixflow":
            print(f"mixflow / {name} - 1 = {values['mixflow'] / value - 1:+.1e}")


def pytorch_fid_distance(real: Tensor, fake: Tensor) -> float:
    # In float64, as its calculate_activation_statistics has them.
    features = real.double().numpy(), fake.double().numpy()
    statistics = [part for x in features for part in (np.mean(x, axis=0), np.cov(x, rowvar=False))]
    return float(pytorch_fid.fid_score.calculate_frechet_distance(*statistics))


def square_root(matrix: np.ndarray, disp: bool = True) -> np.ndarray | tuple[np.ndarray, None]:
    """scipy's, with the argument that pytorch-fid gives and SciPy 1.18 no longer takes."""
    root = scipy.linalg.sqrtm(matrix)
    return root if disp else (root, None)


def fidelity_distance(real: Tensor, fake: Tensor) -> float:
    return fid_statistics_to_metric(*map(fid_features_to_statistics, (real, fake)), verbose=False)[KEY_METRIC_FID]


def our_distance(real: Tensor, fake: Tensor) -> float:
    return frechet_distance_to(*moments(real), fake)


FIDS = {"pytorch-fid": pytorch_fid_distance, "torch-fidelity": fidelity_distance, "mixflow": our_distance}


def random_weights(seed: int) -> dict[str, Tensor]:
    """Return weights that magnify rounding little, as trained ones do: filters of sum zero, scales near one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in tiny_inception_state_dict(seed, width_divisor=1).items():
        if name.endswith("conv.weight"):
            filters = torch.randn(tensor.shape, generator=generator)
            filters -= filters.mean(dim=(1, 2, 3), keepdim=True)
            tensor = filters * (2 / filters[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            tensor = torch.rand(tensor.shape, generator=generator) + 0.5
        elif name.endswith(("bn.bias", "running_mean")):
            tensor = torch.zeros(tensor.shape)
        weights[name] = tensor
    return weights


def random_images(n: int, size: int, seed: int, contrast: int = 256) -> Tensor:
    """Return uint8 [n,size,size,3], coarse and fine, with values below `contrast`."""
    generator = torch.Generator().manual_seed(seed)
    half = contrast // 2
    coarse = torch.randint(0, half, (n, 13, 13, 3), generator=generator, dtype=torch.uint8)
    fine = torch.randint(0, half, (n, size, size, 3), generator=generator, dtype=torch.uint8)
    patch = torch.arange(size) * 13 // size
    return coarse[:, patch][:, :, patch] + fine


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
