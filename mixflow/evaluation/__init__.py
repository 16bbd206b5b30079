"""Metrics over features, logits and pixels, and the networks that make the features."""

from mixflow.evaluation.adm import (
    Features,
    Reference,
    adm_metrics,
    image_features,
    load_adm_reference,
    make_adm_reference,
)
from mixflow.evaluation.archives import ImageArchive
from mixflow.evaluation.classifier import Classifier, load_classifier, save_classifier, train_classifier
from mixflow.evaluation.frechet import covariance_factor, frechet_distance, frechet_distance_to
from mixflow.evaluation.inception import Inception, load_inception, tiny_inception_state_dict
from mixflow.evaluation.inception_score import inception_score
from mixflow.evaluation.metrics import class_accuracy, memorisation, nearest_distances, variance_ratio
from mixflow.evaluation.moments import Moments, moments
from mixflow.evaluation.precision_recall import precision_recall
from mixflow.evaluation.resize import resize_tf1

__all__ = [
    "Classifier",
    "Features",
    "ImageArchive",
    "Inception",
    "Moments",
    "Reference",
    "adm_metrics",
    "class_accuracy",
    "covariance_factor",
    "frechet_distance",
    "frechet_distance_to",
    "image_features",
    "inception_score",
    "load_adm_reference",
    "load_classifier",
    "load_inception",
    "make_adm_reference",
    "memorisation",
    "moments",
    "nearest_distances",
    "precision_recall",
    "resize_tf1",
    "save_classifier",
    "tiny_inception_state_dict",
    "train_classifier",
    "variance_ratio",
]
