"""What the losses behind a linear layer share: rows of hidden states, and gradients formed in the forward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bertops._library import accumulator_dtype
from bertops.ops import _checks, _pairs
from bertops.ops.attention import AUTOCAST_DEVICES


def check_hidden(hidden_s: Tensor, hidden_t: Tensor) -> None:
    """Both are (B, N, width) or (M, width), with the same rows; the teacher's is a constant."""
    for name, x in (("hidden_s", hidden_s), ("hidden_t", hidden_t)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_checks.describe(x)}")
        if x.dim() not in (2, 3) or x.shape[-1] < 1:
            raise ValueError(f"{name} must have shape (B, N, width) or (M, width), got {_checks.describe(x)}")
        _checks.check_dtype(name, x)
    if hidden_t.shape[:-1] != hidden_s.shape[:-1]:
        raise ValueError(
            f"hidden_t must have the rows {tuple(hidden_s.shape[:-1])} of hidden_s, "
            f"got {_checks.describe(hidden_t)}"
        )
    if hidden_t.device != hidden_s.device:
        raise ValueError(
            f"hidden_t must be on the device {hidden_s.device} of hidden_s, got {_checks.describe(hidden_t)}"
        )
    _pairs.check_teacher("hidden_t", hidden_t)


def check_linear(names: Sequence[str], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``weight`` is (rows, width of ``hidden``), ``bias`` None or (rows,), in the dtype of ``hidden``.

    ``names`` are those of the three, in this order.
    """
    hidden_name, weight_name, bias_name = names
    if not isinstance(weight, Tensor):
        raise TypeError(f"{weight_name} must be a tensor, got {_checks.describe(weight)}")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} must have shape (rows, {hidden.shape[-1]}) for the width of {hidden_name}, "
            f"got {_checks.describe(weight)}"
        )
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"{bias_name} must be a tensor, got {_checks.describe(bias)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{bias_name} must have shape ({weight.shape[0]},) for the rows of {weight_name}, "
                f"got {_checks.describe(bias)}"
            )
    for name, x in ((weight_name, weight), (bias_name, bias)):
        if x is None:
            continue
        if x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype {hidden.dtype} of {hidden_name}, got {_checks.describe(x)}"
            )
        if x.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device {hidden.device} of {hidden_name}, got {_checks.describe(x)}"
            )


def check_reduction(reduction: str) -> None:
    if reduction not in _pairs.REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_pairs.REDUCTIONS)}, got {reduction!r}")


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What ``nn.Linear`` takes, in the autocast dtype where autocast is on."""
    device = next(x.device.type for x in tensors if isinstance(x, Tensor))
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def flat_rows(x: Tensor) -> Tensor:
    """(M, width), each row contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def flat_mask(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """(M,) bool."""
    if mask is None:
        return None
    expected = tuple(hidden.shape[:-1])
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor of shape {expected}, got {_checks.describe(mask)}")
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"mask must have the rows {expected} of hidden_s as its shape, got {_checks.describe(mask)}"
        )
    if mask.device != hidden.device:
        raise ValueError(f"mask must be on {hidden.device}, got {_checks.describe(mask)}")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask must be bool or integer, true for a real token, got {_checks.describe(mask)}")
    return (mask if mask.dtype == torch.bool else mask != 0).reshape(-1)


def row_share(reduction: str, hidden: Tensor, mask: Tensor | None, elements: int = 1) -> Tensor | None:
    """The weight () of each row of ``hidden`` (M, width) in the loss, None where it is not reduced.

    ``mean`` counts ``elements`` for each valid row, and at least one row.
    """
    if reduction == "none":
        return None
    dtype = accumulator_dtype(hidden.dtype)
    if reduction == "mean" and mask is not None:
        return 1 / (mask.sum().clamp_min(1) * elements).to(dtype)
    count = max(1, hidden.shape[0]) * elements if reduction == "mean" else 1
    return hidden.new_full((), 1 / count, dtype=dtype)


def sum_with_grads(ctx: Any, kernel: Callable[..., Any], share: Tensor, inputs: tuple, rest: tuple) -> Tensor:
    """The sum of the rows times ``share``; its gradients stay in ``ctx`` for :func:`saved_grads`.

    ``inputs`` are three of the student and what else is constant, ``rest`` closes the kernel's arguments.
    Elsewhere than on a CPU products take gradients in half precision, where a share could underflow: there it
    joins the factor of the backward.
    """
    on_cpu = ctx.backend == "cpu"
    wanted = ctx.needs_input_grad[-3:]
    grad_rows = (share if on_cpu else torch.ones_like(share)).expand(inputs[0].shape[0])
    rows, *grads = kernel(grad_rows, *inputs, *rest, *wanted)
    ctx.share = None if on_cpu else share
    ctx.save_for_backward(*inputs[:3], *(x if want else None for x, want in zip(grads, wanted, strict=True)))
    return rows.sum() * share


def saved_grads(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """``grad`` times the saved gradients, in the students' dtype.

    A CPU sees without waiting that the factor is 1, as it is where the loss is what backward starts from; the
    saved gradient itself is then the result, and no second one takes memory.
    """
    students, grads = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    factor = grad if ctx.share is None else grad * ctx.share
    plain = ctx.backend == "cpu" and not torch.compiler.is_compiling() and bool(factor == 1)
    return [
        None if x is None else (x if plain else x * factor).to(student.dtype)
        for x, student in zip(grads, students, strict=True)
    ]


def grads_of_rows(ctx: Any, kernel: Callable[..., Any], grad: Tensor, rest: tuple) -> list[Tensor | None]:
    """The gradients for an upstream gradient (M,) of every row, in the students' dtype."""
    wanted = ctx.needs_input_grad[-3:]
    _, *grads = kernel(grad, *ctx.saved_tensors, *rest, *wanted)
    return [
        x.to(student.dtype) if want else None
        for x, student, want in zip(grads, ctx.saved_tensors[:3], wanted, strict=True)
    ]
