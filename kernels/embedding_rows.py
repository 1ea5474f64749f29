"""What the kernels of factorized_embedding share: tokens and their rows, LayerNorm, dropout, launches.

Three tables come as tuples, in the order word, position, token type; the last two may be None.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertops.kernels.launch import INTERPRETER, MAX_TILE_STRIDE, padded_head_dim
from bertops.kernels.tiles import words_kept
from bertops.reference import dropout_threshold

INTERPRETED_ROWS = 64
_MAX_ROW = 2048  # elements that four warps hold


@triton.jit
def find_tokens(
    first,  # of the block, int64
    tokens,  # B * N
    cu_seqlens,  # (num_sequences + 1,) int32 or None
    N,
    num_sequences,
    search,  # a power of 2 above num_sequences
    BLOCK_M: tl.constexpr,
    FIND: tl.constexpr,
):
    """Where a block's tokens are, each (BLOCK_M,): inside, batch, column, sequence and position in it.

    Without FIND packed tokens are not looked up: sequence and position are batch and column.
    """
    rows = tl.arange(0, BLOCK_M)
    inside = first + rows < tokens
    column = (first % N).to(tl.int32) + rows
    batch = (first // N).to(tl.int32) + column // N
    column = column % N
    sequence = batch
    position = column
    if FIND and cu_seqlens is not None:
        sequence = tl.zeros([BLOCK_M], tl.int32)  # the last one that starts at or before the column
        step = search // 2
        while step > 0:
            later = sequence + step
            exists = later <= num_sequences
            start = tl.load(cu_seqlens + later, mask=exists, other=0)
            sequence = tl.where(exists & (start <= column), later, sequence)
            step = step // 2
        position = column - tl.load(cu_seqlens + sequence)
    return inside, batch, column, sequence, position


@triton.jit
def _find_row(
    ids,  # (B, N) int32 or int64, or None
    batch_stride,
    column_stride,
    default,  # (BLOCK_M,): the row where ids is None
    count,  # of rows
    batch,
    column,
    real,  # (BLOCK_M,) bool
    MESSAGE: tl.constexpr,
):
    if ids is None:
        row = default.to(tl.int64)
    else:
        place = batch.to(tl.int64) * batch_stride + column.to(tl.int64) * column_stride
        row = tl.load(ids + place, mask=real, other=0).to(tl.int64)
    exists = (row >= 0) & (row < count)
    tl.device_assert(exists, MESSAGE, mask=real)
    return row, real & exists


@triton.jit
def find_rows(
    ids,  # (B, N) each; the last two may be None
    id_strides,  # of B, N, for each of ids
    tables,  # (rows, E) each
    table_rows,
    batch,
    column,
    position,  # (BLOCK_M,): the row of the position table where there are no ids
    inside,  # (BLOCK_M,) bool
):
    """Three rows for each token, (BLOCK_M,) int64, and the tokens that have all of them.

    A kernel that is launched with debug=True stops at the first token that has not.
    """
    word_row, real = _find_row(
        ids[0], id_strides[0], id_strides[1], column, table_rows[0], batch, column, inside,
        "bertops: every one of input_ids must be a row of word",
    )  # fmt: skip
    position_row = word_row
    if tables[1] is not None:
        position_row, real = _find_row(
            ids[1], id_strides[2], id_strides[3], position, table_rows[1], batch, column, real,
            "bertops: every one of position_ids must be a row of position",
        )  # fmt: skip
    type_row = word_row
    if tables[2] is not None:
        type_row, real = _find_row(
            ids[2], id_strides[4], id_strides[5], column * 0, table_rows[2], batch, column, real,
            "bertops: every one of token_type_ids must be a row of token_type",
        )  # fmt: skip
    return (word_row, position_row, type_row), real


@triton.jit
def sum_rows(
    tables,  # (rows, E) each
    rows,  # (BLOCK_M,) int64 each
    real,  # (BLOCK_M,) bool
    elements,  # (BLOCK_E,)
    STRIDES: tl.constexpr,  # of a row, for each of tables
    WIDTH: tl.constexpr,
):
    """(BLOCK_M, BLOCK_E) fp32: x, 0 for tokens that are not real and from WIDTH on."""
    mask = real[:, None] & (elements < WIDTH)[None, :]
    pointers = (tables[0] + rows[0] * STRIDES[0])[:, None] + elements[None, :]
    x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, 3):
        if tables[i] is not None:
            pointers = (tables[i] + rows[i] * STRIDES[i])[:, None] + elements[None, :]
            x += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def load_vector(
    x,  # (E,) or None
    default,
    elements,  # (BLOCK_E,)
    WIDTH: tl.constexpr,
):
    """(1, BLOCK_E) fp32, or ``default`` where there is none."""
    vector = default
    if x is not None:
        vector = tl.load(x + elements, mask=elements < WIDTH, other=0.0).to(tl.float32)[None, :]
    return vector


@triton.jit
def drop(
    x,  # (BLOCK_M, BLOCK_E) fp32
    dropout,  # seed, sequence (BLOCK_M,), position (BLOCK_M,), threshold, kept_scale; or None
    first,  # element, a multiple of 4
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Z o x: word e % 4 of Philox4x32-10 at the counter (e // 4, i, 0, sequence) decides about element e."""
    if dropout is not None:
        groups = first // 4 + tl.arange(0, BLOCK_E // 4)
        w0, w1, w2, w3 = tl.philox(dropout[0], groups[None, :], dropout[2][:, None], 0, dropout[1][:, None])
        keep = words_kept(w0, w1, w2, w3, dropout[3]).reshape(BLOCK_M, BLOCK_E)
        x = tl.where(keep, x * dropout[4], 0.0)
    return x


@triton.jit
def hidden_rows(
    hat,  # (BLOCK_M, BLOCK_E) fp32: x normalized
    norm_weight,  # (E,) or None
    norm_bias,  # (E,) or None
    dropout,  # see drop
    first,  # element
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(BLOCK_M, BLOCK_E) fp32: y."""
    elements = first + tl.arange(0, BLOCK_E)
    y = hat * load_vector(norm_weight, 1.0, elements, WIDTH) + load_vector(norm_bias, 0.0, elements, WIDTH)
    return drop(y, dropout, first, BLOCK_M, BLOCK_E)


def prepare_tokens(
    ids: tuple[Tensor | None, ...],
    cu_seqlens: Tensor | None,
    tables: tuple[Tensor | None, ...],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[tuple, dict[str, Any]]:
    """What every kernel takes after its own tensors: the arguments from ``ids`` on, and its flags."""
    input_ids, word = ids[0], tables[0]
    assert input_ids is not None and word is not None
    tables = tuple(None if x is None else rows_in_place(x) for x in tables)
    num_sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    threshold = dropout_threshold(dropout_p)
    arguments = (
        ids,
        tuple(stride for x in ids for stride in _id_strides(x)),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        tables,
        tuple(0 if x is None else x.shape[0] for x in tables),
        *(None if x is None else x.contiguous() for x in (norm_weight, norm_bias)),
        seed if dropout_p > 0 else None,
        input_ids.numel(),
        input_ids.shape[1],
        num_sequences,
        2 ** num_sequences.bit_length(),
        threshold - 2**32 if threshold >= 2**31 else threshold,
        1 / (1 - dropout_p),
    )
    strides = tuple(0 if x is None else x.stride(0) for x in tables)
    return arguments, {"STRIDES": strides, "WIDTH": word.shape[1], "HAS_DROPOUT": dropout_p > 0}


def row_blocks(arch: int, width: int, elements: int) -> dict[str, int]:
    """Blocks of whole rows with about that many elements, and their warps."""
    block_e = padded_head_dim(width)
    block_m = max(1, elements // block_e)
    if arch == INTERPRETER:
        block_m = INTERPRETED_ROWS
    return {"BLOCK_M": block_m, "BLOCK_E": block_e, "num_warps": 4 if block_e <= _MAX_ROW else 8}


def run_tokens(
    kernel: Any, grid: tuple[int, ...], like: Tensor, arguments: tuple, options: dict[str, Any]
) -> None:
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **options, enable_fp_fusion=True)


def rows_in_place(x: Tensor) -> Tensor:
    """``x`` (rows, E) itself where the kernels can read it where it lies, a copy otherwise."""
    dense = x.stride(1) == 1 or x.shape[1] == 1
    return x if dense and x.stride(0) < MAX_TILE_STRIDE else x.contiguous()


def _id_strides(ids: Tensor | None) -> tuple[int, int]:
    if ids is None:
        return 0, 0
    return 0 if ids.shape[0] == 1 else ids.stride(0), ids.stride(1)
