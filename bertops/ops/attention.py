"""Bidirectional attention without the (N, N) map."""

import math
from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _checks
from bertops.ops._autograd import once_differentiable

AUTOCAST_DEVICES = ("cpu", "cuda")

# q, k, v, mask, cu_seqlens, window (-1: none), scale, dropout_p, seed: what every implementation takes.
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int, float, float, Tensor | None]

_attention_fwd = torch.ops.bertops.attention_fwd.default
_attention_bwd = torch.ops.bertops.attention_bwd.default


def attention(
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
    impl: str = "auto",
) -> Any:  # Tensor, or (Tensor, Tensor) with return_lse
    r"""Softmax attention between all real tokens of a sequence, in memory linear in N.

    With :math:`S = \text{scale} \cdot QK^\top`, :math:`P = \mathrm{softmax}(S)` over the real keys and the
    dropout factor :math:`Z_{ij} \in \{0, 1/(1-p)\}`:

    .. math:: O = (P \circ Z) V, \qquad \mathrm{lse}_i = \ln \sum_j e^{S_{ij}}

    and, for upstream gradients :math:`dO` and :math:`d\mathrm{lse}`,

    .. math::
        dV = (P \circ Z)^\top dO, \quad
        dS = P \circ \left(Z \circ dO V^\top - \mathrm{rowsum}(dO \circ O) + d\mathrm{lse}\right), \quad
        dQ = \text{scale} \cdot dS\, K, \quad dK = \text{scale} \cdot dS^\top Q.

    Args:
        q, k, v: (B, H, N, D), fp32, bf16 or fp16 (fp64 on CPU), D from 1 to 256; any strides, read in place
            where the last one is 1.
        mask: (B, N), bool or integer, true for a real token, in any pattern. Other keys take no part; other
            query rows get output 0, lse -inf and gradient 0, whatever stands there.
        cu_seqlens: int32 (number of sequences + 1): the rows of B = 1 are sequences laid end to end, and no
            attention crosses between them. Excludes ``mask``.
        window: keys with ``|i - j| > window`` take no part (the local layers of ModernBERT).
        scale: default ``1 / sqrt(D)``.
        dropout_p: probability in [0, 1) of dropping an entry of P. What drops is a function of a seed drawn
            from PyTorch's generator and of (sequence, head, i, j) alone: padded and packed rows drop alike.
        return_lse: also return lse (B, H, N) in fp32 (fp64 for fp64).
        impl: ``auto``, ``triton``, ``cpu`` or ``reference``; anything but ``auto`` never falls back.

    Returns:
        out (B, H, N, D) in the dtype of q, laid out as (B, N, H, D) so that merging heads copies nothing;
        with ``return_lse`` the pair (out, lse). Under autocast the inputs are cast to the autocast dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    Source: Vaswani et al. 2017, section 3.2.1; streaming softmax after Dao et al. 2022 (FlashAttention).
    """
    arguments = prepare(q, k, v, mask, cu_seqlens, window, scale, dropout_p)
    backend = _backend.resolve("attention", impl, q.device)
    if backend == "reference":
        out, lse = reference.attention(*arguments)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _Attention.apply(backend, *arguments)
    else:
        out, lse = _forward_kernel(backend)(*arguments)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
        out, lse = _forward_kernel(backend)(q, k, v, *options)
        save_for_backward(ctx, backend, q, k, v, out, lse, options)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
        return None, *backward(ctx, grad_out, grad_lse, None), *(None,) * 6


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float | None,
    dropout_p: float,
) -> Arguments:
    """Checks the arguments of both attention ops and brings them to the form that the kernels take."""
    _checks.check_qkv(q, k, v)
    if mask is not None or cu_seqlens is not None:
        mask = _checks.check_rows(mask, cu_seqlens, q)
    window = -1 if window is None else _checks.check_window(window)
    if dropout_p != 0:
        _checks.check_dropout(dropout_p)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    device = q.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    return q, k, v, mask, cu_seqlens, window, scale, dropout_p, seed


def _forward_kernel(backend: str) -> Any:
    return triton_kernels().attention_fwd if backend == "interpreter" else _attention_fwd


def save_for_backward(
    ctx: Any, backend: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: tuple
) -> None:
    """``options`` is what follows q, k, v in the forward schema, up to the seed."""
    mask, cu_seqlens, window, scale, dropout_p, seed = options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, mask, cu_seqlens, seed)
    ctx.backend, ctx.window, ctx.scale, ctx.dropout_p = backend, window, scale, dropout_p


def backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_scores: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v for whichever of the outputs took part."""
    if grad_out is None and grad_lse is None and grad_scores is None:
        return None, None, None
    q, k, v, out, lse, mask, cu_seqlens, seed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    kernel = triton_kernels().attention_bwd if ctx.backend == "interpreter" else _attention_bwd
    return kernel(
        grad_out,
        grad_lse,
        grad_scores,
        q,
        k,
        v,
        out,
        lse,
        mask,
        cu_seqlens,
        ctx.window,
        ctx.scale,
        ctx.dropout_p,
        seed,
    )


def triton_kernels() -> Any:
    import bertops.kernels.attention as kernels

    return kernels


@torch.library.impl("bertops::attention_fwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return triton_kernels().attention_fwd(*arguments)


@torch.library.impl("bertops::attention_bwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return triton_kernels().attention_bwd(*arguments)
