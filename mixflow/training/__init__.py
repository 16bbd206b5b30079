"""The training loop: optimiser, EMA, resume points. It is handed a network, a loss and batches."""

from mixflow.training.alignment import aligned_flow_matching_loss
from mixflow.training.loop import Decay, Recipe, micro_batches, train

__all__ = ["Decay", "Recipe", "aligned_flow_matching_loss", "micro_batches", "train"]
