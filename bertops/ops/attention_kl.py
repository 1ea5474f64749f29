"""KL divergence between a teacher's and a student's attention, without either map."""

from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _pairs
from bertops.ops._autograd import once_differentiable

_attention_kl_fwd = torch.ops.bertops.attention_kl_fwd.default
_attention_kl_bwd = torch.ops.bertops.attention_kl_bwd.default
_attention_kl_with_grads = torch.ops.bertops.attention_kl_with_grads.default


def attention_kl(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None = None,
    *,
    lse_s: Tensor | None = None,
    lse_t: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_s: float | None = None,
    scale_t: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""KL(teacher ‖ student) between the attention distributions of two models, in memory linear in N.

    With :math:`S = \text{scale}_s\, Q_s K_s^\top`, :math:`T = \text{scale}_t\, Q_t K_t^\top` and
    :math:`P = \mathrm{softmax}` over the real keys, for every real row i

    .. math:: \mathrm{KL}_i = \sum_j P^t_{ij} \left(\ln P^t_{ij} - \ln P^s_{ij}\right)

    in nats, and for the upstream gradient :math:`g_i` of a row

    .. math::
        dS_{ij} = g_i \left(P^s_{ij} - P^t_{ij}\right), \quad
        dQ_s = \text{scale}_s\, dS\, K_s, \quad dK_s = \text{scale}_s\, dS^\top Q_s.

    Args:
        q_s, k_s: the student's (B, H, N, D_s), fp32, bf16 or fp16 (fp64 on CPU), D_s from 1 to 256; any
            strides, read in place where the last one is 1.
        q_t, k_t: the teacher's (B, H, N, D_t), of a dtype and head dim of its own; constants.
        mask: (B, N), bool or integer, true for a real token, in any pattern. Other keys take no part; other
            query rows have loss 0 and gradient 0, whatever stands there.
        lse_s, lse_t: (B, H, N) of these scores, as ``attention(..., return_lse=True)`` gives them with the
            same mask and scale: the kernel then need not find them. Both or neither. Taken as constants: the
            gradient above is the whole of it.
        cu_seqlens: int32 (number of sequences + 1): the rows of B = 1 are sequences laid end to end.
            Excludes ``mask``.
        scale_s, scale_t: default ``1 / sqrt`` of that model's own head dim.
        reduction: ``mean`` over real rows and heads, ``sum``, or ``none`` for (B, H, N).
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        The loss in fp32 (fp64 for fp64 students): a scalar, or (B, H, N). Without a real row it is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A teacher tensor that requires
            grad does not.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    ``mean`` is MiniLM's :math:`L_{AT}` over the real tokens. MobileBERT's attention transfer in its official
    code is the cross-entropy over all B * H * N rows: the same gradient times the share of real rows, and a
    value larger by the teacher's entropy.

    Source: Wang et al. 2020 (MiniLM), section 3.1, equation 6; Sun et al. 2020 (MobileBERT), section 3.4.
    """
    arguments = _pairs.prepare(q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t, reduction)
    if (lse_s is None) != (lse_t is None):
        missing = "lse_s" if lse_s is None else "lse_t"
        raise ValueError(f"lse_s and lse_t must both be given or both be left out, got no {missing}")
    if lse_s is not None and lse_t is not None:
        lse_s, lse_t = _pairs.check_lse("lse_s", lse_s, q_s), _pairs.check_lse("lse_t", lse_t, q_s)
    backend = _backend.resolve("attention_kl", impl, q_s.device)
    reduced = reduction != "none"
    if backend == "reference":
        loss = reference.attention_kl(*arguments)[0]
        loss = loss.sum() if reduced else loss
    elif _pairs.needs_grad(q_s, k_s):
        loss = _AttentionKL.apply(backend, reduced, *arguments, lse_s, lse_t)
    else:
        loss = _kernel(backend, "attention_kl_fwd")(*arguments, lse_s, lse_t)[0]
        loss = loss.sum() if reduced else loss
    return loss / _pairs.count_rows(q_s, arguments[4]) if reduction == "mean" else loss


class _AttentionKL(torch.autograd.Function):
    """Sum of the rows' KL where ``reduced``, else the rows.

    The CPU kernel forms the gradient of the sum while the tiles of the forward are in the cache; the GPU
    kernels compute the tiles again, from the two lse.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, reduced: bool, *arguments: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.reduced, ctx.grads_ready = backend, reduced, reduced and backend == "cpu"
        q_s, k_s, q_t, k_t, mask, cu_seqlens, ctx.scale_s, ctx.scale_t, _, _ = arguments
        if ctx.grads_ready:
            rows, dq_s, dk_s = _attention_kl_with_grads(*arguments)
            _pairs.save_grads(ctx, (q_s, k_s), (dq_s, dk_s))
        else:
            rows, lse_s, lse_t = _kernel(backend, "attention_kl_fwd")(*arguments)
            ctx.save_for_backward(q_s, k_s, q_t, k_t, mask, cu_seqlens, lse_s, lse_t)
        return rows.sum() if reduced else rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 12
        if ctx.grads_ready:
            grads = _pairs.scaled_grads(ctx, grad)
        else:
            *inputs, lse_s, lse_t = ctx.saved_tensors
            grad_rows = grad.expand(lse_s.shape) if ctx.reduced else grad
            kernel = _kernel(ctx.backend, "attention_kl_bwd")
            grads = kernel(grad_rows, *inputs, ctx.scale_s, ctx.scale_t, lse_s, lse_t)
        return None, None, *grads, *(None,) * 8


def _kernel(backend: str, name: str) -> Any:
    if backend == "interpreter":
        return getattr(_triton_kernels(), name)
    return {"attention_kl_fwd": _attention_kl_fwd, "attention_kl_bwd": _attention_kl_bwd}[name]


def _triton_kernels() -> Any:
    import bertops.kernels.attention_kl as kernels

    return kernels


@torch.library.impl("bertops::attention_kl_fwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _triton_kernels().attention_kl_fwd(*arguments)


@torch.library.impl("bertops::attention_kl_bwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _triton_kernels().attention_kl_bwd(*arguments)
