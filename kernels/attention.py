"""Attention in Triton: the forward kernel, with or without the score map, and its launchers.

The backward is in attention_bwd.py, what the kernels share in tiles.py, block sizes and the environment
variable BERTOPS_AUTOTUNE in launch.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertops._library import rows_first
from bertops.kernels.attention_bwd import attention_bwd
from bertops.kernels.launch import in_place, launch, prepare_rows, tunable
from bertops.kernels.tiles import (
    dropout_keep,
    exp_scaled,
    find_block,
    first_packed_row,
    first_row,
    load_real,
    load_rows,
    store_rows,
    visible_range,
)

__all__ = ["attention_bwd", "attention_fwd", "attention_with_scores_fwd"]


@triton.jit
def _visit_keys(
    acc,  # (BLOCK_M, BLOCK_D) fp32: sum of exp(scale * (s - top)) * keep * v, with s = q k
    top,  # (BLOCK_M,) fp32: largest s so far
    total,  # (BLOCK_M,) fp32: sum of exp(scale * (s - top))
    q,  # (BLOCK_M, BLOCK_D), negated where scale is negative
    k,  # at the sequence's first row
    k_stride,
    v,  # at the sequence's first row
    v_stride,
    scores,  # at the block's first query and key 0, or None
    scores_stride,
    mask,
    seed,
    begin,
    stop,
    end,
    length,
    first,
    real,  # (BLOCK_M,) bool
    sequence,
    head,
    scale,  # not negative
    window,
    threshold,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
):
    EXACT: tl.constexpr = q.dtype == tl.float32
    queries = first + tl.arange(0, BLOCK_M)
    tile_offsets = tl.arange(0, BLOCK_M)[:, None] * scores_stride + tl.arange(0, BLOCK_N)[None, :]
    slope = tl.maximum(scale, 1e-30)  # 0 would make NaN of a masked key's -inf
    # counted from a constant: Triton 3.9 does not pipeline a loop that starts where another one ended
    for key in range(0, stop - begin, BLOCK_N):
        key = tl.multiple_of(begin + key, BLOCK_N)
        keys = key + tl.arange(0, BLOCK_N)
        step = tl.cast(key, tl.int64)
        real_keys = keys < end
        if CHECK:
            real_keys = load_real(mask, keys, length)
        k_rows = load_rows(k + step * k_stride, k_stride, real_keys, HEAD_DIM, BLOCK_D, BLOCK_N, CHECK)
        s = tl.dot(q, tl.trans(k_rows), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if CHECK:
            pairs = real[:, None] & real_keys[None, :]
            if HAS_WINDOW:
                pairs = pairs & (tl.abs(queries[:, None] - keys[None, :]) <= window)
            if scores is not None:
                tile = tl.where(pairs, s * scale, 0.0).to(scores.dtype.element_ty)
                stored = (queries < length)[:, None] & (keys < end)[None, :]
                tl.store(scores + step + tile_offsets, tile, mask=stored)
            s = tl.where(pairs, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top) * slope
        else:
            if scores is not None:
                tile = tl.where(real[:, None], s * scale, 0.0).to(scores.dtype.element_ty)
                tl.store(scores + step + tile_offsets, tile, mask=(queries < length)[:, None])
            new_top = tl.maximum(top, tl.max(s, 1))
            shift = new_top * slope
        p = exp_scaled(s, slope, shift[:, None], EXACT)
        shrink = exp_scaled(top, slope, shift, EXACT)
        total = total * shrink + tl.sum(p, 1)
        if HAS_DROPOUT:
            keep = dropout_keep(seed, sequence, head, first, key, threshold, BLOCK_M, BLOCK_N, False)
            p = tl.where(keep, p, 0.0)
        v_rows = load_rows(v + step * v_stride, v_stride, real_keys, HEAD_DIM, BLOCK_D, BLOCK_N, CHECK)
        acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _zero_scores(
    scores,  # at the block's first row and column 0
    scores_stride,
    inside,  # (BLOCK_M,) bool
    begin,
    end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    zeros = tl.zeros([BLOCK_M, BLOCK_N], scores.dtype.element_ty)
    rows = tl.arange(0, BLOCK_M)[:, None] * scores_stride
    for column in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
        column = tl.multiple_of(column, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_N)
        inner = (columns >= begin) & (columns < end)
        tl.store(scores + rows + columns[None, :], zeros, mask=inside[:, None] & inner[None, :])


def attention_fwd_kernel(
    q,  # (B, H, N, D)
    k,  # (B, H, N, D)
    v,  # (B, H, N, D)
    out,  # (B, H, N, D) over (B, N, H, D) memory
    lse,  # (B, H, N) fp32
    scores,  # (B, H, N, N) or None
    q_strides,  # of B, H, N
    k_strides,
    v_strides,
    scores_stride,  # of a row
    mask,  # (B, N) bool or None
    cu_seqlens,  # (num_sequences + 1,) int32 or None
    seed,  # (1,) int64 or None
    N,
    H,
    num_sequences,
    scale,
    window,
    threshold,  # least word that keeps a probability, as int32 bits
    kept_scale,  # 1 / (1 - dropout_p)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    # S = scale * Q K^T,  P = exp(S - lse),  O = (P o Z) V,  lse = log(sum_j exp(S_ij)).
    # One block of query rows streams over the keys with the running maximum `top` of Q K^T and the sum
    # `total`; sum and accumulator shrink when the maximum grows. As the maximum is taken before scaling, a
    # negative scale moves into q, where negation is exact.
    batch, head, sequence, origin, length, first = find_block(cu_seqlens, N, H, num_sequences, BLOCK_M)
    if mask is not None:
        mask += tl.cast(batch, tl.int64) * N
    queries = first + tl.arange(0, BLOCK_M)
    inside = queries < length
    real = load_real(mask, queries, length)
    begin, dense, end = visible_range(mask, length, first, real, window, BLOCK_M, BLOCK_N, HAS_WINDOW)

    scale = tl.cast(scale, tl.float32)
    row = origin + first
    q_rows = load_rows(
        first_row(q, q_strides, batch, head, row), q_strides[2], real, HEAD_DIM, BLOCK_D, BLOCK_M, True
    )
    q_rows = tl.where(scale < 0, -q_rows, q_rows)
    lse_row = (tl.cast(batch, tl.int64) * H + head) * N + row
    if scores is not None:
        scores += lse_row * scores_stride
        _zero_scores(scores, scores_stride, inside, 0, origin + begin, BLOCK_M, BLOCK_N)
        _zero_scores(scores, scores_stride, inside, origin + end, N, BLOCK_M, BLOCK_N)
        scores += origin
    word_seed = 0
    if HAS_DROPOUT:
        word_seed = tl.load(seed)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for CHECK in tl.static_range(2):
        if CHECK or not HAS_WINDOW:
            acc, top, total = _visit_keys(
                acc,
                top,
                total,
                q_rows,
                first_row(k, k_strides, batch, head, origin),
                k_strides[2],
                first_row(v, v_strides, batch, head, origin),
                v_strides[2],
                scores,
                scores_stride,
                mask,
                word_seed,
                dense if CHECK else begin,
                end if CHECK else dense,
                end,
                length,
                first,
                real,
                sequence,
                head,
                tl.abs(scale),
                window,
                threshold,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_M,
                BLOCK_N,
                HAS_WINDOW,
                HAS_DROPOUT,
                CHECK,
            )

    total = tl.where(real, total, 1.0)
    acc = acc / total[:, None]
    if HAS_DROPOUT:
        acc = acc * tl.cast(kept_scale, tl.float32)
    acc = tl.where(real[:, None], acc, 0.0)
    out = first_packed_row(out, N, H, batch, head, row, HEAD_DIM)
    store_rows(out, H * HEAD_DIM, acc, inside, HEAD_DIM, BLOCK_D, BLOCK_M)
    row_lse = tl.where(real, top * tl.abs(scale) + tl.log(total), float("-inf"))
    tl.store(lse + lse_row + tl.arange(0, BLOCK_M), row_lse, mask=inside)


_kernel = tunable(attention_fwd_kernel)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns out (B, H, N, D) and lse (B, H, N); see :func:`bertops.attention`."""
    return _forward(q, k, v, None, mask, cu_seqlens, window, scale, dropout_p, seed)


def attention_with_scores_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    scores_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (B, H, N, D), lse (B, H, N) and scores (B, H, N, N); see the public op."""
    batch, heads, length, _ = q.shape
    scores = q.new_empty((batch, heads, length, length), dtype=scores_dtype)
    return *_forward(q, k, v, scores, mask, cu_seqlens, window, scale, dropout_p, seed), scores


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    out, lse = rows_first(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() > 0:
        q, k, v = in_place(q), in_place(k), in_place(v)
        name = "attention_fwd" if scores is None else "attention_with_scores_fwd"
        strides = q.stride()[:3], k.stride()[:3], v.stride()[:3], q.shape[2]
        rows, flags = prepare_rows(q, mask, *options)
        launch(_kernel, name, "BLOCK_M", q, (q, k, v, out, lse, scores, *strides), rows, flags)
    return out, lse
