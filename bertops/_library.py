"""Every operator schema of the package, with the fake that gives its output shapes and strides.

``bertops._C`` registers the CPU kernels (csrc/cpu), ``bertops/ops/<op>.py`` the CUDA ones. Autograd lives
outside the dispatcher, in the ``autograd.Function`` of ``bertops/ops/<op>.py``.
"""

import torch

LIBRARY = torch.library.Library("bertops", "FRAGMENT")


def _define(schema: str) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def rows_first(like: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) over (B, N, H, D) memory: merging the heads of the result needs no copy."""
    batch, heads, length, head_dim = like.shape
    return like.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: the dtype of losses, lse and entropies."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_ATTENTION = "Tensor? mask, Tensor? cu_seqlens, SymInt window, float scale, float dropout_p, Tensor? seed"

_define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_ATTENTION}) -> (Tensor, Tensor)")
_define(
    f"attention_with_scores_fwd(Tensor q, Tensor k, Tensor v, {_ATTENTION}, ScalarType scores_dtype)"
    " -> (Tensor, Tensor, Tensor)"
)
_define(
    "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor? grad_scores, Tensor q, Tensor k, Tensor v,"
    f" Tensor out, Tensor lse, {_ATTENTION}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("bertops::attention_fwd")
def _(q, k, v, mask, cu_seqlens, window, scale, dropout_p, seed):
    return rows_first(q), q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))


@torch.library.register_fake("bertops::attention_with_scores_fwd")
def _(q, k, v, mask, cu_seqlens, window, scale, dropout_p, seed, scores_dtype):
    batch, heads, length, _ = q.shape
    lse = q.new_empty((batch, heads, length), dtype=accumulator_dtype(q.dtype))
    return rows_first(q), lse, q.new_empty((batch, heads, length, length), dtype=scores_dtype)


@torch.library.register_fake("bertops::attention_bwd")
def _(
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
    window,
    scale,
    dropout_p,
    seed,
):
    return rows_first(q), rows_first(k), rows_first(v)


# What the machine can do at most, for the bench: work on every thread of the device of ``like`` and count it.
_define("_limits_fma(Tensor like, int steps) -> (Tensor, int)")
_define("_limits_exp(Tensor like, int steps) -> (Tensor, int)")
_define("_limits_launch(Tensor like) -> ()")
