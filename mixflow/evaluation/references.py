"""What samples are compared with, everything derived from it once, and every metric by its name.

Inception: FID, sFID, IS, precision and recall as OpenAI's ADM evaluator (guided-diffusion) defines them, precision and
recall without its rounding, KID, density and coverage. DINOv2: the Fréchet distance FD-DINOv2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixflow.evaluation.frechet import covariance_factor
from mixflow.evaluation.precision_recall import squared_radii
from mixflow.evaluation.statistics import NPZ_NAMES
from mixflow.evaluation.uncertainty import (
    Estimate,
    density_coverage_estimate,
    frechet_estimate,
    inception_score_estimate,
    kid_estimate,
    precision_recall_estimate,
)
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path

NEIGHBOURS = 3  # of precision and recall
DENSITY_NEIGHBOURS = 5  # of density and coverage
_KIND = "mixflow reference"


class Gaussian(NamedTuple):
    """Mean [d], covariance [d,d] and its factor [d,d], float64."""

    mu: Tensor
    sigma: Tensor
    factor: Tensor


# Kind of network -> the feature whose single rows are looked at.
ROWS = {"inception": "pool", "dinov2": "class"}


@dataclass(frozen=True)
class Reference:
    """What samples are compared with, on the device asked for."""

    kind: str  # of the network, inception or dinov2
    gaussians: dict[str, Gaussian]  # by feature
    rows: Tensor | None  # features [M,d] of the images kept for precision, recall, KID, density and coverage, float32
    radii: dict[str, Tensor] = field(default_factory=dict)  # squared [M]: adm, exact, density
    facts: dict[str, Any] = field(default_factory=dict)  # see `write_reference`

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its images in pixels, None where only their statistics are known."""
        return tuple(self.facts["size"]) if self.facts.get("size") else None

    def metrics(self) -> list[str]:
        """Return the names of all metrics that can be had."""
        return [name for name, metric in METRICS.items() if metric.kind == self.kind and metric.lacks(self) is None]


def write_reference(
    out: str | os.PathLike[str],  # .safetensors
    kind: str,
    statistics: dict[str, tuple[Tensor, Tensor]],  # by feature: mean and covariance
    rows: Tensor | None,  # features of the images kept, None without any
    facts: dict[str, Any],  # JSON-able: size [H,W] or None, num_images behind the statistics or None, extractor and
    # source (SHA-256), tf32, published (statistics taken from a published file)
    device: torch.device | str = "cpu",
) -> Reference:
    """Derive factors and radii, write all, and return it. `UserError` for NaN."""
    tensors: dict[str, Tensor] = {}
    for feature, (mu, sigma) in statistics.items():
        sigma = sigma.to(device, torch.float64)
        gaussian = Gaussian(mu.to(device, torch.float64), sigma, covariance_factor(sigma))
        tensors |= {f"{feature}.{part}": tensor for part, tensor in gaussian._asdict().items()}
    if rows is not None:
        rows = tensors["rows"] = rows.to(device)
        if len(rows) > NEIGHBOURS:
            tensors["radii.adm"] = squared_radii(rows, NEIGHBOURS, "adm")
            tensors["radii.exact"] = squared_radii(rows, NEIGHBOURS, "exact")
        if len(rows) > DENSITY_NEIGHBOURS:
            tensors["radii.density"] = squared_radii(rows, DENSITY_NEIGHBOURS, "exact")
    facts = {"file": _KIND, "kind": kind, "num_rows": 0 if rows is None else len(rows), **facts}
    with atomic_path(out) as temporary:
        # One metadata key only: safetensors writes several in no fixed order.
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, temporary, metadata={"mixflow": json.dumps(facts, sort_keys=True)})
    return _assembled(tensors, facts)


def load_reference(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Reference:
    """Read what `write_reference` wrote. `UserError` for a missing, broken or other file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            facts = json.loads((file.metadata() or {}).get("mixflow", "{}"))
            if facts.get("file") != _KIND:
                raise UserError(
                    f"'{path}' is a safetensors file but no reference: give what `evaluate --make-reference` wrote, or "
                    "ADM's .npz"
                )
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise UserError(f"reference '{path}' does not exist: make it first, or correct the path") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"reference '{path}' cannot be read ({error}): delete it and make it again") from None
    return _assembled(tensors, facts)


def _assembled(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Reference:
    features = [name.removesuffix(".mu") for name in tensors if name.endswith(".mu")]
    return Reference(
        kind=facts["kind"],
        gaussians={name: Gaussian(*(tensors[f"{name}.{part}"] for part in Gaussian._fields)) for name in features},
        rows=tensors.get("rows"),
        radii={name.removeprefix("radii."): radii for name, radii in tensors.items() if name.startswith("radii.")},
        facts=facts,
    )


# --- metrics by name -------------------------------------------------------------------------------------------------

RowsOf = Callable[[str], Tensor]  # feature -> its values [N,d] for all samples, in file order
Estimates = dict[str, Estimate]


def _frechet(metric: str, feature: str) -> Callable[[Reference, RowsOf], Estimates]:
    def estimate(reference: Reference, rows: RowsOf) -> Estimates:
        gaussian = reference.gaussians[feature]
        return {metric: frechet_estimate(gaussian.mu, gaussian.sigma, rows(feature), factor=gaussian.factor)}

    return estimate


def _inception_score(reference: Reference, rows: RowsOf) -> Estimates:
    return {"is": inception_score_estimate(rows("logits"))}


def _precision_recall(mode: str, suffix: str) -> Callable[[Reference, RowsOf], Estimates]:
    def estimate(reference: Reference, rows: RowsOf) -> Estimates:
        assert reference.rows is not None
        precision, recall = precision_recall_estimate(
            reference.rows, rows("pool"), k=NEIGHBOURS, mode=mode, reference_radii=reference.radii[mode]
        )
        return {f"precision{suffix}": precision, f"recall{suffix}": recall}

    return estimate


def _density_coverage(reference: Reference, rows: RowsOf) -> Estimates:
    assert reference.rows is not None
    density, coverage = density_coverage_estimate(
        reference.rows, rows("pool"), k=DENSITY_NEIGHBOURS, reference_radii=reference.radii["density"]
    )
    return {"density": density, "coverage": coverage}


def _kid(reference: Reference, rows: RowsOf) -> Estimates:
    assert reference.rows is not None
    samples = rows("pool")
    return {"kid": kid_estimate(reference.rows, samples, subset_size=kid_subset_size(reference, len(samples)))}


def kid_subset_size(reference: Reference, num_samples: int) -> int:
    """Return the images per subset of KID: 1000 by its protocol, fewer where a set is smaller."""
    assert reference.rows is not None
    return min(1000, len(reference.rows), num_samples)


class Metric(NamedTuple):
    """How a metric, or two that are computed together, come about."""

    kind: str  # of the network
    needs: str  # the statistics of this feature, "" for none, or "images": the features of single images
    estimate: Callable[[Reference, RowsOf], Estimates]

    def lacks(self, reference: Reference) -> str | None:
        """Return what the reference would have to hold, None where it does."""
        if self.needs == "images":
            enough = reference.rows is not None and len(reference.rows) > DENSITY_NEIGHBOURS
            return None if enough else f"more than {DENSITY_NEIGHBOURS} images"
        if self.needs and self.needs not in reference.gaussians:
            return " and ".join(NPZ_NAMES[self.kind][self.needs])
        return None


_PRECISION_RECALL = Metric("inception", "images", _precision_recall("adm", ""))
_EXACT = Metric("inception", "images", _precision_recall("exact", "_exact"))
_DENSITY_COVERAGE = Metric("inception", "images", _density_coverage)
METRICS = {
    "fid": Metric("inception", "pool", _frechet("fid", "pool")),
    "sfid": Metric("inception", "spatial", _frechet("sfid", "spatial")),
    "is": Metric("inception", "", _inception_score),
    "precision": _PRECISION_RECALL,
    "recall": _PRECISION_RECALL,
    "precision_exact": _EXACT,
    "recall_exact": _EXACT,
    "kid": Metric("inception", "images", _kid),
    "density": _DENSITY_COVERAGE,
    "coverage": _DENSITY_COVERAGE,
    "fd_dinov2": Metric("dinov2", "class", _frechet("fd_dinov2", "class")),
}


def require_metrics(reference: Reference, names: Sequence[str], source: object) -> None:
    """Raise `UserError` unless `reference`, called `source` in the message, can give every metric."""
    for name in names:
        if METRICS[name].kind != reference.kind:
            raise UserError(
                f"'{name}' needs {METRICS[name].kind} features but '{source}' holds those of {reference.kind}: ask "
                f"for one of {', '.join(reference.metrics())}, or give another reference"
            )
        if (lacking := METRICS[name].lacks(reference)) is not None:
            raise UserError(
                f"'{name}' needs a reference with {lacking}, which '{source}' does not hold: ask for "
                f"{', '.join(reference.metrics())}, or give another reference"
            )


def frechet_widths(reference: Reference, metrics: Sequence[str]) -> dict[str, int]:
    """Return the width of the features behind each Fréchet distance among `metrics`."""
    needs = {name: METRICS[name].needs for name in metrics}
    return {name: len(reference.gaussians[need].mu) for name, need in needs.items() if need in reference.gaussians}


def measure(reference: Reference, rows: RowsOf, metrics: Sequence[str]) -> Estimates:
    """Return the metrics, in the order asked for, each with the standard error of sampling where it can be had.

    Raises `UserError` for NaN or infinity in features, and for sets too small for a metric.
    """
    estimates: Estimates = {}
    for name in metrics:
        if name not in estimates:
            estimates |= METRICS[name].estimate(reference, rows)
    return {name: estimates[name] for name in metrics}
