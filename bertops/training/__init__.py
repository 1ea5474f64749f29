"""The training loop of every recipe: an objective, a stream of batches and a plan in, a run folder out."""

from bertops.training.loop import measure, train
from bertops.training.optimizer import AdamW
from bertops.training.plan import Batch, Objective, Outcome, Plan, Stream
from bertops.training.run import Run

__all__ = ["AdamW", "Batch", "Objective", "Outcome", "Plan", "Run", "Stream", "measure", "train"]
