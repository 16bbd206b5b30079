"""The training loop: optimiser, EMA, resume points. It is handed a network, a loss and batches."""

from mixflow.training.loop import Recipe, train

__all__ = ["Recipe", "train"]
