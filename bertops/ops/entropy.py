"""Entropy of a batch of classifications."""

from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _checks
from bertops.ops._autograd import once_differentiable

_entropy_fwd = torch.ops.bertops.entropy_fwd.default
_entropy_bwd = torch.ops.bertops.entropy_bwd.default


def entropy(logits: Tensor, *, normalize: bool = False, impl: str = "auto") -> Tensor:
    r"""Entropy of softmax(logits), row by row, exact also where one class has nearly all of the probability.

    With :math:`d_c = z_c - \max z` and :math:`r` the sum of :math:`e^{d_c}` over all classes but the largest,

    .. math:: H = -\sum_c p_c \ln p_c = \ln(1 + r) - \mu, \qquad \mu = \sum_c p_c d_c,

    and for the upstream gradient g

    .. math:: dz_c = -g\, p_c (\ln p_c + H) = -g\, p_c (d_c - \mu).

    Args:
        logits: (B, C), fp32, bf16 or fp16 (fp64 on CPU), any strides; C from 1 on, -inf for a class that
            cannot be.
        normalize: divide by ln C, which makes it FastBERT's uncertainty in [0, 1]. A single class has
            entropy 0 either way.
        impl: ``auto``, ``cpu``, ``cuda`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        (B,) in fp32 (fp64 for fp64), in nats unless normalized. NaN, with a NaN gradient, for a row that has
        no softmax: NaN or +inf in it, or nothing but -inf.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    Source: Liu et al. 2020 (FastBERT), section 3.3, equation 6; Xin et al. 2020 (DeeBERT), section 3.2.
    """
    check_logits(logits)
    backend = _backend.resolve("entropy", impl, logits.device)
    if backend == "reference":
        return reference.entropy(logits, normalize)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Entropy.apply(logits, normalize)
    return _entropy_fwd(logits, normalize)


def check_logits(logits: Tensor) -> None:
    """``logits`` is (B, C) with at least one class, of a supported dtype."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {_checks.describe(logits)}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must have shape (B, C) with C >= 1, got {_checks.describe(logits)}")
    _checks.check_dtype("logits", logits)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, normalize: bool) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.normalize = normalize
        return _entropy_fwd(logits, normalize)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (logits,) = ctx.saved_tensors
        return _entropy_bwd(grad, logits, ctx.normalize), None
