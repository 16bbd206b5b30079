"""References for Inception and DINOv2: from a published file of statistics, or from images of one's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixflow.autoencoders import load_autoencoder
from mixflow.data.latents import LatentCache
from mixflow.evaluation import load_reference, open_images, write_reference
from mixflow.evaluation.features import MOMENTS_PART, ROWS_PART, Rows, Source, Sums, total_moments
from mixflow.evaluation.references import ROWS, Reference
from mixflow.evaluation.statistics import NPZ_NAMES, has_images, has_statistics, read_statistics
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path, file_sha256
from mixflow.runtime.processes import Processes
from mixflow.runtime.progress import log
from mixflow.runtime.stopping import StopRequest
from mixflow.stages.image_features import Extractor, seen

KEPT_IMAGES = 10_000  # for precision and recall, as in ADM's references


class CachedImages:
    """The images of a latent cache of pixels, as a source of a reference."""

    def __init__(self, index: Path, autoencoder: dict[str, Any]) -> None:
        self.path = index
        self.cache = LatentCache(index)
        self._split = self.cache.split("train")
        self._codec = load_autoencoder(autoencoder)

    def __len__(self) -> int:
        return len(self._split)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.cache.latent_shape[-2:]
        return height, width

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return uint8 [stop - start, H, W, 3]; grey images have three equal channels."""
        stored, _ = self._split.gather(np.arange(start, stop))
        return self._codec.decode(self._codec.latents(stored, None)).numpy()


def make_image_reference(
    source: Path | CachedImages,  # ADM's .npz, EDM2's .pkl, a reference of ours, or images: .npz, folder, cache
    extractor: Extractor,
    out: Path,
    *,
    scratch: Path,
    processes: Processes,
    stop: StopRequest,
    only_statistics: bool = False,  # images without statistics are refused: distances to them are no published ones
    kept_images: int = KEPT_IMAGES,  # of images of one's own: how many serve precision, recall, KID, density, coverage
) -> int | None:
    """Write the reference; return the number of images behind its statistics, None where a file keeps that to itself.

    Every process calls it, the main one writes. Raises `UserError` for a file of another kind or extractor.
    """
    cached = isinstance(source, CachedImages)
    path = source.path if isinstance(source, CachedImages) else source
    if path.suffix == ".safetensors":
        _copy(path, extractor, out, processes)
        return None
    if not cached and (only_statistics or path.suffix == ".pkl" or has_statistics(path)):
        _from_statistics(path, extractor, out, scratch=scratch, processes=processes, stop=stop)
        return None
    images: Source = source if isinstance(source, CachedImages) else open_images(source)
    if len(images) < 2:
        raise UserError(f"'{path}' holds {len(images)} image, from which no covariance can be had: give more")
    kept = np.unique(np.arange(min(kept_images, len(images))) * len(images) // min(kept_images, len(images)))
    names, kept_of = list(NPZ_NAMES[extractor.kind]), ROWS[extractor.kind]
    sha256 = file_sha256(path) if cached else images.sha256()  # type: ignore[attr-defined]
    with seen(
        images, sha256, extractor, MOMENTS_PART, lambda: Sums(names, kept_of, kept),
        key={"reference": len(kept)}, scratch=scratch, processes=processes, stop=stop,
    ) as parts:  # fmt: skip
        if processes.is_main_process:
            statistics = {name: total_moments(parts, name)[:2] for name in names}
            rows = torch.cat(list(parts.read("kept")))
            facts = _facts(extractor, sha256, size=images.size, num_images=len(images), published=False)
            write_reference(out, extractor.kind, statistics, rows, facts, processes.device)
            log.info("%s: statistics of %d images, features of %d", out, len(images), len(rows))
    return len(images)


def _from_statistics(
    path: Path,
    extractor: Extractor,
    out: Path,
    *,
    scratch: Path,
    processes: Processes,
    stop: StopRequest,
) -> None:
    """A published file: its statistics as they are, and the features of its images if it has any."""
    statistics = read_statistics(path, extractor.kind)
    _require_widths(statistics, path, extractor, processes.device)
    sha256 = file_sha256(path)
    images = open_images(path) if has_images(path) else None

    def write(rows: Tensor | None) -> None:
        if processes.is_main_process:
            size = images.size if images is not None else None
            facts = _facts(extractor, sha256, size=size, num_images=None, published=True)
            write_reference(out, extractor.kind, statistics, rows, facts, processes.device)
            log.info("%s: statistics, and features of %d images", out, 0 if rows is None else len(rows))

    if images is None or extractor.kind != "inception":
        write(None)
        return
    with seen(
        images, sha256, extractor, ROWS_PART, Rows,
        key={}, scratch=scratch, processes=processes, stop=stop,
    ) as parts:  # fmt: skip
        write(parts.rows(ROWS[extractor.kind], processes.device) if processes.is_main_process else None)


def _require_widths(
    statistics: dict[str, tuple[Tensor, Tensor]], path: Path, extractor: Extractor, device: torch.device
) -> None:
    """Raise `UserError` unless statistics are of features as wide as the network's: whose they are no file tells."""
    seen_by_network = extractor.load(device)(np.zeros((1, 64, 64, 3), np.uint8))
    for name, (mu, _) in statistics.items():
        if (width := seen_by_network[name].shape[1]) != mu.numel():
            raise UserError(
                f"'{path}' holds statistics of {mu.numel()} features where the {extractor.kind} extractor "
                f"'{extractor.weights}' has {width}: give the weights that they were made with"
            )


def _copy(path: Path, extractor: Extractor, out: Path, processes: Processes) -> None:
    require_extractor(load_reference(path), path, extractor)
    if processes.is_main_process:
        with atomic_path(out) as temporary:
            shutil.copyfile(path, temporary)


def require_extractor(reference: Reference, path: str | os.PathLike[str], extractor: Extractor) -> None:
    """Raise `UserError` unless a reference was made with these very weights, in this arithmetic."""
    if reference.kind != extractor.kind:
        raise UserError(
            f"'{path}' was made by {reference.kind} where {extractor.kind} is asked for: give another reference, or "
            "other metrics"
        )
    if reference.facts["extractor"] != extractor.sha256:
        raise UserError(
            f"'{path}' was made with other weights than '{extractor.weights}': make the reference again, or give the "
            "weights that it was made with"
        )
    if reference.facts["tf32"] != extractor.tf32:
        made, asked = ("with", "without") if reference.facts["tf32"] else ("without", "with")
        raise UserError(f"'{path}' was made {made} TF32 and is to be used {asked}: make it again in the same way")


def _facts(extractor: Extractor, source: str, **facts: Any) -> dict[str, Any]:
    return {"extractor": extractor.sha256, "tf32": extractor.tf32, "source": source, **facts}
