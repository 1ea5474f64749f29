"""What a student learns from: :mod:`~bertops.distill.capture` and :mod:`~bertops.distill.layer_map`."""

from bertops.distill import layer_map

__all__ = ["layer_map"]
