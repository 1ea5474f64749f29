"""The rows of a batch that go on, moved together."""

from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _checks
from bertops.ops._autograd import once_differentiable

_compact = torch.ops.bertops.compact.default
_compact_packed = torch.ops.bertops.compact_packed.default


def compact(hidden: Tensor, order: Tensor, num_kept: int | Tensor, *, impl: str = "auto") -> Tensor:
    r"""``hidden[order[:num_kept]]``: the samples that :func:`bertops.exit_decision` kept.

    .. math:: \text{out}_i = \text{hidden}_{\text{order}_i}, \quad i < \text{num\_kept}, \qquad
        d\,\text{hidden}_{\text{order}_i} = d\,\text{out}_i, \text{ 0 elsewhere.}

    Args:
        hidden: (B, ...), of any dtype, such as hidden states (B, N, H) or a mask (B, N).
        order: int64 (up to B,), rows of ``hidden``, each at most once.
        num_kept: an integer, which gives (num_kept, ...); or a tensor of one integer on the device of
            ``hidden``, which is not read back: the result has as many rows as ``order``, those from
            ``num_kept`` on are 0 and cost no reading.
        impl: ``auto``, ``cpu``, ``cuda`` or ``reference``; anything but ``auto`` never falls back.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.
    """
    _check_order(hidden, order)
    count = None
    if isinstance(num_kept, Tensor):
        count = num_kept
        if count.numel() != 1 or count.dtype != torch.int64 or count.device != hidden.device:
            raise ValueError(
                f"num_kept must be an integer or one int64 on {hidden.device}, got {_checks.describe(count)}"
            )
    else:
        order = order[: _check_count(num_kept, order)]
    backend = _backend.resolve("compact", impl, hidden.device)
    if backend == "reference":
        return reference.compact(hidden, order, count)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _Compact.apply(hidden, order, count)
    return _compact(hidden, order, count)


def compact_packed(
    hidden: Tensor,
    cu_seqlens: Tensor,
    order: Tensor,
    num_kept: int,
    *,
    num_tokens: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The packed twin of :func:`compact`: sequences ``order[:num_kept]`` end to end, and their offsets.

    Args:
        hidden: (1, T, ...): sequences laid end to end.
        cu_seqlens: int32 (number of sequences + 1), from 0 to T.
        order: int64 (up to number of sequences,): sequences, each at most once.
        num_kept: how many of ``order`` to take.
        num_tokens: how many tokens they have together; read back from the device if None.
        impl: ``auto``, ``cpu``, ``cuda`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        (1, num_tokens, ...) and int32 (num_kept + 1). The gradient of a row goes to the row it came from,
        that of the rows left behind is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.
    """
    _check_order(hidden, order)
    if hidden.dim() < 2:
        raise ValueError(f"hidden must have shape (1, T, ...), got {_checks.describe(hidden)}")
    _checks.check_cu_seqlens(cu_seqlens, hidden, dim=1)
    order = order[: _check_count(num_kept, order)]
    if num_tokens is None:
        num_tokens = int(cu_seqlens.diff()[order].sum())
    arguments = hidden, cu_seqlens, order, num_tokens
    backend = _backend.resolve("compact_packed", impl, hidden.device)
    if backend == "reference":
        return reference.compact_packed(*arguments)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _CompactPacked.apply(*arguments)
    return _compact_packed(*arguments)


def _check_order(hidden: Tensor, order: Tensor) -> None:
    for name, x in (("hidden", hidden), ("order", order)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_checks.describe(x)}")
    if hidden.dim() < 1:
        raise ValueError(f"hidden must have shape (B, ...), got {_checks.describe(hidden)}")
    if order.dtype != torch.int64 or order.dim() != 1 or order.device != hidden.device:
        raise ValueError(
            f"order must be int64 of shape (B,) on {hidden.device}, got {_checks.describe(order)}"
        )


def _check_count(num_kept: int, order: Tensor) -> int:
    if isinstance(num_kept, bool) or not isinstance(num_kept, int | torch.SymInt):
        raise TypeError(f"num_kept must be an integer, got {_checks.describe(num_kept)}")
    if not 0 <= num_kept <= order.shape[0]:
        raise ValueError(f"num_kept must be from 0 to the {order.shape[0]} rows of order, got {num_kept}")
    return num_kept


class _Compact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, num_kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(order, num_kept)
        ctx.shape = hidden.shape
        return _compact(hidden, order, num_kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        order, num_kept = ctx.saved_tensors
        if num_kept is not None:
            in_place = torch.arange(len(order), device=order.device)
            grad = _compact(grad.contiguous(), in_place, num_kept)
        return grad.new_zeros(ctx.shape).index_copy_(0, order, grad), None, None


class _CompactPacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, cu_seqlens: Tensor, order: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        rows, offsets = _compact_packed(hidden, cu_seqlens, order, num_tokens)
        ctx.save_for_backward(cu_seqlens, order, offsets)
        ctx.mark_non_differentiable(offsets)
        ctx.shape = hidden.shape
        return rows, offsets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple:
        cu_seqlens, order, offsets = ctx.saved_tensors
        sequence, position = reference.sequence_positions(grad.shape[1], offsets)
        source = cu_seqlens[order][sequence] + position
        return grad.new_zeros(ctx.shape).index_copy_(1, source, grad), None, None, None
