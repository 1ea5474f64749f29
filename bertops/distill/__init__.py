"""What a student learns from: :mod:`~bertops.distill.capture` and :mod:`~bertops.distill.layer_map`."""
