"""KL between a teacher's and a student's self-relations in Triton; the forward kernel is that of pairs.py."""

import triton.language as tl
from torch import Tensor

from bertops._library import rows_first
from bertops.kernels.launch import INTERPRETER, architecture, in_place, tunable
from bertops.kernels.pairs import is_exact, kl_scales, launch_pair, load_block, pair_fwd
from bertops.kernels.pairs_bwd import (
    backward_rows,
    boosted,
    gradient_unit,
    load_grad,
    load_shift,
    load_stat,
    score_gap,
)
from bertops.kernels.tiles import (
    find_block,
    first_packed_row,
    first_row,
    load_real,
    store_rows,
    visible_range,
)


def relation_kl_bwd_kernel(
    grad_rows,  # (B, H, N) fp32
    x_s,  # (B, H, N, D_s)
    x_t,  # (B, H, N, D_t)
    lse_s,  # (B, H, N) fp32: with EXACT top_s
    lse_t,  # (B, H, N) fp32: with EXACT top_t
    near,  # (B, H, N) fp32, or None: see fp32_parts
    far,  # (B, H, N) fp32, or None
    dx_s,  # (B, H, N, D_s) over (B, N, H, D_s) memory
    grad_rows_strides,  # of B, H, N
    x_s_strides,
    x_t_strides,
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
    SYMMETRIC: tl.constexpr,
):
    # dX_i = gain * sum_j (g_i gap_ij + g_j gap_ji) X_j: as S and T are symmetric, gap_ji comes from the tile
    # of gap_ij with the lse of its columns. A GPU sums X_i X_j and X_j X_i alike, the interpreter's BLAS does
    # not (SYMMETRIC), and of scores of 1e4 the last bit is 0.1% of a probability.
    batch, head, _, origin, length, first = find_block(cu_seqlens, N, H, num_sequences, BLOCK_M)
    if mask is not None:
        mask += tl.cast(batch, tl.int64) * N
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < length
    real = load_real(mask, rows, length)
    begin, dense, end = visible_range(mask, length, first, real, 0, BLOCK_M, BLOCK_N, False)

    slope_s = tl.cast(slope_s, tl.float32)
    slope_t = tl.cast(slope_t, tl.float32)
    x_s = first_row(x_s, x_s_strides, batch, head, origin)
    x_t = first_row(x_t, x_t_strides, batch, head, origin)
    s_rows = load_block(x_s, x_s_strides[2], first, real, HEAD_DIM_S, BLOCK_D_S, BLOCK_M, True)
    t_rows = load_block(x_t, x_t_strides[2], first, real, HEAD_DIM_T, BLOCK_D_T, BLOCK_M, True)
    stat_row = (tl.cast(batch, tl.int64) * H + head) * N + origin
    shift_s = load_shift(lse_s, stat_row + rows, real, BOOST, EXACT, True)
    shift_t = load_shift(lse_t, stat_row + rows, real, BOOST, EXACT, True)
    row_near = load_stat(near, stat_row + rows, real, True)
    row_far = load_stat(far, stat_row + rows, real, True)
    grad_rows = first_row(grad_rows, grad_rows_strides, batch, head, origin)
    grad_stride = grad_rows_strides[2]
    unit = 1.0
    if s_rows.dtype == tl.float16:
        unit = gradient_unit(grad_rows, grad_stride, mask, length)
    g = load_grad(grad_rows, grad_stride, first, real, BLOCK_M, True) / unit

    acc = tl.zeros([BLOCK_M, BLOCK_D_S], tl.float32)
    for CHECK in tl.static_range(2):
        start = dense if CHECK else begin
        stop = end if CHECK else dense
        for column in range(0, stop - start, BLOCK_N):
            column = tl.multiple_of(start + column, BLOCK_N)
            columns = column + tl.arange(0, BLOCK_N)
            real_columns = columns < length
            if CHECK:
                real_columns = load_real(mask, columns, length)
            column_g = load_grad(grad_rows, grad_stride, column, real_columns, BLOCK_N, CHECK)
            if s_rows.dtype == tl.float16:
                column_g = column_g / unit
            column_shift_s = load_shift(lse_s, stat_row + columns, real_columns, BOOST, EXACT, CHECK)
            column_shift_t = load_shift(lse_t, stat_row + columns, real_columns, BOOST, EXACT, CHECK)
            column_near = load_stat(near, stat_row + columns, real_columns, CHECK)
            column_far = load_stat(far, stat_row + columns, real_columns, CHECK)
            s_columns = load_block(
                x_s, x_s_strides[2], column, real_columns, HEAD_DIM_S, BLOCK_D_S, BLOCK_N, CHECK
            )
            t_columns = load_block(
                x_t, x_t_strides[2], column, real_columns, HEAD_DIM_T, BLOCK_D_T, BLOCK_N, CHECK
            )
            s = tl.dot(s_rows, tl.trans(s_columns), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            t = tl.dot(t_rows, tl.trans(t_columns), input_precision="ieee")
            along = score_gap(
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
            if EXACT and not SYMMETRIC:
                s = tl.trans(tl.dot(s_columns, tl.trans(s_rows), input_precision="ieee"))
                t = tl.trans(tl.dot(t_columns, tl.trans(t_rows), input_precision="ieee"))
            across = score_gap(
                s,
                t,
                slope_s,
                slope_t,
                column_shift_s[None, :],
                column_shift_t[None, :],
                column_near[None, :],
                column_far[None, :],
                LOSS,
                EXACT,
            )
            ds = along * g[:, None] + across * column_g[None, :]
            if CHECK:
                ds = tl.where(real_columns[None, :], ds, 0.0)
            acc = tl.dot(ds.to(s_columns.dtype), s_columns, acc, input_precision="ieee")

    dx_rows = tl.where(real[:, None], acc * (unit * tl.cast(gain, tl.float32)), 0.0)
    dx_s = first_packed_row(dx_s, N, H, batch, head, origin + first, HEAD_DIM_S)
    store_rows(dx_s, H * HEAD_DIM_S, dx_rows, inside, HEAD_DIM_S, BLOCK_D_S, BLOCK_M)


_kernel = tunable(relation_kl_bwd_kernel)


def relation_kl_fwd(
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns KL, lse_s and lse_t (B, H, N); see :func:`bertops.relation_kl`."""
    scales = kl_scales(scale_s, scale_t, is_exact(x_s, x_t))
    x_s, x_t = in_place(x_s), in_place(x_t)  # once, not once for each side of the product
    rows, lse_s, lse_t = pair_fwd("kl", (x_s, x_s, x_t, x_t), (None, None), mask, cu_seqlens, scales)
    return rows, lse_s, lse_t


def relation_kl_bwd(
    grad_rows: Tensor,
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: float,
    scale_t: float,
    lse_s: Tensor,
    lse_t: Tensor,
) -> Tensor:
    """Returns dx_s (B, H, N, D_s)."""
    dx_s = rows_first(x_s)
    if dx_s.numel() == 0:
        return dx_s
    x_s, x_t = in_place(x_s), in_place(x_t)
    scales = kl_scales(scale_s, scale_t, is_exact(x_s, x_t))._replace(gain=scale_s)
    inputs, lse = (x_s, x_s, x_t, x_t), (lse_s, lse_t)
    grad, stats = backward_rows("kl", grad_rows, inputs, lse, mask, cu_seqlens, scales)
    strides = tuple(x.stride()[:3] for x in (grad, x_s, x_t))
    arguments = grad, x_s, x_t, *stats, dx_s, *strides
    scales, flags = boosted("kl", scales, x_s.dtype)
    flags["SYMMETRIC"] = architecture(x_s.device) != INTERPRETER
    launch_pair(
        _kernel, "relation_kl_bwd", "BLOCK_M", (x_s, x_t), arguments, (mask, cu_seqlens), scales, flags
    )
    return dx_s
