"""Which samples of a batch are certain enough to leave."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _checks
from bertops.ops.entropy import check_logits

_exit_decision = torch.ops.bertops.exit_decision.default


class ExitDecision(NamedTuple):
    """What :func:`bertops.exit_decision` returns, all on the device of the logits."""

    prediction: (
        Tensor  # (B,) int64: the likeliest class, the first of equals; of a row with NaN, the first NaN
    )
    uncertainty: Tensor  # (B,) fp32 (fp64 for fp64): its entropy
    exited: Tensor  # (B,) bool
    order: Tensor  # (B,) int64: rows that stay, then rows that exited, either in their order
    num_kept: Tensor  # () int64: how many stay


def exit_decision(
    logits: Tensor, threshold: float, *, normalize: bool = True, impl: str = "auto"
) -> ExitDecision:
    r"""Entropy, prediction, decision, and the order that compacts the batch, in one launch.

    Row b exits where

    .. math:: u_b = -\frac{1}{\ln C} \sum_c p_{bc} \ln p_{bc} \le \text{threshold}

    compared in the dtype of u. A row whose entropy is NaN never exits. ``hidden[order[:num_kept]]``, or
    :func:`bertops.compact`, is the batch of the rows that stay. Nothing is read back from the device, and no
    gradient flows.

    Args:
        logits: (B, C), fp32, bf16 or fp16 (fp64 on CPU), any strides; C from 1 on.
        threshold: in [0, 1], FastBERT's speed. At 1 every row exits but those of NaN; at 0 only rows whose
            entropy rounds to 0.
        normalize: False leaves the entropy in nats, as DeeBERT does; then the threshold is in nats too, from
            0 on.
        impl: ``auto``, ``cpu``, ``cuda`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        :class:`ExitDecision`. With a single class the entropy is 0 and every row exits.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    Source: Liu et al. 2020 (FastBERT), section 3.3, whose code exits at uncertainty <= speed as well.
    """
    check_logits(logits)
    if not isinstance(threshold, int | float | torch.SymFloat):
        raise TypeError(f"threshold must be a number, got {_checks.describe(threshold)}")
    largest = 1.0 if normalize else math.inf
    if not 0.0 <= threshold <= largest:
        unit = "the normalized entropy" if normalize else "an entropy in nats"
        raise ValueError(f"threshold must be in [0, {largest:g}], {unit}, got {threshold!r}")
    if logits.requires_grad:
        logits = logits.detach()
    backend = _backend.resolve("exit_decision", impl, logits.device)
    if backend == "reference":
        return ExitDecision(*reference.exit_decision(logits, threshold, normalize))
    return ExitDecision(*_exit_decision(logits, threshold, normalize))
