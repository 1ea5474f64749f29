"""TinyBERT's attention loss, in time and memory linear in N."""

from typing import Any

import torch
from torch import Tensor

from bertops import _backend, reference
from bertops.ops import _pairs
from bertops.ops._autograd import once_differentiable

FORMS = ("auto", "gram", "direct")
GRAM_FROM = {"cpu": 2.5, "cuda": 1.7}  # N over the mean head dim from which the Gram form is faster
GRADS_ALONG_UP_TO = 1024  # tokens of a sequence: rows of a head that its gradient finds in the second cache

_fwd = torch.ops.bertops.attention_score_mse_fwd.default
_bwd = torch.ops.bertops.attention_score_mse_bwd.default
_with_grads = torch.ops.bertops.attention_score_mse_with_grads.default
_gram_fwd = torch.ops.bertops.attention_score_mse_gram_fwd.default
_gram_bwd = torch.ops.bertops.attention_score_mse_gram_bwd.default
_gram_with_grads = torch.ops.bertops.attention_score_mse_gram_with_grads.default


def attention_score_mse(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    scale_s: float | None = None,
    scale_t: float | None = None,
    reduction: str = "mean",
    form: str = "auto",
    impl: str = "auto",
) -> Tensor:
    r"""Mean squared difference of two models' attention scores before softmax, without either map.

    With :math:`A = \alpha Q_s K_s^\top` and :math:`B = \beta Q_t K_t^\top` over the real query-key pairs,
    :math:`\alpha, \beta` being the scales, the sum is an inner product of d x d Gram matrices:

    .. math::
        \|A - B\|_F^2 = \alpha^2 \langle Q_s^\top Q_s, K_s^\top K_s\rangle
        - 2 \alpha\beta \langle Q_s^\top Q_t, K_s^\top K_t\rangle
        + \beta^2 \langle Q_t^\top Q_t, K_t^\top K_t\rangle

    and so are its gradients, for the upstream gradient g of the sum,

    .. math::
        dQ_s = 2 g \alpha \left(\alpha Q_s (K_s^\top K_s) - \beta Q_t (K_t^\top K_s)\right), \quad
        dK_s = 2 g \alpha \left(\alpha K_s (Q_s^\top Q_s) - \beta K_t (Q_t^\top Q_s)\right).

    The subtraction cancels where A is close to B. Grams and sums are kept so that the error of the sum is at
    most 1e-6 (1e-12 in fp64) of :math:`\|A\|^2 + \|B\|^2`. Where the head dims agree the CPU kernel goes
    through the differences and means of :math:`\alpha Q_s` and :math:`\beta Q_t`, and of :math:`K_s` and
    :math:`K_t`, and a student close to its teacher loses nothing.

    Args:
        q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t, impl: as in :func:`bertops.attention_kl`.
        reduction: ``mean`` over the real pairs and heads, ``sum``, or ``none`` for the (B, H, N) sums over
            the keys of every row, which only the direct form has.
        form: ``gram`` as above; ``direct`` goes through the tiles of A - B, quadratic in N but cheaper for
            short sequences; ``auto`` takes the cheaper one for N (packed: for the mean length).

    Returns:
        The loss in fp32 (fp64 for fp64 students): a scalar, or (B, H, N). Without a real row it is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A teacher tensor that requires
            grad does not.
        RuntimeError: no kernel for this device, or the chosen ``impl`` is not available; says why.

    TinyBERT's official code divides by all B * H * N^2 pairs, padding included, and sums over layers:
    multiply by the share of real pairs. It also takes genuine scores of -100 and less for masked ones and
    zeroes them; here they count.

    Source: Jiao et al. 2020 (TinyBERT), section 3.1, equation 7.
    """
    arguments = _pairs.prepare(q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t, reduction)
    mask = arguments[4]
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if reduction == "none" and form == "gram":
        raise ValueError("form must be 'direct' or 'auto' with reduction='none', got 'gram': it has no rows")
    backend = _backend.resolve("attention_score_mse", impl, q_s.device)
    gram = form == "gram"
    if form == "auto" and reduction != "none" and backend != "reference":
        gram = _gram_is_cheaper(q_s, q_t, cu_seqlens)
    reduced = reduction != "none"
    if backend == "reference":
        loss = reference.attention_score_mse(*arguments)
        loss = loss.sum() if reduced else loss
    elif _pairs.needs_grad(q_s, k_s):
        loss = (
            _ScoreMSEGram.apply(backend, *arguments)
            if gram
            else _ScoreMSE.apply(backend, reduced, *arguments)
        )
    else:
        name = "attention_score_mse_gram_fwd" if gram else "attention_score_mse_fwd"
        loss = _kernel(backend, name)(*arguments)
        loss = loss[0].sum() if gram else loss.sum() if reduced else loss
    return loss / _pairs.count_pairs(q_s, mask, cu_seqlens) if reduction == "mean" else loss


def _gram_is_cheaper(q_s: Tensor, q_t: Tensor, cu_seqlens: Tensor | None) -> bool:
    mean_head_dim = (q_s.shape[3] + q_t.shape[3]) / 2
    return _mean_length(q_s, cu_seqlens) > GRAM_FROM[q_s.device.type] * mean_head_dim


def _mean_length(q_s: Tensor, cu_seqlens: Tensor | None) -> float:
    return q_s.shape[2] if cu_seqlens is None else q_s.shape[2] / max(1, cu_seqlens.shape[0] - 1)


class _ScoreMSE(torch.autograd.Function):
    """Direct form: the sum over all pairs where ``reduced``, else (B, H, N) sums over the keys of every row.

    The CPU kernel forms the gradient of the sum along with it.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, reduced: bool, *arguments: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.reduced, ctx.grads_ready = backend, reduced, reduced and backend == "cpu"
        *tensors, ctx.scale_s, ctx.scale_t = arguments
        if ctx.grads_ready:
            rows, dq_s, dk_s = _with_grads(*arguments)
            _pairs.save_grads(ctx, tuple(tensors[:2]), (dq_s, dk_s))
        else:
            rows = _kernel(backend, "attention_score_mse_fwd")(*arguments)
            ctx.save_for_backward(*tensors)
            ctx.shape = rows.shape
        return rows.sum() if reduced else rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 10
        if ctx.grads_ready:
            grads = _pairs.scaled_grads(ctx, grad)
        else:
            grad_rows = grad.expand(ctx.shape) if ctx.reduced else grad
            kernel = _kernel(ctx.backend, "attention_score_mse_bwd")
            grads = kernel(grad_rows, *ctx.saved_tensors, ctx.scale_s, ctx.scale_t)
        return None, None, *grads, *(None,) * 6


class _ScoreMSEGram(torch.autograd.Function):
    """The sum over all pairs, from Gram matrices.

    The CPU kernel forms the gradient of short sequences along with it; that of longer ones would take more
    memory than the Gram matrices.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        *tensors, ctx.scale_s, ctx.scale_t = arguments
        ctx.backend = backend
        ctx.grads_ready = backend == "cpu" and _mean_length(tensors[0], tensors[5]) <= GRADS_ALONG_UP_TO
        if ctx.grads_ready:
            sums, dq_s, dk_s = _gram_with_grads(*arguments)
            _pairs.save_grads(ctx, tuple(tensors[:2]), (dq_s, dk_s))
        else:
            sums, grams = _kernel(backend, "attention_score_mse_gram_fwd")(*arguments)
            ctx.save_for_backward(*tensors, grams)
        return sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return (None,) * 9
        if ctx.grads_ready:
            return None, *_pairs.scaled_grads(ctx, grad, first=1), *(None,) * 6
        *tensors, grams = ctx.saved_tensors
        kernel = _kernel(ctx.backend, "attention_score_mse_gram_bwd")
        return None, *kernel(grad, *tensors, ctx.scale_s, ctx.scale_t, grams), *(None,) * 6


def _kernel(backend: str, name: str) -> Any:
    if backend == "interpreter":
        return getattr(_triton_kernels(), name)
    return {
        "attention_score_mse_fwd": _fwd,
        "attention_score_mse_bwd": _bwd,
        "attention_score_mse_gram_fwd": _gram_fwd,
        "attention_score_mse_gram_bwd": _gram_bwd,
    }[name]


def _triton_kernels() -> Any:
    import bertops.kernels.attention_score_mse as kernels

    return kernels


@torch.library.impl("bertops::attention_score_mse_fwd", "CUDA")
def _(*arguments: Any) -> Tensor:
    return _triton_kernels().attention_score_mse_fwd(*arguments)


@torch.library.impl("bertops::attention_score_mse_bwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _triton_kernels().attention_score_mse_bwd(*arguments)


@torch.library.impl("bertops::attention_score_mse_gram_fwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _triton_kernels().attention_score_mse_gram_fwd(*arguments)


@torch.library.impl("bertops::attention_score_mse_gram_bwd", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _triton_kernels().attention_score_mse_gram_bwd(*arguments)
