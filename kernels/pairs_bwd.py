"""Backward of the losses in pairs.py: one kernel for dQ, then one for dK; nothing is added atomically."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertops._library import rows_first
from bertops.kernels.launch import in_place, near_strides, tunable
from bertops.kernels.pairs import (
    Inputs,
    Scales,
    fp32_parts,
    is_exact,
    launch_pair,
    load_block,
    log_prob,
    power,
)
from bertops.kernels.tiles import (
    find_block,
    first_packed_row,
    first_row,
    load_real,
    load_rows,
    store_rows,
    visible_range,
)

_LOG2E = tl.constexpr(1.4426950408889634)
_SCAN = tl.constexpr(1024)
FP16_BOOST = 14  # a difference of probabilities times 2^14, or two of them, fit into fp16


@triton.jit
def load_stat(
    stat,  # (B, H, N) fp32 or None
    rows,  # (BLOCK,) offsets
    real,  # (BLOCK,) bool, not looked at unless CHECK
    CHECK: tl.constexpr,
):
    """(BLOCK,): 0 where there is none."""
    if stat is None:
        values = tl.zeros(rows.shape, tl.float32)
    elif CHECK:
        values = tl.load(stat + rows, mask=real, other=0.0)
    else:
        values = tl.load(stat + rows)
    return values


@triton.jit
def load_shift(
    lse,  # (B, H, N) fp32, or None for "mse"
    rows,  # (BLOCK,) offsets
    real,  # (BLOCK,) bool, not looked at unless CHECK
    BOOST: tl.constexpr,
    EXACT: tl.constexpr,
    CHECK: tl.constexpr,
):
    """(BLOCK,): what to subtract from a row's scores, whose powers are then 2^BOOST times the probabilities;
    with EXACT see fp32_parts."""
    shift = load_stat(lse, rows, real, CHECK)
    if not EXACT:
        shift = shift * _LOG2E - BOOST
    return shift


@triton.jit
def score_gap(
    s,  # (BLOCK, BLOCK) fp32
    t,
    slope_s,
    slope_t,
    shift_s,  # broadcasts to a tile
    shift_t,
    near,  # these two not looked at unless EXACT
    far,
    LOSS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """P_s - P_t or S - T, but for a factor of the row: the loss's gradient to S."""
    if LOSS == "mse":
        gap = s * slope_s - t * slope_t
    else:
        exp_s = power(log_prob(s, slope_s, shift_s, EXACT), EXACT)
        exp_t = power(log_prob(t, slope_t, shift_t, EXACT), EXACT)
        gap = (near * exp_s - exp_t) + far * exp_s if EXACT else exp_s - exp_t
    return gap


@triton.jit
def load_grad(
    grad_rows,  # at row 0
    stride,  # of a row
    row,  # first of the block
    real,  # (BLOCK,) bool, not looked at unless CHECK
    BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):
    """(BLOCK,)"""
    pointers = grad_rows + tl.cast(row, tl.int64) * stride + tl.arange(0, BLOCK) * stride
    return tl.load(pointers, mask=real, other=0.0) if CHECK else tl.load(pointers)


@triton.jit
def gradient_unit(
    grad_rows,  # at the sequence's first row
    stride,  # of a row
    mask,  # the sequence's row of (B, N) bool, or None
    length,
):
    """The largest of a sequence's |g|, or 1 without any: g is divided by it where a tile goes into fp16."""
    tops = tl.zeros([_SCAN], tl.float32)
    for start in range(0, length, _SCAN):
        rows = start + tl.arange(0, _SCAN)
        real = load_real(mask, rows, length)
        tops = tl.maximum(tops, tl.abs(load_grad(grad_rows, stride, start, real, _SCAN, True)))
    top = tl.max(tops, 0)
    return tl.where(top > 0, top, 1.0)


def pair_bwd_dq_kernel(
    grad_rows,  # (B, H, N) fp32
    q_s,  # (B, H, N, D_s)
    k_s,  # (B, H, N, D_s)
    q_t,  # (B, H, N, D_t)
    k_t,  # (B, H, N, D_t)
    lse_s,  # (B, H, N) fp32: with EXACT top_s; None for "mse"
    lse_t,  # (B, H, N) fp32: with EXACT top_t; None for "mse"
    near,  # (B, H, N) fp32, or None: see fp32_parts
    far,  # (B, H, N) fp32, or None
    dq_s,  # (B, H, N, D_s) over (B, N, H, D_s) memory
    grad_rows_strides,  # of B, H, N
    q_s_strides,
    k_s_strides,
    q_t_strides,
    k_t_strides,
    mask,  # (B, N) bool or None
    cu_seqlens,  # (num_sequences + 1,) int32 or None
    N,
    H,
    num_sequences,
    slope_s,
    slope_t,
    gain,
    HEAD_DIM_S: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK_D_S: tl.constexpr,
    BLOCK_D_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOSS: tl.constexpr,
    EXACT: tl.constexpr,
    BOOST: tl.constexpr,
):
    # dQ_i = gain * g_i sum_j gap_ij K_j: what belongs to the row waits until after the sum.
    batch, head, _, origin, length, first = find_block(cu_seqlens, N, H, num_sequences, BLOCK_M)
    if mask is not None:
        mask += tl.cast(batch, tl.int64) * N
    queries = first + tl.arange(0, BLOCK_M)
    inside = queries < length
    real = load_real(mask, queries, length)
    begin, dense, end = visible_range(mask, length, first, real, 0, BLOCK_M, BLOCK_N, False)

    slope_s = tl.cast(slope_s, tl.float32)
    slope_t = tl.cast(slope_t, tl.float32)
    row = origin + first
    q_s = first_row(q_s, q_s_strides, batch, head, row)
    q_t = first_row(q_t, q_t_strides, batch, head, row)
    q_s_rows = load_rows(q_s, q_s_strides[2], real, HEAD_DIM_S, BLOCK_D_S, BLOCK_M, True)
    q_t_rows = load_rows(q_t, q_t_strides[2], real, HEAD_DIM_T, BLOCK_D_T, BLOCK_M, True)
    k_s = first_row(k_s, k_s_strides, batch, head, origin)
    k_t = first_row(k_t, k_t_strides, batch, head, origin)
    stat_rows = (tl.cast(batch, tl.int64) * H + head) * N + row + tl.arange(0, BLOCK_M)
    shift_s = load_shift(lse_s, stat_rows, real, BOOST, EXACT, True)
    shift_t = load_shift(lse_t, stat_rows, real, BOOST, EXACT, True)
    row_near = load_stat(near, stat_rows, real, True)
    row_far = load_stat(far, stat_rows, real, True)

    acc = tl.zeros([BLOCK_M, BLOCK_D_S], tl.float32)
    for CHECK in tl.static_range(2):
        start = dense if CHECK else begin
        stop = end if CHECK else dense
        for key in range(0, stop - start, BLOCK_N):
            key = tl.multiple_of(start + key, BLOCK_N)
            keys = key + tl.arange(0, BLOCK_N)
            real_keys = keys < length
            if CHECK:
                real_keys = load_real(mask, keys, length)
            k_s_rows = load_block(k_s, k_s_strides[2], key, real_keys, HEAD_DIM_S, BLOCK_D_S, BLOCK_N, CHECK)
            k_t_rows = load_block(k_t, k_t_strides[2], key, real_keys, HEAD_DIM_T, BLOCK_D_T, BLOCK_N, CHECK)
            s = tl.dot(q_s_rows, tl.trans(k_s_rows), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            t = tl.dot(q_t_rows, tl.trans(k_t_rows), input_precision="ieee")
            gap = score_gap(
                s,
                t,
                slope_s,
                slope_t,
                shift_s[:, None],
                shift_t[:, None],
                row_near[:, None],
                row_far[:, None],
                LOSS,
                EXACT,
            )
            if CHECK and LOSS == "kl":
                gap = tl.where(real_keys[None, :], gap, 0.0)
            acc = tl.dot(gap.to(k_s_rows.dtype), k_s_rows, acc, input_precision="ieee")

    grad_rows = first_row(grad_rows, grad_rows_strides, batch, head, row)
    g = load_grad(grad_rows, grad_rows_strides[2], 0, real, BLOCK_M, True)
    dq_rows = tl.where(real[:, None], acc * (g * tl.cast(gain, tl.float32))[:, None], 0.0)
    dq_s = first_packed_row(dq_s, N, H, batch, head, row, HEAD_DIM_S)
    store_rows(dq_s, H * HEAD_DIM_S, dq_rows, inside, HEAD_DIM_S, BLOCK_D_S, BLOCK_M)


def pair_bwd_dk_kernel(
    grad_rows,  # (B, H, N) fp32
    q_s,  # (B, H, N, D_s)
    k_s,  # (B, H, N, D_s)
    q_t,  # (B, H, N, D_t)
    k_t,  # (B, H, N, D_t)
    lse_s,  # (B, H, N) fp32: with EXACT top_s; None for "mse"
    lse_t,  # (B, H, N) fp32: with EXACT top_t; None for "mse"
    near,  # (B, H, N) fp32, or None: see fp32_parts
    far,  # (B, H, N) fp32, or None
    dk_s,  # (B, H, N, D_s) over (B, N, H, D_s) memory
    grad_rows_strides,  # of B, H, N
    q_s_strides,
    k_s_strides,
    q_t_strides,
    k_t_strides,
    mask,  # (B, N) bool or None
    cu_seqlens,  # (num_sequences + 1,) int32 or None
    N,
    H,
    num_sequences,
    slope_s,
    slope_t,
    gain,
    HEAD_DIM_S: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK_D_S: tl.constexpr,
    BLOCK_D_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOSS: tl.constexpr,
    EXACT: tl.constexpr,
    BOOST: tl.constexpr,
):
    # dK_j = gain * sum_i g_i gap_ij Q_i, in tiles (keys, queries), which go into the product as they are.
    # Whatever a key that is not real makes of its own row of a tile stays in that row, which is not stored;
    # a query that is not real has g = 0 and a finite gap.
    batch, head, _, origin, length, first = find_block(cu_seqlens, N, H, num_sequences, BLOCK_N)
    if mask is not None:
        mask += tl.cast(batch, tl.int64) * N
    keys = first + tl.arange(0, BLOCK_N)
    real = load_real(mask, keys, length)
    begin, dense, end = visible_range(mask, length, first, real, 0, BLOCK_N, BLOCK_M, False)

    slope_s = tl.cast(slope_s, tl.float32)
    slope_t = tl.cast(slope_t, tl.float32)
    row = origin + first
    k_s = first_row(k_s, k_s_strides, batch, head, row)
    k_t = first_row(k_t, k_t_strides, batch, head, row)
    k_s_rows = load_rows(k_s, k_s_strides[2], real, HEAD_DIM_S, BLOCK_D_S, BLOCK_N, True)
    k_t_rows = load_rows(k_t, k_t_strides[2], real, HEAD_DIM_T, BLOCK_D_T, BLOCK_N, True)
    q_s = first_row(q_s, q_s_strides, batch, head, origin)
    q_t = first_row(q_t, q_t_strides, batch, head, origin)
    stat_row = (tl.cast(batch, tl.int64) * H + head) * N + origin
    grad_rows = first_row(grad_rows, grad_rows_strides, batch, head, origin)
    grad_stride = grad_rows_strides[2]
    unit = 1.0
    if k_s_rows.dtype == tl.float16:
        unit = gradient_unit(grad_rows, grad_stride, mask, length)

    acc = tl.zeros([BLOCK_N, BLOCK_D_S], tl.float32)
    for CHECK in tl.static_range(2):
        start = dense if CHECK else begin
        stop = end if CHECK else dense
        for query in range(0, stop - start, BLOCK_M):
            query = tl.multiple_of(start + query, BLOCK_M)
            queries = query + tl.arange(0, BLOCK_M)
            real_queries = queries < length
            if CHECK:
                real_queries = load_real(mask, queries, length)
            g = load_grad(grad_rows, grad_stride, query, real_queries, BLOCK_M, CHECK)
            if k_s_rows.dtype == tl.float16:
                g = g / unit
            shift_s = load_shift(lse_s, stat_row + queries, real_queries, BOOST, EXACT, CHECK)
            shift_t = load_shift(lse_t, stat_row + queries, real_queries, BOOST, EXACT, CHECK)
            row_near = load_stat(near, stat_row + queries, real_queries, CHECK)
            row_far = load_stat(far, stat_row + queries, real_queries, CHECK)
            q_s_rows = load_block(
                q_s, q_s_strides[2], query, real_queries, HEAD_DIM_S, BLOCK_D_S, BLOCK_M, CHECK
            )
            q_t_rows = load_block(
                q_t, q_t_strides[2], query, real_queries, HEAD_DIM_T, BLOCK_D_T, BLOCK_M, CHECK
            )
            if EXACT:
                # in the forward's order of summation, so that P agrees with lse to the last bit
                s = tl.trans(tl.dot(q_s_rows, tl.trans(k_s_rows), input_precision="ieee"))
                t = tl.trans(tl.dot(q_t_rows, tl.trans(k_t_rows), input_precision="ieee"))
            else:
                s = tl.dot(k_s_rows, tl.trans(q_s_rows), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
                t = tl.dot(k_t_rows, tl.trans(q_t_rows), input_precision="ieee")
            gap = score_gap(
                s,
                t,
                slope_s,
                slope_t,
                shift_s[None, :],
                shift_t[None, :],
                row_near[None, :],
                row_far[None, :],
                LOSS,
                EXACT,
            )
            acc = tl.dot((gap * g[None, :]).to(q_s_rows.dtype), q_s_rows, acc, input_precision="ieee")

    dk_rows = tl.where(real[:, None], acc * (unit * tl.cast(gain, tl.float32)), 0.0)
    dk_s = first_packed_row(dk_s, N, H, batch, head, row, HEAD_DIM_S)
    store_rows(dk_s, H * HEAD_DIM_S, dk_rows, keys < length, HEAD_DIM_S, BLOCK_D_S, BLOCK_N)


_dq_kernel = tunable(pair_bwd_dq_kernel)
_dk_kernel = tunable(pair_bwd_dk_kernel)


def pair_bwd(
    loss: str,
    grad_rows: Tensor,
    inputs: Inputs,
    lse: tuple[Tensor | None, Tensor | None],  # of student and teacher
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scales: Scales,
) -> tuple[Tensor, Tensor]:
    """Returns dq_s and dk_s (B, H, N, D_s)."""
    dq_s, dk_s = rows_first(inputs[0]), rows_first(inputs[1])
    if dq_s.numel() == 0:
        return dq_s, dk_s
    q_s, k_s, q_t, k_t = (in_place(x) for x in inputs)
    grad_rows, stats = backward_rows(loss, grad_rows, (q_s, k_s, q_t, k_t), lse, mask, cu_seqlens, scales)
    tensors = grad_rows, q_s, k_s, q_t, k_t, *stats
    strides = tuple(x.stride()[:3] for x in (grad_rows, q_s, k_s, q_t, k_t))
    scales, flags = boosted(loss, scales, q_s.dtype)
    for kernel, name, block, out in (
        (_dq_kernel, "pair_bwd_dq", "BLOCK_M", dq_s),
        (_dk_kernel, "pair_bwd_dk", "BLOCK_N", dk_s),
    ):
        arguments = (*tensors, out, *strides)
        launch_pair(kernel, name, block, (q_s, q_t), arguments, (mask, cu_seqlens), scales, flags)
    return dq_s, dk_s


def backward_rows(
    loss: str,
    grad_rows: Tensor,
    inputs: Inputs,
    lse: tuple[Tensor | None, Tensor | None],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scales: Scales,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """What a backward reads for every row: its upstream gradient, and two shifts, near and far."""
    if loss == "kl" and is_exact(inputs[0], inputs[2]):
        factor, *parts = fp32_parts(inputs, mask, cu_seqlens, scales)
        return grad_rows * factor, tuple(parts)
    shifts = (None if x is None else x.contiguous() for x in lse)
    return near_strides(grad_rows), (*shifts, None, None)


def boosted(loss: str, scales: Scales, dtype: torch.dtype) -> tuple[Scales, dict[str, Any]]:
    """``scales`` and flags of a backward; KL's differences would lose their bits where fp16 ends."""
    boost = FP16_BOOST if loss == "kl" and dtype == torch.float16 else 0
    return scales._replace(gain=scales.gain * 2.0**-boost), {"LOSS": loss, "BOOST": boost}
