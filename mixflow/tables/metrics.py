"""How each metric is named, shown and read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a number is shown and read."""

    name: str  # in headers
    long_name: str
    decimals: int
    better: str | None  # "lower", "higher", or None where neither end is good
    definition: str
    paper_decimals: int | None = None  # of papers, where they print fewer
    factor: float = 1  # what is shown over what is stored, in metrics.json as in `paper:`


METRICS = {
    "fd": Metric(
        "FD", "Fréchet distance", 2, "lower",
        "between Gaussians fitted to the classifier's features of the samples and of the training images",
    ),
    "fd_held_out": Metric(
        "FD held-out", "Fréchet distance to held-out images", 2, "lower",
        "the same distance to real images that no model was trained on",
    ),
    "accuracy": Metric(
        "accuracy", "class accuracy", 3, "higher",
        "fraction of samples that the classifier assigns to the class they were made for",
    ),
    "variance_ratio": Metric(
        "variance ratio", "variance ratio", 3, None,
        "pixel variance of the samples over that of the training images; 1 is right, less means lost variety",
    ),
    "nearest_train": Metric(
        "nearest train", "distance to the nearest training image", 3, None,
        "mean over the samples, among as many training images as there are held-out ones",
    ),
    "nearest_held_out": Metric(
        "nearest held-out", "distance to the nearest held-out image", 3, None,
        "mean over the samples; when it is larger than the distance to training images, training images were memorised",
    ),
    "fid": Metric(
        "gFID", "Fréchet Inception distance", 2, "lower",
        "between Gaussians fitted to Inception features of the samples and of the training images",
    ),
    "sfid": Metric(
        "sFID", "spatial Fréchet Inception distance", 2, "lower",
        "the same distance on features that keep the spatial layout",
    ),
    "is": Metric(
        "IS", "Inception score", 1, "higher",
        "how surely Inception names a class for each sample, and how evenly the classes are met",
    ),
    "precision": Metric(
        "precision", "precision as in OpenAI's evaluator", 3, "higher",
        "fraction of samples inside the ball of a real image, which reaches to its 3rd nearest other one (k = 3); "
        "distances in half precision",
        paper_decimals=2,
    ),
    "recall": Metric(
        "recall", "recall as in OpenAI's evaluator", 3, "higher",
        "fraction of real images inside the ball of a sample (k = 3); distances in half precision",
        paper_decimals=2,
    ),
    "precision_exact": Metric(
        "precision (exact)", "precision", 3, "higher",
        "the same fraction (k = 3) with exact distances; half precision reads a little higher",
        paper_decimals=2,
    ),
    "recall_exact": Metric(
        "recall (exact)", "recall", 3, "higher",
        "the same fraction (k = 3) with exact distances; half precision reads a little higher",
        paper_decimals=2,
    ),
    "kid": Metric(
        "KID ×1000", "kernel Inception distance", 2, "lower",
        "unbiased squared MMD with a cubic kernel between Inception features of samples and real images, mean over 100 "
        "subsets of 1,000; shown times 1,000, as papers do; chance can take it a little below 0",
        factor=1000,
    ),
    "density": Metric(
        "density", "density", 3, "higher",
        "how many real images' balls a sample lies in, over k = 5; exact distances; about 1 where samples lie as real "
        "images do, more where they crowd together",
    ),
    "coverage": Metric(
        "coverage", "coverage", 3, "higher",
        "fraction of real images with a sample inside their ball (k = 5); exact distances",
    ),
    "fd_dinov2": Metric(
        "FD-DINOv2", "Fréchet distance in DINOv2's features", 2, "lower",
        "between Gaussians fitted to the class tokens of DINOv2 ViT-L/14 for the samples and for the training images",
    ),
}  # fmt: skip

# The FID Lottery (arXiv 2606.20536): SiTs on ImageNet 256 that differ in the training seed alone; gaps below it are
# inconclusive. Nobody has measured it for the other Fréchet distances, nor for post-training from one checkpoint.
RETRAINING_FLOOR = 0.013
FRECHET = ("fd", "fd_held_out", "fid", "sfid", "fd_dinov2")


def decimals_of_paper(metric: str) -> int:
    shown = METRICS[metric]
    return shown.decimals if shown.paper_decimals is None else shown.paper_decimals


def number_text(value: float | None, metric: str, decimals: int | None = None) -> str:
    if value is None:
        return "–"
    shown = METRICS[metric]
    return f"{shown.factor * value:z.{shown.decimals if decimals is None else decimals}f}".replace("-", "−")


def paper_text(value: float | None, metric: str) -> str:
    return number_text(value, metric, decimals_of_paper(metric))


def error_text(error: float | None, metric: str) -> str:
    """Return " ± 0.05"; with more decimals than the number where there would be nothing but zeros."""
    if error is None:
        return ""
    text = number_text(error, metric)
    return f" ± {f'{METRICS[metric].factor * error:.1g}' if error > 0 and float(text) == 0 else text}"


def signed_text(value: float, metric: str) -> str:
    text = number_text(abs(value), metric)
    return ("−" if value < 0 and float(text) != 0 else "+") + text


def interval_text(interval: tuple[float, float] | list[float], metric: str) -> str:
    """Return "[−0.10, +0.25]", of a difference."""
    return f"[{', '.join(signed_text(end, metric) for end in interval)}]"
