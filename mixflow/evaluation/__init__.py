"""Metrics over features, logits and pixels, and the networks that make the features."""

from mixflow.evaluation.checks import label_kind
from mixflow.evaluation.classifier import Classifier, load_classifier, save_classifier, train_classifier
from mixflow.evaluation.frechet import covariance_factor, frechet_distance, frechet_distance_to
from mixflow.evaluation.images import ImageArchive, ImageFolder, open_images
from mixflow.evaluation.inception import Inception, load_inception, tiny_inception_state_dict
from mixflow.evaluation.inception_score import inception_score
from mixflow.evaluation.kernel import kernel_distance
from mixflow.evaluation.metrics import (
    class_accuracy,
    memorisation,
    nearest_distances,
    variance_ratio,
    variance_ratio_influence,
)
from mixflow.evaluation.moments import Moments, moments
from mixflow.evaluation.precision_recall import density_coverage, precision_recall
from mixflow.evaluation.references import Reference, load_reference, measure, write_reference
from mixflow.evaluation.resize import resize_tf1
from mixflow.evaluation.statistics import read_statistics
from mixflow.evaluation.uncertainty import Estimate, Spread, frechet_estimate, mean_estimate, spread, standard_error

__all__ = [
    "Classifier",
    "Estimate",
    "ImageArchive",
    "ImageFolder",
    "Inception",
    "Moments",
    "Reference",
    "Spread",
    "class_accuracy",
    "covariance_factor",
    "density_coverage",
    "frechet_distance",
    "frechet_distance_to",
    "frechet_estimate",
    "inception_score",
    "kernel_distance",
    "label_kind",
    "load_classifier",
    "load_inception",
    "load_reference",
    "mean_estimate",
    "measure",
    "memorisation",
    "moments",
    "nearest_distances",
    "open_images",
    "precision_recall",
    "read_statistics",
    "resize_tf1",
    "save_classifier",
    "spread",
    "standard_error",
    "tiny_inception_state_dict",
    "train_classifier",
    "variance_ratio",
    "variance_ratio_influence",
    "write_reference",
]
