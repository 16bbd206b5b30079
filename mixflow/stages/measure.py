"""Metrics of one set of images against a reference, by Inception or DINOv2: for the pipeline and for the command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mixflow.evaluation import Estimate, Reference, measure
from mixflow.evaluation.checks import LabelKind, label_kind, require_size, sample_warnings
from mixflow.evaluation.features import ROWS_PART, Rows
from mixflow.evaluation.images import ImageSource
from mixflow.evaluation.references import DENSITY_NEIGHBOURS, NEIGHBOURS, frechet_widths, kid_subset_size
from mixflow.runtime.processes import Processes
from mixflow.runtime.progress import log
from mixflow.runtime.stopping import StopRequest
from mixflow.stages.image_features import Extractor, seen


class Measured(NamedTuple):
    """What there is to say about one set of images."""

    estimates: dict[str, Estimate]
    num_images: int
    size: tuple[int, int]  # height and width in pixels
    labels: LabelKind
    warnings: list[str]
    digests: np.ndarray  # uint64 [N], one per image

    def summary(self) -> dict[str, Any]:
        """Return it as metrics.json holds it."""
        return {
            "metrics": {name: digits(estimate.value) for name, estimate in self.estimates.items()},
            "standard_errors": {name: digits(estimate.standard_error) for name, estimate in self.estimates.items()},
            "group_influences": {
                name: [float(f"{part:.6g}") for part in estimate.groups]
                for name, estimate in self.estimates.items()
                if estimate.groups is not None
            },
            "num_images": self.num_images,
            "labels": self.labels,
            "warnings": self.warnings,
        }


def digits(value: float | None) -> float | None:
    """Return ten digits of a number: the last ones depend on where in memory a matrix happens to lie."""
    return None if value is None else float(f"{value:.10g}")


def measure_images(
    images: ImageSource,
    sha256: str,  # of the images
    reference: Reference,
    reference_path: Path,
    extractor: Extractor,
    metrics: Sequence[str],
    *,
    scratch: Path,
    processes: Processes,
    stop: StopRequest,
    keep_features: bool = False,
) -> Measured | None:
    """Return the metrics on the main process, None on the others, which help with the features alone.

    Raises `UserError` for images of another resolution than the reference's, damaged ones, and NaN.
    """
    if reference.size is not None:
        require_size(images.path, images.size, reference_path, reference.size)
    with seen(
        images, sha256, extractor, ROWS_PART, Rows,
        key={}, scratch=scratch, processes=processes, stop=stop, keep=keep_features,
    ) as parts:  # fmt: skip
        if not processes.is_main_process:
            return None
        log.info("metrics of %s: %s", images.path, ", ".join(metrics))
        estimates = measure(reference, _last_asked(lambda name: parts.rows(name, processes.device)), metrics)
        digests, low, high = (parts.rows(name).numpy() for name in ("digests", "low", "high"))
        digests = digests.view(np.uint64)
        warnings = [
            *images.notes,
            *sample_warnings(
                images.path,
                digests=digests,
                low=low,
                high=high,
                labels=images.labels,
                logits=parts.rows("logits", processes.device) if "is" in metrics else None,
                dimensions=frechet_widths(reference, metrics),
            ),
        ]
    labels = "unknown" if images.labels is None else label_kind(images.labels)
    return Measured(estimates, len(images), images.size, labels, warnings, digests)


def _last_asked(load: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Keep the features that were asked for last: metrics that share them come one after the other."""
    held: dict[str, Tensor] = {}

    def rows(name: str) -> Tensor:
        if name not in held:
            held.clear()  # before the next are loaded: never two kinds in memory
            held[name] = load(name)
        return held[name]

    return rows


def measurement(reference: Reference, extractor: Extractor, num_images: int) -> dict[str, Any]:
    """Return how the numbers come about, as far as it is not the sampler's business: part of the protocol."""
    facts = {key: reference.facts[key] for key in ("source", "published", "num_images", "num_rows", "size")}
    how: dict[str, Any] = {"extractor": extractor.facts, "reference": facts}
    how["features"] = "TF32" if extractor.tf32 else "float32, no TF32"
    if extractor.kind == "dinov2":
        return {**how, "resize": "bicubic to 224 by Pillow, on uint8", "frechet_distance": "float64, ddof 1"}
    how |= {
        "resize": "TF1 bilinear to 299, grid from the corner",
        "frechet_distance": "float64, ddof 1",
        "inception_score": "logits without bias, mean over chunks of 5000 in file order, float64",
        "precision_recall": f"pool_3, k {NEIGHBOURS}; half-precision distances as ADM's, *_exact: float64",
        "density_coverage": f"pool_3, k {DENSITY_NEIGHBOURS}, float64",
    }
    if reference.rows is not None:
        how["kid"] = f"cubic kernel, 100 subsets of {kid_subset_size(reference, num_images)}, seed 2020"
    return how
