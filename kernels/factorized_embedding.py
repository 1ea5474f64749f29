"""factorized_embedding in Triton: one forward kernel, with and without the projection, and its launcher.

The backward is in factorized_embedding_bwd.py, what both share in embedding_rows.py.

With (E, H) = (128, 768), 16384 tokens and bf16 the kernel writes 25.2 MB and reads a word row of 256 bytes
for each token, 4.2 MB; positions, types and A stay in the L2 cache. Beside 30 MB, 7 us at 4.3 TB/s, stand
3.2 GFLOP, 4 us of tensor cores: a program multiplies while others store.
"""

import torch
import triton.language as tl
from torch import Tensor

from bertops._library import accumulator_dtype
from bertops.kernels.embedding_rows import (
    INTERPRETED_ROWS,
    find_rows,
    find_tokens,
    hidden_rows,
    prepare_tokens,
    row_blocks,
    rows_in_place,
    run_tokens,
    sum_rows,
)
from bertops.kernels.factorized_embedding_bwd import factorized_embedding_bwd
from bertops.kernels.launch import (
    INTERPRETER,
    architecture,
    block_config,
    ceil_div,
    compiled,
    padded_head_dim,
)
from bertops.kernels.tiles import load_rows

__all__ = ["factorized_embedding_bwd", "factorized_embedding_fwd"]

_ROW_ELEMENTS = 4096  # of a program without projection
_PROGRAMS = 256  # that blocks of tokens and of columns should at least make together
# The widest rows that a program holds, in half precision and in fp32, and the pieces of wider ones.
_HELD_HALF = 256
_HELD_FP32 = 64
_PIECE = 64


def embedding_fwd_kernel(
    out,  # (B, N, H), or (B, N, E) without a projection
    mean,  # (B, N) fp32
    rstd,  # (B, N) fp32
    projection,  # (H, E) or None
    projection_bias,  # (H,) or None
    part_blocks,  # of columns, of a program on axis 1
    eps,
    ids,  # (B, N) each: of words, of positions or None, of token types or None
    id_strides,  # of B, N, for each of ids
    cu_seqlens,  # (num_sequences + 1,) int32 or None
    tables,  # (V, E), (P, E) or None, (T, E) or None
    table_rows,  # V, P, T
    norm_weight,  # (E,) or None
    norm_bias,  # (E,) or None
    seed,  # (1,) int64 or None
    tokens,  # B * N
    N,
    num_sequences,
    search,
    threshold,  # least word that keeps an element, as int32 bits
    kept_scale,  # 1 / (1 - dropout_p)
    STRIDES: tl.constexpr,  # of a row, for each of tables
    PROJECTION_STRIDE: tl.constexpr,  # of a row
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # A block of tokens is normalized in registers and stays there for all of its columns. Rows wider than
    # BLOCK_E do not fit: their pieces are gathered and normalized again for every block of columns.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    inside, batch, column, sequence, position = find_tokens(
        first, tokens, cu_seqlens, N, num_sequences, search, BLOCK_M, HAS_DROPOUT or ids[1] is None
    )
    rows, real = find_rows(ids, id_strides, tables, table_rows, batch, column, position, inside)
    dropout = None
    if HAS_DROPOUT:
        dropout = (tl.load(seed), sequence, position, threshold, tl.cast(kept_scale, tl.float32))

    elements = tl.arange(0, BLOCK_E)
    x = sum_rows(tables, rows, real, elements, STRIDES, WIDTH)
    total = tl.sum(x, 1)
    for e in range(BLOCK_E, WIDTH, BLOCK_E):
        total += tl.sum(sum_rows(tables, rows, real, e + elements, STRIDES, WIDTH), 1)
    row_mean = total / WIDTH
    centred = tl.where((elements < WIDTH)[None, :], x - row_mean[:, None], 0.0)
    squares = tl.sum(centred * centred, 1)
    for e in range(BLOCK_E, WIDTH, BLOCK_E):
        rest = sum_rows(tables, rows, real, e + elements, STRIDES, WIDTH) - row_mean[:, None]
        rest = tl.where((e + elements < WIDTH)[None, :], rest, 0.0)
        squares += tl.sum(rest * rest, 1)
    row_rstd = 1.0 / tl.sqrt_rn(squares / WIDTH + tl.cast(eps, tl.float32))
    if tl.program_id(1) == 0:
        tl.store(mean + first + tl.arange(0, BLOCK_M), row_mean, mask=inside)
        tl.store(rstd + first + tl.arange(0, BLOCK_M), row_rstd, mask=inside)

    out += first * HEIGHT
    out_rows = tl.arange(0, BLOCK_M)[:, None] * HEIGHT
    if WIDTH <= BLOCK_E:
        hat = centred * row_rstd[:, None]
        y = hidden_rows(hat, norm_weight, norm_bias, dropout, 0, WIDTH, BLOCK_M, BLOCK_E)
    if projection is None:
        mask = inside[:, None] & (elements < WIDTH)[None, :]
        tl.store(out + out_rows + elements[None, :], y.to(out.dtype.element_ty), mask=mask)
    else:
        CHECK: tl.constexpr = HEIGHT % BLOCK_N != 0
        part_columns = part_blocks * BLOCK_N  # a constant times: the compiler keeps in mind what divides it
        begin = tl.program_id(1) * part_columns
        if WIDTH <= BLOCK_E:
            y = y.to(projection.dtype.element_ty)
        for step in range(0, tl.minimum(part_columns, HEIGHT - begin), BLOCK_N):
            h = begin + step
            columns = h + tl.arange(0, BLOCK_N)
            exists = columns < HEIGHT
            a_rows = projection + h.to(tl.int64) * PROJECTION_STRIDE
            if WIDTH <= BLOCK_E:
                a = load_rows(a_rows, PROJECTION_STRIDE, exists, WIDTH, BLOCK_E, BLOCK_N, CHECK)
                projected = tl.dot(y, tl.trans(a), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            else:
                projected = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                a_places = tl.arange(0, BLOCK_N)[:, None] * PROJECTION_STRIDE + elements[None, :]
                for e in range(0, WIDTH, BLOCK_E):
                    x = sum_rows(tables, rows, real, e + elements, STRIDES, WIDTH)
                    hat = (x - row_mean[:, None]) * row_rstd[:, None]
                    hat = tl.where((e + elements < WIDTH)[None, :], hat, 0.0)
                    y = hidden_rows(hat, norm_weight, norm_bias, dropout, e, WIDTH, BLOCK_M, BLOCK_E)
                    mask = exists[:, None] & (e + elements < WIDTH)[None, :]
                    a = tl.load(a_rows + e + a_places, mask=mask, other=0.0)
                    projected = tl.dot(y.to(a.dtype), tl.trans(a), projected, input_precision="ieee")
            if projection_bias is not None:
                c = tl.load(projection_bias + columns, mask=exists, other=0.0)
                projected += c.to(tl.float32)[None, :]
            mask = inside[:, None]
            if CHECK:
                mask = mask & exists[None, :]
            tl.store(out + out_rows + columns[None, :], projected.to(out.dtype.element_ty), mask=mask)


_kernel = compiled(embedding_fwd_kernel)


def factorized_embedding_fwd(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    projection: Tensor | None,
    projection_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (B, N, H), mean (B, N) and rstd (B, N); see :func:`bertops.factorized_embedding`."""
    width = word.shape[1]
    last = word if projection is None else projection
    height = width if projection is None else projection.shape[0]
    out = last.new_empty((*input_ids.shape, height))
    mean = word.new_empty(input_ids.shape, dtype=accumulator_dtype(word.dtype))
    rstd = mean.new_empty(mean.shape)
    tokens = input_ids.numel()
    if tokens == 0:
        return out, mean, rstd
    ids, tables = (input_ids, position_ids, token_type_ids), (word, position, token_type)
    arguments, flags = prepare_tokens(ids, cu_seqlens, tables, norm_weight, norm_bias, dropout_p, seed)
    parts, part_blocks, stride = 1, 1, 0
    if projection is None:
        blocks = {**row_blocks(architecture(word.device), width, _ROW_ELEMENTS), "BLOCK_N": 16}
    else:
        projection = rows_in_place(projection)
        stride = projection.stride(0)
        projection_bias = None if projection_bias is None else projection_bias.contiguous()
        blocks = projection_blocks(architecture(word.device), projection.dtype, width, dropout_p > 0)
        columns = ceil_div(height, blocks["BLOCK_N"])
        parts = min(columns, ceil_div(_PROGRAMS, ceil_div(tokens, blocks["BLOCK_M"])))
        part_blocks = ceil_div(columns, parts)
        parts = ceil_div(columns, part_blocks)
    run_tokens(
        _kernel,
        (ceil_div(tokens, blocks["BLOCK_M"]), parts),
        word,
        (out, mean, rstd, projection, projection_bias, part_blocks, float(eps), *arguments),
        # debug alone compiles device_assert in; it would check every sum of integers for overflow too
        {**flags, **blocks, "PROJECTION_STRIDE": stride, "HEIGHT": height, **STOPS},
    )
    return out, mean, rstd


STOPS = {"debug": True, "sanitize_overflow": False}


def projection_blocks(arch: int, dtype: torch.dtype, width: int, dropout: bool) -> dict[str, int]:
    config = block_config("embedding_fwd", arch, dtype, width, dropout)
    if arch == INTERPRETER:
        config = config._replace(block_m=INTERPRETED_ROWS)
    held = _HELD_FP32 if dtype == torch.float32 else _HELD_HALF
    block_e = padded_head_dim(width)
    return {**config.meta(), "BLOCK_E": block_e if block_e <= held else _PIECE}
