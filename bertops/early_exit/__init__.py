"""Early exit: samples leave an encoder at the layer where they are certain."""

from bertops.early_exit.pool import ExitPool, PoolAnswer

__all__ = ["ExitPool", "PoolAnswer"]
