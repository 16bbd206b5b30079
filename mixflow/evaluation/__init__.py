"""Metrics over features, logits and pixels, and the small network that makes features where Inception cannot."""

from mixflow.evaluation.classifier import Classifier, load_classifier, save_classifier, train_classifier
from mixflow.evaluation.frechet import covariance_factor, frechet_distance
from mixflow.evaluation.inception_score import inception_score
from mixflow.evaluation.metrics import class_accuracy, memorisation, nearest_distances, variance_ratio
from mixflow.evaluation.moments import Moments, moments
from mixflow.evaluation.precision_recall import precision_recall
from mixflow.evaluation.resize import resize_tf1

__all__ = [
    "Classifier",
    "Moments",
    "class_accuracy",
    "covariance_factor",
    "frechet_distance",
    "inception_score",
    "load_classifier",
    "memorisation",
    "moments",
    "nearest_distances",
    "precision_recall",
    "resize_tf1",
    "save_classifier",
    "train_classifier",
    "variance_ratio",
]
