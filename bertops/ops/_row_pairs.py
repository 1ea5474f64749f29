"""What the losses between the rows of a student and of a teacher share: checks, autograd, reduction."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops._library import ROW_PAIR_LOSSES
from bertops.ops import _checks
from bertops.ops._autograd import once_differentiable
from bertops.ops._pairs import REDUCTIONS, check_teacher, needs_grad


def row_pair_loss(
    name: str,
    pair: dict[str, Tensor],
    mask: Tensor | None,
    option: float,
    reduction: str,
    impl: str,
) -> Tensor:
    """The losses of the op ``name`` between ``pair``, student and teacher (..., H) by their arguments' names.

    Returns (losses,), or (losses, ...) for the reduction ``none``; ``option``: the number that the op takes.
    """
    mask = check_pair(pair, mask, reduction)
    like, _ = pair.values()
    x_s, x_t = map(as_batch, pair.values())
    arguments = x_s, x_t, None if mask is None else as_batch(mask[..., None])[..., 0]
    backend = _backend.resolve(name, impl, like.device)
    if backend == "reference":
        rows = getattr(reference, name)(*arguments, option)
        rows = rows if rows.dim() == 3 else rows[None]
    elif needs_grad(like):
        rows = _RowPairLoss.apply(name, backend, *arguments, option)
    else:
        rows = _kernel(name, "fwd", backend)(*arguments, option)[0]
    if reduction == "none":
        return rows.view(rows.shape[0], *like.shape[:-1])
    sums = rows.sum((1, 2))
    return sums / count_rows(x_s, mask) if reduction == "mean" else sums


def check_pair(pair: dict[str, Tensor], mask: Tensor | None, reduction: str) -> Tensor | None:
    """Checks that rows can be compared; returns ``mask`` as a bool tensor."""
    (name_s, x_s), (name_t, x_t) = pair.items()
    for name, x in pair.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_checks.describe(x)}")
        if x.dim() < 1 or x.shape[-1] < 1:
            raise ValueError(f"{name} must have shape (..., H) with H >= 1, got {_checks.describe(x)}")
        _checks.check_dtype(name, x)
    if x_t.shape != x_s.shape:
        raise ValueError(
            f"{name_t} must have the shape {tuple(x_s.shape)} of {name_s}, got {_checks.describe(x_t)}"
        )
    if x_t.device != x_s.device:
        raise ValueError(
            f"{name_t} must be on the device {x_s.device} of {name_s}, got {_checks.describe(x_t)}"
        )
    check_teacher(name_t, x_t)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    return None if mask is None else _checks.check_mask(mask, tuple(x_s.shape[:-1]), x_s.device)


def as_batch(x: Tensor) -> Tensor:
    """(..., H) as (B, N, H)."""
    return x.flatten(0, -3) if x.dim() > 3 else x.view((1,) * (3 - x.dim()) + x.shape)


def count_rows(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """Real rows of ``x`` (B, N, H), at least 1; a tensor where only the device knows."""
    return max(1, x.shape[0] * x.shape[1]) if mask is None else mask.sum().clamp_min(1)


class _RowPairLoss(torch.autograd.Function):
    """Keeps the inputs and a few numbers a row, from which the gradient needs no sum over the row."""

    @staticmethod
    def forward(ctx: Any, name: str, backend: str, x_s: Tensor, x_t: Tensor, mask: Any, option: float) -> Any:
        ctx.name, ctx.backend, ctx.option = name, backend, option
        rows, stats = _kernel(name, "fwd", backend)(x_s, x_t, mask, option)
        ctx.save_for_backward(x_s, x_t, mask, stats)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        *inputs, stats = ctx.saved_tensors
        grad_s = _kernel(ctx.name, "bwd", ctx.backend)(grad, *inputs, ctx.option, stats)
        return None, None, grad_s, None, None, None


def _kernel(name: str, part: str, backend: str) -> Any:
    if backend == "interpreter":
        return getattr(_triton_kernels(name), f"{name}_{part}")
    return getattr(torch.ops.bertops, f"{name}_{part}").default


def _triton_kernels(name: str) -> Any:
    module = "row_pair_losses" if name in ROW_PAIR_LOSSES else name
    return import_module(f"bertops.kernels.{module}")


def register_triton(name: str) -> None:
    """The Triton kernels of the op ``name`` for CUDA, imported at their first call."""
    for part in ("fwd", "bwd"):

        def run(*arguments: Any, kernel: str = f"{name}_{part}") -> Any:
            return getattr(_triton_kernels(name), kernel)(*arguments)

        torch.library.impl(f"bertops::{name}_{part}", "CUDA")(run)
