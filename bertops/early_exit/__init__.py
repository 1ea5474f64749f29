"""Inference that stops for every sample where it is certain enough."""

from bertops.early_exit.criteria import Criterion, Entropy, NormalizedEntropy, Patience
from bertops.early_exit.pool import ExitPool, PoolAnswer
from bertops.early_exit.pool_stats import LayerStats, PoolStats
from bertops.early_exit.runtime import ExitOutput

__all__ = [
    "Criterion",
    "Entropy",
    "ExitOutput",
    "ExitPool",
    "LayerStats",
    "NormalizedEntropy",
    "Patience",
    "PoolAnswer",
    "PoolStats",
]
