"""What the losses between two models' attention share: checks, and the mean over real rows."""

import math
from typing import Any

import torch
from torch import Tensor

from bertops._library import accumulator_dtype
from bertops.ops import _checks

REDUCTIONS = ("mean", "sum", "none")

_scale_grad = torch.ops.bertops._scale_grad.default

# q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t: what every implementation takes.
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, float]


def prepare(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: float | None,
    scale_t: float | None,
    reduction: str,
    names: tuple[str, str, str, str] = ("q_s", "k_s", "q_t", "k_t"),
) -> Arguments:
    """Checks the arguments and brings them to the form that the kernels take."""
    _checks.check_heads(names[0], q_s)
    _checks.check_like(names[1], k_s, names[0], q_s)
    _checks.check_heads(names[2], q_t)
    _checks.check_like(names[3], k_t, names[2], q_t)
    if q_t.shape[:3] != q_s.shape[:3]:
        raise ValueError(
            f"{names[2]} must have the (B, H, N) = {tuple(q_s.shape[:3])} of {names[0]}, "
            f"got {_checks.describe(q_t)}"
        )
    if q_t.device != q_s.device:
        raise ValueError(
            f"{names[2]} must be on the device {q_s.device} of {names[0]}, got {_checks.describe(q_t)}"
        )
    for name, x in ((names[2], q_t), (names[3], k_t)):
        check_teacher(name, x)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if mask is not None or cu_seqlens is not None:
        mask = _checks.check_rows(mask, cu_seqlens, q_s)
    scale_s = 1 / math.sqrt(q_s.shape[3]) if scale_s is None else float(scale_s)
    scale_t = 1 / math.sqrt(q_t.shape[3]) if scale_t is None else float(scale_t)
    return q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t


def check_teacher(name: str, x: Tensor) -> None:
    """A teacher is a constant: a gradient that the caller expects would be missing."""
    if x.requires_grad:
        raise ValueError(
            f"{name} belongs to the teacher and gets no gradient, but requires one: run the teacher under "
            f"torch.no_grad() or pass {name}.detach()"
        )


def check_lse(name: str, lse: Tensor, x: Tensor) -> Tensor:
    """``lse`` (B, H, N), as a constant in the dtype of the losses of the student ``x``."""
    if not isinstance(lse, Tensor) or lse.shape != x.shape[:3] or not lse.dtype.is_floating_point:
        raise ValueError(
            f"{name} must be the lse (B, H, N) = {tuple(x.shape[:3])} that bertops.attention returns, "
            f"got {_checks.describe(lse)}"
        )
    if lse.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, got {_checks.describe(lse)}")
    return lse.detach().to(accumulator_dtype(x.dtype))


def count_rows(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """Real rows of all heads of ``x`` (B, H, N, D), at least 1; a tensor where only the device knows."""
    batch, heads, length, _ = x.shape
    if mask is None:
        return max(1, batch * heads * length)
    return (mask.sum() * heads).clamp_min(1)


def count_pairs(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | int:
    """Real query-key pairs of all heads of ``x`` (B, H, N, D), at least 1."""
    batch, heads, length, _ = x.shape
    if mask is not None:
        return (mask.sum(1).square().sum() * heads).clamp_min(1)
    if cu_seqlens is not None:
        return (cu_seqlens.long().diff().square().sum() * heads).clamp_min(1)
    return max(1, batch * heads * length * length)


def needs_grad(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def save_grads(ctx: Any, students: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
    """Keeps the gradients of the sum, and the inputs that they depend on: differentiating them is refused."""
    ctx.save_for_backward(*students, *grads)


def scaled_grads(ctx: Any, grad: Tensor, first: int = 2) -> tuple[Tensor | None, ...]:
    """``grad`` times the gradients of the sum, in the students' dtype; ``first``: of them in the inputs."""
    saved = ctx.saved_tensors
    students, grads = saved[: len(saved) // 2], saved[len(saved) // 2 :]
    needed = ctx.needs_input_grad[first : first + len(grads)]
    return tuple(
        _scale_grad(x, grad, student.dtype) if wanted else None
        for x, student, wanted in zip(grads, students, needed, strict=True)
    )
