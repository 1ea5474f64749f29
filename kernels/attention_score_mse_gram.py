"""The Gram form of attention_score_mse in Triton: time and memory linear in N.

With P = [alpha Q_s, -beta Q_t] and R = [K_s, K_t], of width W = D_s + D_t, and Grams G_X = X^T X (W, W), a
head's sum of squared differences is <G_P, G_R>. Three kernels: the Grams of chunks of rows; their sum over a
sequence's chunks, always in the same order, and the inner product; the gradient, products of rows with Grams.

Tensor cores multiply half precision exactly but truncate as they sum, so their sums are short: one block of
rows. All longer sums round to nearest, in fp32 for Grams and in fp64 for the inner product.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertops._library import rows_first
from bertops.kernels.launch import (
    BlockConfig,
    architecture,
    block_config,
    ceil_div,
    compiled,
    in_place,
    padded_head_dim,
    power_of_two,
    prepare_sequences,
    run,
)
from bertops.kernels.tiles import find_block, first_packed_row, first_row, load_real

_SUM_TILE = 4096  # elements of a Gram that the summing kernel holds at a time
_PROGRAMS = 1024  # that the chunks should at least be enough for
_LEAST_CHUNK = 256


@triton.jit
def load_columns(
    x,  # pointer to the first row
    stride,  # of a row
    real,  # (BLOCK,) bool
    first,  # column
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(BLOCK, TILE): 0 in rows that are not real and in columns from HEAD_DIM on."""
    columns = first + tl.arange(0, TILE)
    pointers = x + tl.arange(0, BLOCK)[:, None] * stride + columns[None, :]
    inside = real[:, None]
    if HEAD_DIM % TILE != 0:
        inside = inside & (columns < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _product(
    x,  # (BLOCK, TILE)
    y,  # (BLOCK, TILE)
):
    """X^T Y in fp32."""
    if x.dtype != y.dtype:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(tl.trans(x), y, input_precision="ieee")


@triton.jit
def _store_gram(
    gram,  # pointer to the part's first element
    row_stride,
    column_stride,
    tile,  # (TILE, TILE)
    first_row,
    first_column,
    NUM_ROWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = first_row + tl.arange(0, TILE)
    columns = first_column + tl.arange(0, TILE)
    pointers = gram + rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(pointers, tile, mask=(rows < NUM_ROWS)[:, None] & (columns < NUM_COLUMNS)[None, :])


def chunk_grams_kernel(
    q_s,  # (B, H, N, D_s)
    k_s,  # (B, H, N, D_s)
    q_t,  # (B, H, N, D_t)
    k_t,  # (B, H, N, D_t)
    parts,  # (programs on axis 0, 2, W, W) fp32: of P, of R
    q_s_strides,  # of B, H, N
    k_s_strides,
    q_t_strides,
    k_t_strides,
    mask,  # (B, N) bool or None
    cu_seqlens,  # (num_sequences + 1,) int32 or None
    N,
    H,
    num_sequences,
    weight_s,  # alpha
    weight_t,  # -beta
    weight_k,  # 1
    HEAD_DIM_S: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows
    BLOCK_N: tl.constexpr,  # of a Gram's tile, both sides
    CHUNK: tl.constexpr,
):
    # A program owns a chunk of rows, P or R, and the tiles (a, b) of student x student, student x teacher and
    # teacher x teacher. The factors go to fp32: with one that only the launch knows, no compiler merges the
    # addition into the product.
    batch, head, _, origin, length, first = find_block(cu_seqlens, N, H, num_sequences, CHUNK)
    if mask is not None:
        mask += tl.cast(batch, tl.int64) * N
    TILES: tl.constexpr = (max(HEAD_DIM_S, HEAD_DIM_T) + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = HEAD_DIM_S + HEAD_DIM_T
    a = tl.program_id(1) // 2 // TILES * BLOCK_N
    b = tl.program_id(1) // 2 % TILES * BLOCK_N
    count = tl.minimum(length - first, CHUNK)
    for SIDE in tl.static_range(2):
        if tl.program_id(1) % 2 == SIDE:
            if SIDE == 0:
                x_s = first_row(q_s, q_s_strides, batch, head, origin + first)
                x_t = first_row(q_t, q_t_strides, batch, head, origin + first)
                s_stride = q_s_strides[2]
                t_stride = q_t_strides[2]
                factor_s = tl.cast(weight_s, tl.float32)
                factor_t = tl.cast(weight_t, tl.float32)
            else:
                x_s = first_row(k_s, k_s_strides, batch, head, origin + first)
                x_t = first_row(k_t, k_t_strides, batch, head, origin + first)
                s_stride = k_s_strides[2]
                t_stride = k_t_strides[2]
                factor_s = tl.cast(weight_k, tl.float32)
                factor_t = tl.cast(weight_k, tl.float32)
            ss = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
            st = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
            tt = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
            for row in range(0, count, BLOCK_M):
                real = load_real(mask, first + row + tl.arange(0, BLOCK_M), length)
                step = tl.cast(row, tl.int64)
                rows_s = x_s + step * s_stride
                rows_t = x_t + step * t_stride
                s_a = load_columns(rows_s, s_stride, real, a, HEAD_DIM_S, BLOCK_N, BLOCK_M)
                t_a = load_columns(rows_t, t_stride, real, a, HEAD_DIM_T, BLOCK_N, BLOCK_M)
                s_b = s_a
                t_b = t_a
                if TILES > 1:
                    s_b = load_columns(rows_s, s_stride, real, b, HEAD_DIM_S, BLOCK_N, BLOCK_M)
                    t_b = load_columns(rows_t, t_stride, real, b, HEAD_DIM_T, BLOCK_N, BLOCK_M)
                ss += _product(s_a, s_b) * (factor_s * factor_s)
                st += _product(s_a, t_b) * (factor_s * factor_t)
                tt += _product(t_a, t_b) * (factor_t * factor_t)
            gram = parts + (tl.cast(tl.program_id(0), tl.int64) * 2 + SIDE) * WIDTH * WIDTH
            teacher = gram + HEAD_DIM_S * WIDTH
            _store_gram(gram, WIDTH, 1, ss, a, b, HEAD_DIM_S, HEAD_DIM_S, BLOCK_N)
            _store_gram(gram + HEAD_DIM_S, WIDTH, 1, st, a, b, HEAD_DIM_S, HEAD_DIM_T, BLOCK_N)
            _store_gram(teacher, 1, WIDTH, st, a, b, HEAD_DIM_S, HEAD_DIM_T, BLOCK_N)
            _store_gram(teacher + HEAD_DIM_S, WIDTH, 1, tt, a, b, HEAD_DIM_T, HEAD_DIM_T, BLOCK_N)


def sum_grams_kernel(
    parts,  # (programs of the chunks, 2, W, W) fp32
    grams,  # (S, H, 2, W, W) fp32, or None where parts has one chunk for each of them
    sums,  # (S, H) fp32
    cu_seqlens,  # (num_sequences + 1,) int32 or None
    N,
    H,
    num_sequences,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)  # sequence * H + head
    if cu_seqlens is None:
        count = tl.cdiv(N, CHUNK)
        part = tl.cast(program, tl.int64) * count
    else:
        sequence = program // H
        origin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), N)
        length = tl.minimum(tl.load(cu_seqlens + sequence + 1), N) - origin
        count = tl.cdiv(tl.maximum(length, 0), CHUNK)
        head = tl.cast(program % H, tl.int64)
        part = head * (N // CHUNK + num_sequences) + origin // CHUNK + sequence
    columns = tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_M, BLOCK_W], tl.float64)
    for row in range(0, WIDTH, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        inside = (rows < WIDTH)[:, None] & (columns < WIDTH)[None, :]
        tile = rows[:, None] * WIDTH + columns[None, :]
        p = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
        r = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
        for chunk in range(count):
            pointers = parts + (part + chunk) * (2 * WIDTH * WIDTH) + tile
            p += tl.load(pointers, mask=inside, other=0.0)
            r += tl.load(pointers + WIDTH * WIDTH, mask=inside, other=0.0)
        if grams is not None:
            pointers = grams + tl.cast(program, tl.int64) * (2 * WIDTH * WIDTH) + tile
            tl.store(pointers, p, mask=inside)
            tl.store(pointers + WIDTH * WIDTH, r, mask=inside)
        total += p.to(tl.float64) * r.to(tl.float64)
    tl.store(sums + program, tl.sum(tl.sum(total, 1), 0).to(tl.float32))


@triton.jit
def _times_gram(
    x,  # at the block's first row
    stride,  # of a row
    real,  # (BLOCK_M,) bool
    gram,  # at the first row for x and the first column of the result
    columns,  # (BLOCK_N,) of the result that there are
    factor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N): rows of X times ``factor`` times a Gram, to the precision of fp32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, HEAD_DIM, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        rows = load_columns(x, stride, real, k, HEAD_DIM, BLOCK_K, BLOCK_M)
        pointers = gram + ks[:, None] * WIDTH + tl.arange(0, BLOCK_N)[None, :]
        tile = tl.load(pointers, mask=(ks < HEAD_DIM)[:, None] & columns[None, :], other=0.0) * factor
        if x.dtype.element_ty == tl.float32:
            acc = tl.dot(rows, tile, acc, input_precision="ieee")
        else:
            # half precision fits into tf32; the Gram takes two of them
            high = (tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            acc = tl.dot(rows.to(tl.float32), tile - high, acc, input_precision="tf32")
            acc = tl.dot(rows.to(tl.float32), high, acc, input_precision="tf32")
    return acc


def gram_bwd_kernel(
    grad,  # one element
    q_s,  # (B, H, N, D_s)
    k_s,  # (B, H, N, D_s)
    q_t,  # (B, H, N, D_t)
    k_t,  # (B, H, N, D_t)
    grams,  # (S, H, 2, W, W) fp32
    dq_s,  # (B, H, N, D_s) over (B, N, H, D_s) memory
    dk_s,  # (B, H, N, D_s) over (B, N, H, D_s) memory
    q_s_strides,  # of B, H, N
    k_s_strides,
    q_t_strides,
    k_t_strides,
    mask,  # (B, N) bool or None
    cu_seqlens,  # (num_sequences + 1,) int32 or None
    N,
    H,
    num_sequences,
    weight_s,  # alpha
    weight_t,  # -beta
    HEAD_DIM_S: tl.constexpr,
    HEAD_DIM_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # With G_P and G_R split at D_s into rows of s and t, and their first D_s columns alone:
    # dQ_s = 2 g (Q_s alpha^2 G_R[s] - Q_t alpha beta G_R[t]),  dK_s = 2 g (K_s G_P[s] + K_t G_P[t]).
    # Two sums, added at the end: they are opposite to the last bit where both models agree.
    batch, head, sequence, origin, length, first = find_block(cu_seqlens, N, H, num_sequences, BLOCK_M)
    if mask is not None:
        mask += tl.cast(batch, tl.int64) * N
    rows = first + tl.arange(0, BLOCK_M)
    real = load_real(mask, rows, length)
    row = origin + first
    weight_s = tl.cast(weight_s, tl.float32)
    weight_t = tl.cast(weight_t, tl.float32)
    twice_grad = 2 * tl.load(grad).to(tl.float32)
    WIDTH: tl.constexpr = HEAD_DIM_S + HEAD_DIM_T
    column = tl.program_id(1) // 2 * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N) < HEAD_DIM_S
    grams += ((tl.cast(sequence, tl.int64) * H + head) * 2) * WIDTH * WIDTH + column
    for SIDE in tl.static_range(2):
        if tl.program_id(1) % 2 == SIDE:
            if SIDE == 0:
                x_s = first_row(q_s, q_s_strides, batch, head, row)
                x_t = first_row(q_t, q_t_strides, batch, head, row)
                s_stride = q_s_strides[2]
                t_stride = q_t_strides[2]
                gram = grams + WIDTH * WIDTH
                factor_s = weight_s * weight_s
                factor_t = weight_s * weight_t
                dx = dq_s
            else:
                x_s = first_row(k_s, k_s_strides, batch, head, row)
                x_t = first_row(k_t, k_t_strides, batch, head, row)
                s_stride = k_s_strides[2]
                t_stride = k_t_strides[2]
                gram = grams
                factor_s = 1.0
                factor_t = 1.0
                dx = dk_s
            from_s = _times_gram(
                x_s, s_stride, real, gram, columns, factor_s, HEAD_DIM_S, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K
            )
            gram += HEAD_DIM_S * WIDTH
            from_t = _times_gram(
                x_t, t_stride, real, gram, columns, factor_t, HEAD_DIM_T, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K
            )
            values = tl.where(real[:, None], (from_s + from_t) * twice_grad, 0.0)
            dx = first_packed_row(dx, N, H, batch, head, row, HEAD_DIM_S) + column
            pointers = dx + tl.arange(0, BLOCK_M)[:, None] * (H * HEAD_DIM_S) + tl.arange(0, BLOCK_N)[None, :]
            inside = (rows < length)[:, None] & columns[None, :]
            tl.store(pointers, values.to(dx.dtype.element_ty), mask=inside)


_chunk_kernel = compiled(chunk_grams_kernel)
_sum_kernel = compiled(sum_grams_kernel)
_bwd_kernel = compiled(gram_bwd_kernel)


def attention_score_mse_gram_fwd(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor]:
    """Returns sums (S, H) and grams (S, H, 2, W, W): G_P and G_R of every sequence and head."""
    q_s, k_s, q_t, k_t = (in_place(x) for x in (q_s, k_s, q_t, k_t))
    sequences = prepare_sequences(q_s, mask, cu_seqlens)
    batch, heads, length, _ = q_s.shape
    width = q_s.shape[3] + q_t.shape[3]
    count = sequences.num_sequences or batch
    sums = q_s.new_empty((count, heads), dtype=torch.float32)
    grams = q_s.new_empty((count, heads, 2, width, width), dtype=torch.float32)
    if grams.numel() == 0 or length == 0:
        return sums.zero_(), grams.zero_()
    config, flags = _config("gram_chunks", q_s, q_t)
    tiles = ceil_div(max(q_s.shape[3], q_t.shape[3]), config.block_n)
    programs = 2 * tiles * tiles
    chunk = _chunk_rows(batch * length * heads * programs // _PROGRAMS, length)
    if sequences.num_sequences:
        chunks = heads * (length // chunk + count)
    else:
        chunks = count * heads * ceil_div(length, chunk)
    alone = chunks == count * heads and not sequences.num_sequences
    parts = grams if alone else grams.new_empty((chunks, 2, width, width))
    arguments = q_s, k_s, q_t, k_t, parts, *(x.stride()[:3] for x in (q_s, k_s, q_t, k_t))
    run(
        _chunk_kernel,
        config,
        "CHUNK",
        q_s,
        sequences.num_sequences,
        (*arguments, *sequences, float(scale_s), -float(scale_t), 1.0),
        {**flags, "CHUNK": chunk},
        programs,
    )
    block_w = power_of_two(width)
    with torch.cuda.device_of(q_s):
        _sum_kernel[(count * heads,)](
            parts,
            None if alone else grams,
            sums,
            *sequences[1:],
            WIDTH=width,
            BLOCK_M=_SUM_TILE // max(block_w, 16),
            BLOCK_W=max(block_w, 16),
            CHUNK=chunk,
        )
    return sums, grams


def attention_score_mse_gram_bwd(
    grad: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: float,
    scale_t: float,
    grams: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns dq_s and dk_s (B, H, N, D_s)."""
    dq_s, dk_s = rows_first(q_s), rows_first(k_s)
    if dq_s.numel() == 0:
        return dq_s, dk_s
    q_s, k_s, q_t, k_t = (in_place(x) for x in (q_s, k_s, q_t, k_t))
    sequences = prepare_sequences(q_s, mask, cu_seqlens)
    config, flags = _config("gram_bwd", q_s, q_t)
    arguments = grad, q_s, k_s, q_t, k_t, grams.contiguous(), dq_s, dk_s
    strides = tuple(x.stride()[:3] for x in (q_s, k_s, q_t, k_t))
    run(
        _bwd_kernel,
        config,
        "BLOCK_M",
        q_s,
        sequences.num_sequences,
        (*arguments, *strides, *sequences, float(scale_s), -float(scale_t)),
        {**flags, "BLOCK_K": config.block_n},
        2 * ceil_div(q_s.shape[3], config.block_n),
    )
    return dq_s, dk_s


def _config(name: str, q_s: Tensor, q_t: Tensor) -> tuple[BlockConfig, dict[str, Any]]:
    """Block sizes, a Gram's tile no wider than the wider model's head dim, and the flags of both kernels."""
    head_dim = max(q_s.shape[3], q_t.shape[3])
    dtype = torch.float32 if torch.float32 in (q_s.dtype, q_t.dtype) else q_s.dtype
    config = block_config(name, architecture(q_s.device), dtype, head_dim, False)
    config = config._replace(block_n=min(config.block_n, padded_head_dim(head_dim)))
    return config, {"HEAD_DIM_S": q_s.shape[3], "HEAD_DIM_T": q_t.shape[3]}


def _chunk_rows(wanted: int, length: int) -> int:
    """A power of 2, so that few lengths compile a kernel of their own."""
    return min(power_of_two(max(wanted, _LEAST_CHUNK)), power_of_two(length))
