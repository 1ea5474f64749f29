"""Attention that also returns its pre-softmax score map, for distillation."""

from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _checks
from bertops.ops import attention as _attention
from bertops.ops._autograd import once_differentiable

_attention_with_scores_fwd = torch.ops.bertops.attention_with_scores_fwd.default


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    scores_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    r"""Attention and the score map :math:`S = \text{scale} \cdot QK^\top` it went through, in one pass.

    S is the map before softmax and dropout, 0 wherever the key or the query row is masked, outside the window
    or of another sequence: ``mse_loss(scores_s, scores_t)`` over two such maps is TinyBERT's attention loss.
    Gradients of both outputs flow in one backward:

    .. math::
        dS = dS^{\text{given}} + P \circ \left(Z \circ dO V^\top - \mathrm{rowsum}(dO \circ O)\right), \quad
        dQ = \text{scale} \cdot dS\, K, \quad dK = \text{scale} \cdot dS^\top Q.

    Args:
        q, k, v, mask, cu_seqlens, window, scale, dropout_p, return_lse, impl: as in
            :func:`bertops.attention`.
        scores_dtype: dtype of the map, default that of q. fp32 costs twice the bytes of bf16, unrounded.

    Returns:
        (out, scores), or (out, scores, lse) with ``return_lse``. ``scores`` is (B, H, N, N); with
        ``cu_seqlens`` it is (1, H, N, N) over all packed rows, 0 off the diagonal blocks.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`bertops.attention`.

    Source: Jiao et al. 2020 (TinyBERT), section 3.1, equation 7: unnormalized attention matrices.
    """
    arguments = _attention.prepare(q, k, v, mask, cu_seqlens, window, scale, dropout_p)
    if scores_dtype is None:
        scores_dtype = arguments[0].dtype
    elif scores_dtype not in _checks.DTYPES:
        raise TypeError(f"scores_dtype must be one of {_checks.DTYPES}, got {scores_dtype!r}")
    backend = _backend.resolve("attention_with_scores", impl, q.device)
    if backend == "reference":
        out, lse, scores = reference.attention_with_scores(*arguments, scores_dtype=scores_dtype)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse, scores = _AttentionWithScores.apply(backend, scores_dtype, *arguments)
    else:
        out, lse, scores = _forward_kernel(backend)(*arguments, scores_dtype)
    return (out, scores, lse) if return_lse else (out, scores)


class _AttentionWithScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, scores_dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, *options: Any
    ) -> Any:
        out, lse, scores = _forward_kernel(backend)(q, k, v, *options, scores_dtype)
        _attention.save_for_backward(ctx, backend, q, k, v, out, lse, options)
        return out, lse, scores

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_scores: Tensor | None
    ) -> tuple:
        return None, None, *_attention.backward(ctx, grad_out, grad_lse, grad_scores), *(None,) * 6


def _forward_kernel(backend: str) -> Any:
    if backend == "interpreter":
        return _attention.triton_kernels().attention_with_scores_fwd
    return _attention_with_scores_fwd


@torch.library.impl("bertops::attention_with_scores_fwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _attention.triton_kernels().attention_with_scores_fwd(*arguments)
