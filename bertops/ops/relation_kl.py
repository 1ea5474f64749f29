"""KL divergence between a teacher's and a student's self-relations, without either map."""

from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _checks, _pairs
from bertops.ops._autograd import once_differentiable

_relation_kl_fwd = torch.ops.bertops.relation_kl_fwd.default
_relation_kl_bwd = torch.ops.bertops.relation_kl_bwd.default
_relation_kl_with_grads = torch.ops.bertops.relation_kl_with_grads.default


def relation_kl(
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None = None,
    *,
    num_relation_heads: int | None = None,
    cu_seqlens: Tensor | None = None,
    scale_s: float | None = None,
    scale_t: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""KL(teacher ‖ student) between the relations of tokens with each other, in memory linear in N.

    The relation of X is :math:`P = \mathrm{softmax}(\text{scale}\, X X^\top)` over the real tokens; X are the
    values (MiniLM), or queries, keys and values in turn (MiniLMv2). For every real row i

    .. math:: \mathrm{KL}_i = \sum_j P^t_{ij} \left(\ln P^t_{ij} - \ln P^s_{ij}\right)

    in nats, and for the upstream gradient :math:`g_i` of a row, as the scores are symmetric,

    .. math::
        D_{ij} = g_i \left(P^s_{ij} - P^t_{ij}\right), \quad
        dX_s = \text{scale}_s \left(D + D^\top\right) X_s.

    Args:
        x_s: the student's (B, H_s, N, D_s), fp32, bf16 or fp16 (fp64 on CPU); any strides, read in place
            where the last one is 1.
        x_t: the teacher's (B, H_t, N, D_t), of a dtype of its own; a constant.
        mask: (B, N), bool or integer, true for a real token, in any pattern. Other tokens take no part and
            have loss 0 and gradient 0, whatever stands there.
        num_relation_heads: split the width H * D of either model into that many heads of D_r = H * D /
            num_relation_heads, as MiniLMv2 does with 48 or 64; then H_s and H_t may differ. Heads in memory
            order of a (B, N, H * D) projection are split without a copy. By default the heads stay as they
            are, and H_s must equal H_t. Relation heads have dims from 1 to 256.
        cu_seqlens: int32 (number of sequences + 1): the rows of B = 1 are sequences laid end to end.
            Excludes ``mask``.
        scale_s, scale_t: default ``1 / sqrt`` of that model's own relation head dim.
        reduction: ``mean`` over real rows and heads, ``sum``, or ``none`` for (B, H, N), H being the relation
            heads.
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        The loss in fp32 (fp64 for fp64 students): a scalar, or (B, H, N). Without a real row it is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A teacher tensor that requires
            grad does not.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    MiniLMv2's three relations of a packed (B, N, 3 * H * D) projection are one call over three times as many
    heads, ``relation_kl(qkv.unflatten(-1, (3 * A, -1)).transpose(1, 2), ...)``, whose mean is a third of
    their sum; on short sequences that is faster than three calls.

    ``mean`` is MiniLM's :math:`L_{VR}` and one term of MiniLMv2's loss, whose three relations have weight 1
    each. Their training code was never published.

    Source: Wang et al. 2020 (MiniLM), section 3.2, equations 7 to 9; Wang et al. 2021 (MiniLMv2), section
    3.1.
    """
    if num_relation_heads is not None:
        x_s = _split_heads("x_s", x_s, num_relation_heads)
        x_t = _split_heads("x_t", x_t, num_relation_heads)
    names = "x_s", "x_s", "x_t", "x_t"
    pair = _pairs.prepare(x_s, x_s, x_t, x_t, mask, cu_seqlens, scale_s, scale_t, reduction, names)
    arguments = pair[1], *pair[3:]
    backend = _backend.resolve("relation_kl", impl, x_s.device)
    reduced = reduction != "none"
    if backend == "reference":
        loss = reference.relation_kl(*arguments)[0]
        loss = loss.sum() if reduced else loss
    elif _pairs.needs_grad(x_s):
        loss = _RelationKL.apply(backend, reduced, *arguments)
    else:
        loss = _kernel(backend, "relation_kl_fwd")(*arguments)[0]
        loss = loss.sum() if reduced else loss
    return loss / _pairs.count_rows(x_s, pair[4]) if reduction == "mean" else loss


def _split_heads(name: str, x: Tensor, num_relation_heads: int) -> Tensor:
    """(B, H, N, D) to (B, num_relation_heads, N, H * D / num_relation_heads)."""
    _checks.check_four_dims(name, x)
    width = x.shape[1] * x.shape[3]
    if isinstance(num_relation_heads, bool) or not isinstance(num_relation_heads, int):
        raise TypeError(f"num_relation_heads must be an integer, got {num_relation_heads!r}")
    if num_relation_heads < 1 or width % num_relation_heads:
        raise ValueError(
            f"num_relation_heads must divide the width H * D = {width} of {name}, got {num_relation_heads} "
            f"for a {_checks.describe(x)}"
        )
    return x.transpose(1, 2).flatten(2).unflatten(2, (num_relation_heads, -1)).transpose(1, 2)


class _RelationKL(torch.autograd.Function):
    """Sum of the rows' KL where ``reduced``, else the rows; see ``_AttentionKL`` for when gradients form."""

    @staticmethod
    def forward(ctx: Any, backend: str, reduced: bool, *arguments: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.reduced, ctx.grads_ready = backend, reduced, reduced and backend == "cpu"
        x_s, x_t, mask, cu_seqlens, ctx.scale_s, ctx.scale_t = arguments
        if ctx.grads_ready:
            rows, dx_s = _relation_kl_with_grads(*arguments)
            _pairs.save_grads(ctx, (x_s,), (dx_s,))
        else:
            rows, lse_s, lse_t = _kernel(backend, "relation_kl_fwd")(*arguments)
            ctx.save_for_backward(x_s, x_t, mask, cu_seqlens, lse_s, lse_t)
        return rows.sum() if reduced else rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 8
        if ctx.grads_ready:
            (dx_s,) = _pairs.scaled_grads(ctx, grad)
        else:
            *inputs, lse_s, lse_t = ctx.saved_tensors
            grad_rows = grad.expand(lse_s.shape) if ctx.reduced else grad
            kernel = _kernel(ctx.backend, "relation_kl_bwd")
            dx_s = kernel(grad_rows, *inputs, ctx.scale_s, ctx.scale_t, lse_s, lse_t)
        return None, None, dx_s, *(None,) * 5


def _kernel(backend: str, name: str) -> Any:
    if backend == "interpreter":
        return getattr(_triton_kernels(), name)
    return {"relation_kl_fwd": _relation_kl_fwd, "relation_kl_bwd": _relation_kl_bwd}[name]


def _triton_kernels() -> Any:
    import bertops.kernels.relation_kl as kernels

    return kernels


@torch.library.impl("bertops::relation_kl_fwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _triton_kernels().relation_kl_fwd(*arguments)


@torch.library.impl("bertops::relation_kl_bwd", "CUDA")
def _(*arguments: Any) -> Tensor:
    return _triton_kernels().relation_kl_bwd(*arguments)
