"""Inception Score (Salimans et al., 2016) by the protocol of the ADM evaluator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixflow.evaluation.arrays import Array, finite_matrix
from mixflow.runtime.errors import UserError


def inception_score(logits: Array, split_size: int = 5000) -> float:
    """Return the mean over chunks of exp(mean_i KL(p(y|x_i) || mean_j p(y|x_j))), natural logarithm.

    Chunks are `split_size` consecutive rows, in file order and never shuffled: class-sorted files score far lower. A
    ragged last chunk weighs as much as a whole one. Softmax and sums are float64, from log-probabilities, so that
    nothing underflows (the ADM evaluator works in float32 and gives NaN where a probability rounds to zero; elsewhere
    the two agree to 1e-6 relative).

    Args:
        logits: [n, classes], the classifier's output *without bias*, one row per image in file order.
        split_size: images per chunk.

    Raises `UserError` for NaN, infinity, no rows, or `split_size` < 1.
    """
    return inception_score_influence(logits, split_size)[0]


def inception_score_influence(logits: Array, split_size: int = 5000) -> tuple[float, Tensor]:
    """Return `inception_score` and how far each image pulls it, float64 [n], 0 on average.

    In a chunk of score S the derivative of log S by the weight of image i is KL(p(y|x_i) || p(y)) less its mean; as the
    marginal p(y) minimises the mean divergence, its own change adds nothing.
    """
    rows = finite_matrix(logits, "logits")
    if len(rows) == 0:
        raise UserError("the Inception Score of 0 images is undefined: give at least one row of logits")
    if split_size < 1:
        raise UserError(f"split_size must be at least 1, got {split_size}: the protocol's value is 5000")
    chunks = rows.split(split_size)
    scores, pulls = [], []
    for chunk in chunks:
        log_p = torch.log_softmax(chunk.double(), dim=1)  # [b,classes]
        log_marginal = torch.logsumexp(log_p, dim=0) - math.log(len(chunk))  # [classes]
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(dim=1)  # [b]
        scores.append(divergence.mean().exp())
        pulls.append(scores[-1] * (1 + divergence - divergence.mean()))
    score = torch.stack(scores).mean()
    # Chunks count alike, so that an image of a short one counts more. What sets its chunk apart from the others stays
    # in an image's influence: it is noise, too.
    influence = [
        (pull - score) * (len(rows) / (len(chunks) * len(chunk))) for pull, chunk in zip(pulls, chunks, strict=True)
    ]
    return float(score), torch.cat(influence)
