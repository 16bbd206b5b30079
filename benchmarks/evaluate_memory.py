"""Peak memory of measuring 50,000 images of 256x256 beyond the network, against the 9.8 GB that numpy.load would hold.

All of `mixflow evaluate` runs but Inception itself: in its place stands a projection of the pixels to as many features,
so that a CPU is through in minutes. `python benchmarks/evaluate_memory.py [--images 50000] [--metrics fid,sfid,is,pr]`;
files go to a temporary folder (in --folder), which takes 15 GB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixflow.evaluation import load_reference, moments, open_images, write_reference
from mixflow.runtime.npz import NpzWriter
from mixflow.runtime.processes import OneProcess
from mixflow.runtime.stopping import StopRequest
from mixflow.stages.evaluate_files import parse_metrics
from mixflow.stages.measure import measure_images

WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--reference-images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--metrics", default="fid,sfid,is,pr")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure, options.metrics)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder)
        write_images(path / "samples.npz", options.images, options.size)
        make_reference(path / "reference.safetensors", options.reference_images, options.size)
        start = time.perf_counter()
        command = [sys.executable, __file__, "--measure", folder, "--metrics", options.metrics]
        peak = int(subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout)
        size = (path / "samples.npz").stat().st_size
        threads = torch.get_num_threads()
        print(
            f"{options.metrics} of {options.images:,} images of {options.size} px against {options.reference_images:,}"
        )
        print(f"{time.perf_counter() - start:.0f} s with {threads} threads, without the network's share")
        print(f"numpy.load would hold  {size / 2**30:6.2f} GiB")
        print(f"peak resident memory   {peak / 2**20:6.2f} GiB, mapped pages and torch itself included")
        print(f"ratio {size / 2**10 / peak:.1f}")


def measure(folder: Path, metrics: str) -> None:
    """Measure as the command does and print the largest resident memory so far, in kiB."""
    measured = measure_images(
        open_images(folder / "samples.npz"),
        "0" * 64,
        load_reference(folder / "reference.safetensors"),
        folder / "reference.safetensors",
        Projection(),  # type: ignore[arg-type]
        parse_metrics(metrics),
        scratch=folder / "scratch",
        processes=OneProcess(),
        stop=StopRequest(),
    )
    assert measured is not None
    print(*(f"{name} {estimate.value:.4f}" for name, estimate in measured.estimates.items()), file=sys.stderr)
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))


class Projection:
    """Stands for `Extractor`: features are random mixtures of the mean colours of 8 x 8 patches, after a ReLU."""

    kind, sha256, tf32 = "inception", "0" * 64, False
    facts: dict[str, Any] = {"kind": kind, "tf32": tf32, "sha256": sha256}  # noqa: RUF012

    def load(self, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        mixtures = {name: torch.randn(192, width, generator=generator) / 4 for name, width in WIDTHS.items()}

        def see(pixels: np.ndarray) -> dict[str, torch.Tensor]:
            size = pixels.shape[1] // 8
            patches = torch.from_numpy(pixels[:, : 8 * size : size, : 8 * size : size].astype(np.float32))
            colours = (patches / 128 - 1).flatten(start_dim=1)  # [B,192]
            return {name: (colours @ mixture).relu_() for name, mixture in mixtures.items()}

        return see


def make_reference(path: Path, n: int, size: int) -> None:
    features = Projection().load(torch.device("cpu"))(noise(n, 8, seed=10**6))
    statistics = {name: moments(features[name]) for name in ("pool", "spatial")}
    facts = {"size": [size, size], "num_images": n, "published": False, "extractor": "", "source": "", "tf32": False}
    write_reference(path, "inception", statistics, features["pool"], facts)


def noise(n: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


def write_images(path: Path, n: int, size: int) -> None:
    folder = path.with_suffix("")
    folder.mkdir()
    writer = NpzWriter(folder, {"arr_0": ((n, size, size, 3), np.uint8)})
    writer.create()
    for first in range(0, n, 500):
        writer.write(first, arr_0=noise(min(500, n - first), size, seed=first))
    writer.finish(path)


if __name__ == "__main__":
    main()
