"""Inference that stops for every sample where it is certain enough."""

from bertops.early_exit.calibration import Calibration, CalibrationPoint, calibrate_speed, plot_calibration
from bertops.early_exit.criteria import Criterion, Entropy, NormalizedEntropy, Patience
from bertops.early_exit.flops import classifier_flops, exit_flops, full_flops, layer_flops
from bertops.early_exit.pool import ExitPool, PoolAnswer
from bertops.early_exit.pool_stats import LayerStats, PoolStats
from bertops.early_exit.runtime import ExitOutput

__all__ = [
    "Calibration",
    "CalibrationPoint",
    "Criterion",
    "Entropy",
    "ExitOutput",
    "ExitPool",
    "LayerStats",
    "NormalizedEntropy",
    "Patience",
    "PoolAnswer",
    "PoolStats",
    "calibrate_speed",
    "classifier_flops",
    "exit_flops",
    "full_flops",
    "layer_flops",
    "plot_calibration",
]
