"""Backward of attention in Triton: one kernel for dQ, then one for dK and dV; nothing is added atomically."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertops._library import rows_first
from bertops.kernels.launch import in_place, launch, near_strides, prepare_rows, tunable
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


@triton.jit
def first_pair(
    x,  # (B, H, N, N)
    strides,  # of B, H, N, N
    batch,
    head,
    query,
    key,
):
    """Pointer to a pair; products of strides are 64 bits wide here, and those inside a tile fit into 32."""
    return first_row(x, strides, batch, head, query) + tl.cast(key, tl.int64) * strides[3]


@triton.jit
def _visit_keys(
    dq,  # (BLOCK_M, BLOCK_D) fp32
    q,  # (BLOCK_M, BLOCK_D)
    grad_out,  # (BLOCK_M, BLOCK_D)
    lse,  # (BLOCK_M,), +inf for rows that are not real
    delta,  # (BLOCK_M,)
    grad_lse,  # (BLOCK_M,) or None
    k,  # at the sequence's first row
    k_stride,
    v,  # at the sequence's first row
    v_stride,
    grad_scores,  # at the block's first query and key 0, or None
    grad_scores_strides,
    mask,
    seed,
    begin,
    stop,
    length,
    first,
    real,  # (BLOCK_M,) bool
    sequence,
    head,
    scale,
    window,
    threshold,
    kept_scale,
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
    if grad_scores is not None:
        rows = tl.arange(0, BLOCK_M)[:, None] * grad_scores_strides[2]
        tile_offsets = rows + tl.arange(0, BLOCK_N)[None, :] * grad_scores_strides[3]
    for key in range(0, stop - begin, BLOCK_N):
        key = tl.multiple_of(begin + key, BLOCK_N)
        keys = key + tl.arange(0, BLOCK_N)
        step = tl.cast(key, tl.int64)
        pairs = real[:, None]
        real_keys = keys < length
        if CHECK:
            real_keys = load_real(mask, keys, length)
            pairs = pairs & real_keys[None, :]
            if HAS_WINDOW:
                pairs = pairs & (tl.abs(queries[:, None] - keys[None, :]) <= window)
        k_rows = load_rows(k + step * k_stride, k_stride, real_keys, HEAD_DIM, BLOCK_D, BLOCK_N, CHECK)
        v_rows = load_rows(v + step * v_stride, v_stride, real_keys, HEAD_DIM, BLOCK_D, BLOCK_N, CHECK)
        s = tl.dot(q, tl.trans(k_rows), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        p = exp_scaled(s, scale, lse[:, None], EXACT)
        if CHECK:
            p = tl.where(pairs, p, 0.0)
        dp = tl.dot(grad_out, tl.trans(v_rows), input_precision="ieee")
        if HAS_DROPOUT:
            keep = dropout_keep(seed, sequence, head, first, key, threshold, BLOCK_M, BLOCK_N, False)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        slope = dp - delta[:, None]
        if grad_lse is not None:
            slope += grad_lse[:, None]
        ds = p * slope
        if grad_scores is not None:
            tile = grad_scores + step * grad_scores_strides[3] + tile_offsets
            ds += tl.load(tile, mask=pairs, other=0.0).to(tl.float32)
        dq = tl.dot(ds.to(k_rows.dtype), k_rows, dq, input_precision="ieee")
    return dq


def attention_bwd_dq_kernel(
    q,  # (B, H, N, D)
    k,  # (B, H, N, D)
    v,  # (B, H, N, D)
    out,  # (B, H, N, D) over (B, N, H, D) memory
    grad_out,  # (B, H, N, D)
    lse,  # (B, H, N) fp32
    grad_lse,  # (B, H, N) fp32 or None
    grad_scores,  # (B, H, N, N) or None
    delta,  # (B, H, N) fp32, written here for the kernel of dK and dV
    dq,  # (B, H, N, D) over (B, N, H, D) memory
    q_strides,  # of B, H, N
    k_strides,
    v_strides,
    grad_out_strides,
    grad_scores_strides,  # of B, H, N, N
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
    # P = exp(S - lse),  dP = Z o (dO V^T),  delta = rowsum(dO o O) = rowsum(P o dP)
    # dS = P o (dP - delta + dlse) + dS_given,  dQ = scale * dS K
    # dlse is not folded into delta: where dP - delta cancels, it would be rounded to delta's size.
    batch, head, sequence, origin, length, first = find_block(cu_seqlens, N, H, num_sequences, BLOCK_M)
    if mask is not None:
        mask += tl.cast(batch, tl.int64) * N
    queries = first + tl.arange(0, BLOCK_M)
    inside = queries < length
    real = load_real(mask, queries, length)
    begin, dense, end = visible_range(mask, length, first, real, window, BLOCK_M, BLOCK_N, HAS_WINDOW)

    row = origin + first
    q_rows = load_rows(
        first_row(q, q_strides, batch, head, row), q_strides[2], real, HEAD_DIM, BLOCK_D, BLOCK_M, True
    )
    grad_out = first_row(grad_out, grad_out_strides, batch, head, row)
    grad_rows = load_rows(grad_out, grad_out_strides[2], real, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    out = first_packed_row(out, N, H, batch, head, row, HEAD_DIM)
    out_rows = load_rows(out, H * HEAD_DIM, real, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    stat_rows = (tl.cast(batch, tl.int64) * H + head) * N + row + tl.arange(0, BLOCK_M)
    row_lse = tl.load(lse + stat_rows, mask=real, other=float("inf"))
    if q.dtype.element_ty == tl.float32:
        # Summed in the order of dP = dO V^T: where one key has all the weight, dP - delta is 0, not rounding.
        square = tl.dot(grad_rows, tl.trans(out_rows), input_precision="ieee")
        diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
        row_delta = tl.sum(tl.where(diagonal, square, 0.0), 1)
    else:
        row_delta = tl.sum(grad_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    tl.store(delta + stat_rows, row_delta, mask=inside)
    row_grad_lse = None
    if grad_lse is not None:
        row_grad_lse = tl.load(grad_lse + stat_rows, mask=real, other=0.0)

    if grad_scores is not None:
        grad_scores = first_pair(grad_scores, grad_scores_strides, batch, head, row, origin)
    word_seed = 0
    if HAS_DROPOUT:
        word_seed = tl.load(seed)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for CHECK in tl.static_range(2):
        if CHECK or not HAS_WINDOW:
            acc = _visit_keys(
                acc,
                q_rows,
                grad_rows,
                row_lse,
                row_delta,
                row_grad_lse,
                first_row(k, k_strides, batch, head, origin),
                k_strides[2],
                first_row(v, v_strides, batch, head, origin),
                v_strides[2],
                grad_scores,
                grad_scores_strides,
                mask,
                word_seed,
                dense if CHECK else begin,
                end if CHECK else dense,
                length,
                first,
                real,
                sequence,
                head,
                tl.cast(scale, tl.float32),
                window,
                threshold,
                tl.cast(kept_scale, tl.float32),
                HEAD_DIM,
                BLOCK_D,
                BLOCK_M,
                BLOCK_N,
                HAS_WINDOW,
                HAS_DROPOUT,
                CHECK,
            )
    dq = first_packed_row(dq, N, H, batch, head, row, HEAD_DIM)
    store_rows(dq, H * HEAD_DIM, acc * tl.cast(scale, tl.float32), inside, HEAD_DIM, BLOCK_D, BLOCK_M)


@triton.jit
def _visit_queries(
    dk,  # (BLOCK_N, BLOCK_D) fp32
    dv,  # (BLOCK_N, BLOCK_D) fp32
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_D)
    q,  # at the sequence's first row
    q_stride,
    grad_out,  # at the sequence's first row
    grad_out_stride,
    lse,  # at the sequence's first row
    delta,  # at the sequence's first row
    grad_lse,  # at the sequence's first row, or None
    grad_scores,  # at query 0 and the block's first key, or None
    grad_scores_strides,
    mask,
    seed,
    begin,
    stop,
    length,
    first,
    real,  # (BLOCK_N,) bool
    sequence,
    head,
    scale,
    window,
    threshold,
    kept_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
):
    EXACT: tl.constexpr = k.dtype == tl.float32
    keys = first + tl.arange(0, BLOCK_N)
    if grad_scores is not None:
        columns = tl.arange(0, BLOCK_N)[:, None] * grad_scores_strides[3]
        tile_offsets = columns + tl.arange(0, BLOCK_M)[None, :] * grad_scores_strides[2]
    for query in range(0, stop - begin, BLOCK_M):
        query = tl.multiple_of(begin + query, BLOCK_M)
        queries = query + tl.arange(0, BLOCK_M)
        step = tl.cast(query, tl.int64)
        pairs = real[:, None]
        real_queries = queries < length
        if CHECK:
            real_queries = load_real(mask, queries, length)
            pairs = pairs & real_queries[None, :]
            if HAS_WINDOW:
                pairs = pairs & (tl.abs(queries[None, :] - keys[:, None]) <= window)
            row_lse = tl.load(lse + queries, mask=real_queries, other=float("inf"))
            row_delta = tl.load(delta + queries, mask=real_queries, other=0.0)
            if grad_lse is not None:
                row_grad_lse = tl.load(grad_lse + queries, mask=real_queries, other=0.0)
        else:
            row_lse = tl.load(lse + queries)
            row_delta = tl.load(delta + queries)
            if grad_lse is not None:
                row_grad_lse = tl.load(grad_lse + queries)
        q_rows = load_rows(q + step * q_stride, q_stride, real_queries, HEAD_DIM, BLOCK_D, BLOCK_M, CHECK)
        do_rows = load_rows(
            grad_out + step * grad_out_stride,
            grad_out_stride,
            real_queries,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            CHECK,
        )
        if EXACT:
            # in the forward's order of summation, so that P agrees with lse to the last bit
            s = tl.trans(tl.dot(q_rows, tl.trans(k), input_precision="ieee"))  # (BLOCK_N, BLOCK_M)
            dp = tl.trans(tl.dot(do_rows, tl.trans(v), input_precision="ieee"))
        else:
            s = tl.dot(k, tl.trans(q_rows))
            dp = tl.dot(v, tl.trans(do_rows))
        p = exp_scaled(s, scale, row_lse[None, :], EXACT)
        if HAS_WINDOW:
            p = tl.where(pairs, p, 0.0)
        kept = p
        if HAS_DROPOUT:
            keep = dropout_keep(seed, sequence, head, query, first, threshold, BLOCK_M, BLOCK_N, True)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        dv = tl.dot(kept.to(do_rows.dtype), do_rows, dv, input_precision="ieee")
        slope = dp - row_delta[None, :]
        if grad_lse is not None:
            slope += row_grad_lse[None, :]
        ds = p * slope
        if grad_scores is not None:
            tile = grad_scores + step * grad_scores_strides[2] + tile_offsets
            ds += tl.load(tile, mask=pairs, other=0.0).to(tl.float32)
        dk = tl.dot(ds.to(q_rows.dtype), q_rows, dk, input_precision="ieee")
    return dk, dv


def attention_bwd_dkv_kernel(
    q,  # (B, H, N, D)
    k,  # (B, H, N, D)
    v,  # (B, H, N, D)
    grad_out,  # (B, H, N, D)
    lse,  # (B, H, N) fp32
    delta,  # (B, H, N) fp32
    grad_lse,  # (B, H, N) fp32 or None
    grad_scores,  # (B, H, N, N) or None
    dk,  # (B, H, N, D) over (B, N, H, D) memory
    dv,  # (B, H, N, D) over (B, N, H, D) memory
    q_strides,  # of B, H, N
    k_strides,
    v_strides,
    grad_out_strides,
    grad_scores_strides,  # of B, H, N, N
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
    # dV = (P o Z)^T dO,  dK = scale * dS^T Q,  with P and dS as in the kernel of dQ.
    # Tiles are (keys, queries), so P^T and dS^T go into the products as they are. Whatever a key that is not
    # real makes of its own row of them stays in that row, which is not stored.
    batch, head, sequence, origin, length, first = find_block(cu_seqlens, N, H, num_sequences, BLOCK_N)
    if mask is not None:
        mask += tl.cast(batch, tl.int64) * N
    keys = first + tl.arange(0, BLOCK_N)
    real = load_real(mask, keys, length)
    begin, dense, end = visible_range(mask, length, first, real, window, BLOCK_N, BLOCK_M, HAS_WINDOW)

    row = origin + first
    k_rows = load_rows(
        first_row(k, k_strides, batch, head, row), k_strides[2], real, HEAD_DIM, BLOCK_D, BLOCK_N, True
    )
    v_rows = load_rows(
        first_row(v, v_strides, batch, head, row), v_strides[2], real, HEAD_DIM, BLOCK_D, BLOCK_N, True
    )
    stat_row = (tl.cast(batch, tl.int64) * H + head) * N + origin
    if grad_scores is not None:
        grad_scores = first_pair(grad_scores, grad_scores_strides, batch, head, origin, row)
    word_seed = 0
    if HAS_DROPOUT:
        word_seed = tl.load(seed)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for CHECK in tl.static_range(2):
        if CHECK or not HAS_WINDOW:
            dk_acc, dv_acc = _visit_queries(
                dk_acc,
                dv_acc,
                k_rows,
                v_rows,
                first_row(q, q_strides, batch, head, origin),
                q_strides[2],
                first_row(grad_out, grad_out_strides, batch, head, origin),
                grad_out_strides[2],
                lse + stat_row,
                delta + stat_row,
                grad_lse if grad_lse is None else grad_lse + stat_row,
                grad_scores,
                grad_scores_strides,
                mask,
                word_seed,
                dense if CHECK else begin,
                end if CHECK else dense,
                length,
                first,
                real,
                sequence,
                head,
                tl.cast(scale, tl.float32),
                window,
                threshold,
                tl.cast(kept_scale, tl.float32),
                HEAD_DIM,
                BLOCK_D,
                BLOCK_M,
                BLOCK_N,
                HAS_WINDOW,
                HAS_DROPOUT,
                CHECK,
            )
    dk_rows = tl.where(real[:, None], dk_acc * tl.cast(scale, tl.float32), 0.0)
    dv_rows = tl.where(real[:, None], dv_acc * tl.cast(kept_scale, tl.float32), 0.0)
    dk = first_packed_row(dk, N, H, batch, head, row, HEAD_DIM)
    dv = first_packed_row(dv, N, H, batch, head, row, HEAD_DIM)
    store_rows(dk, H * HEAD_DIM, dk_rows, keys < length, HEAD_DIM, BLOCK_D, BLOCK_N)
    store_rows(dv, H * HEAD_DIM, dv_rows, keys < length, HEAD_DIM, BLOCK_D, BLOCK_N)


_dq_kernel = tunable(attention_bwd_dq_kernel)
_dkv_kernel = tunable(attention_bwd_dkv_kernel)


def attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_scores: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv, each (B, H, N, D); ``options`` are those of the forward after ``mask``."""
    dq, dk, dv = rows_first(q), rows_first(k), rows_first(v)
    if q.numel() == 0:
        return dq, dk, dv
    q, k, v, grad_out = (in_place(x) for x in (q, k, v, grad_out))
    if out.stride() != dq.stride():
        out = rows_first(q).copy_(out)
    lse = lse.contiguous()
    grad_scores = None if grad_scores is None else near_strides(grad_scores)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    strides = tuple(x.stride()[:3] for x in (q, k, v, grad_out))
    grad_scores_strides = () if grad_scores is None else grad_scores.stride()
    rows, flags = prepare_rows(q, mask, *options)
    suffix = "" if grad_scores is None else "_scores"
    launch(
        _dq_kernel,
        "attention_bwd_dq" + suffix,
        "BLOCK_M",
        q,
        (
            *(q, k, v, out, grad_out, lse, grad_lse, grad_scores, delta, dq),
            *(*strides, grad_scores_strides),
        ),
        rows,
        flags,
    )
    launch(
        _dkv_kernel,
        "attention_bwd_dkv" + suffix,
        "BLOCK_N",
        q,
        (q, k, v, grad_out, lse, delta, grad_lse, grad_scores, dk, dv, *strides, grad_scores_strides),
        rows,
        flags,
    )
    return dq, dk, dv
