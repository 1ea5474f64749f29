"""Backward of factorized_embedding: products by cuBLAS, LayerNorm in Triton, tables in CUDA C++.

With dy = do A from cuBLAS, one kernel makes x-hat again from the tables and writes dx, y for dA = do^T y, and
sums of dy and of dy o x-hat over each program's tokens. csrc/cuda/factorized_embedding.cu sums rows of dx to
rows of tables. Nothing is added atomically: every sum has one order.
"""

import torch
import triton.language as tl
from torch import Tensor

from bertops import _backend, reference
from bertops._library import accumulator_dtype
from bertops.kernels.embedding_rows import (
    drop,
    find_rows,
    find_tokens,
    hidden_rows,
    load_vector,
    prepare_tokens,
    row_blocks,
    run_tokens,
    sum_rows,
)
from bertops.kernels.launch import architecture, ceil_div, compiled

_ROW_ELEMENTS = 2048  # of a block of tokens
_PROGRAMS = 512  # whose sums are added at the end


def embedding_bwd_kernel(
    grad,  # (B * N, E): dy before dropout; or None
    mean,  # (B, N) fp32
    rstd,  # (B, N) fp32
    dx,  # (B * N, E), or None
    y,  # (B * N, E), or None
    parts,  # (programs, 2, E) fp32: of dgamma, of dbeta; or None
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
    WIDTH: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # g = gamma o dy,  dx = rstd (g - mean(g) - x_hat mean(g o x_hat))
    elements = tl.arange(0, BLOCK_E)
    in_row = (elements < WIDTH)[None, :]
    word_seed = 0
    if HAS_DROPOUT:
        word_seed = tl.load(seed)
    kept_scale = tl.cast(kept_scale, tl.float32)
    d_weight = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    d_bias = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.num_programs(0)):
        first = tl.cast(block, tl.int64) * BLOCK_M
        inside, batch, column, sequence, position = find_tokens(
            first, tokens, cu_seqlens, N, num_sequences, search, BLOCK_M, HAS_DROPOUT or ids[1] is None
        )
        rows, real = find_rows(ids, id_strides, tables, table_rows, batch, column, position, inside)
        dropout = None
        if HAS_DROPOUT:
            dropout = (word_seed, sequence, position, threshold, kept_scale)
        row = tl.arange(0, BLOCK_M)
        row_mean = tl.load(mean + first + row, mask=inside, other=0.0)
        row_rstd = tl.load(rstd + first + row, mask=inside, other=0.0)
        x = sum_rows(tables, rows, real, elements, STRIDES, WIDTH)
        hat = tl.where(in_row, (x - row_mean[:, None]) * row_rstd[:, None], 0.0)
        places = first * WIDTH + row[:, None] * WIDTH + elements[None, :]
        mask = inside[:, None] & in_row
        if y is not None:
            hidden = hidden_rows(hat, norm_weight, norm_bias, dropout, 0, WIDTH, BLOCK_M, BLOCK_E)
            tl.store(y + places, hidden.to(y.dtype.element_ty), mask=mask)
        if grad is not None:
            dy = tl.load(grad + places, mask=mask, other=0.0).to(tl.float32)
            dy = drop(dy, dropout, 0, BLOCK_M, BLOCK_E)
            if parts is not None:
                d_weight += dy * hat
                d_bias += dy
            if dx is not None:
                g = dy * load_vector(norm_weight, 1.0, elements, WIDTH)
                g_mean = tl.sum(g, 1) / WIDTH
                along = tl.sum(g * hat, 1) / WIDTH
                values = row_rstd[:, None] * (g - g_mean[:, None] - hat * along[:, None])
                tl.store(dx + places, values.to(dx.dtype.element_ty), mask=mask)
    if parts is not None:
        parts += tl.program_id(0) * (2 * WIDTH) + elements
        tl.store(parts, tl.sum(d_weight, 0), mask=elements < WIDTH)
        tl.store(parts + WIDTH, tl.sum(d_bias, 0), mask=elements < WIDTH)


_kernel = compiled(embedding_bwd_kernel)


def factorized_embedding_bwd(
    grad_out: Tensor,
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
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int | None,
    position_padding_idx: int | None,
    sparse: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Returns the gradients of ``word`` to ``projection_bias``; one that is not wanted is empty."""
    tokens, width = input_ids.numel(), word.shape[1]
    tables = word, position, token_type
    parameters = *tables, norm_weight, norm_bias, projection, projection_bias
    want = [choice and x is not None for choice, x in zip(wanted, parameters, strict=True)]
    grads = [
        x.new_zeros(x.shape) if x is not None and choice and tokens == 0 else word.new_empty((0,))
        for choice, x in zip(want, parameters, strict=True)
    ]
    if tokens == 0:
        if sparse and want[0]:
            grads[0] = word.new_empty((0, width))
        return tuple(grads)

    grad_rows = grad_out.reshape(tokens, grad_out.shape[2]).contiguous()
    grad: Tensor | None = grad_rows
    if projection is not None:
        grad = grad_rows @ projection if any(want[:5]) else None
    dx = word.new_empty((*input_ids.shape, width)) if any(want[:3]) else None
    y = projection.new_empty((tokens, width)) if projection is not None and want[5] else None
    blocks = row_blocks(architecture(word.device), width, _ROW_ELEMENTS)
    programs = min(_PROGRAMS, ceil_div(tokens, blocks["BLOCK_M"]))
    parts = mean.new_empty((programs, 2, width)) if any(want[3:5]) else None
    if any(x is not None for x in (dx, y, parts)):
        ids = input_ids, position_ids, token_type_ids
        arguments, flags = prepare_tokens(ids, cu_seqlens, tables, norm_weight, norm_bias, dropout_p, seed)
        outputs = grad, mean.contiguous(), rstd.contiguous(), dx, y, parts
        run_tokens(_kernel, (programs,), word, (*outputs, *arguments), {**flags, **blocks})
    if parts is not None:
        sums = parts.sum(0).to(word.dtype)
        for i in (3, 4):
            if want[i]:
                grads[i] = sums[i - 3].clone()
    if projection is not None and y is not None:
        grads[5] = grad_rows.t() @ y
    if projection_bias is not None and want[6]:
        grads[6] = grad_rows.sum(0, dtype=accumulator_dtype(grad_rows.dtype)).to(projection_bias.dtype)
    if dx is None:
        return tuple(grads)

    if want[0] and sparse:
        grads[0] = dx.reshape(tokens, width)
        if padding_idx is not None:
            grads[0] = grads[0].masked_fill((input_ids == padding_idx).reshape(tokens, 1), 0)
    elif want[0]:
        grads[0] = _table_grad(dx, input_ids, word, padding_idx)
    if position is not None and want[1]:
        if position_ids is None and cu_seqlens is not None:
            position_ids = reference.default_positions(input_ids, cu_seqlens)
        grads[1] = _table_grad(dx, position_ids, position, position_padding_idx)
    if token_type is not None and want[2]:
        if token_type_ids is None:
            grads[2] = token_type.new_zeros(token_type.shape)
            grads[2][0] = dx.sum((0, 1), dtype=mean.dtype)
        else:
            grads[2] = _table_grad(dx, token_type_ids, token_type, None)
    return tuple(grads)


def _table_grad(dx: Tensor, ids: Tensor | None, table: Tensor, padding_idx: int | None) -> Tensor:
    """(rows, E): sums of dx (B, N, E) by ids (B, N) or (1, N); by columns where there are no ids."""
    if ids is None or ids.shape[0] != dx.shape[0]:
        dx = dx.sum(0, dtype=accumulator_dtype(dx.dtype))
    if ids is None:
        grad = table.new_zeros(table.shape)
        grad[: dx.shape[0]] = dx
        if padding_idx is not None:
            grad[padding_idx] = 0
        return grad
    dx, ids = dx.reshape(-1, dx.shape[-1]), ids.reshape(-1)
    if dx.device.type == "cpu":
        # Under the interpreter, which has no CUDA C++: index_add_ on a CPU goes through the tokens in order.
        sums = dx.new_zeros(table.shape, dtype=accumulator_dtype(dx.dtype))
        sums.index_add_(0, ids, dx.to(sums.dtype))
        if padding_idx is not None:
            sums[padding_idx] = 0
        return sums.to(table.dtype)
    if not _backend.extension_has_cuda:
        raise RuntimeError(
            "factorized_embedding: gradients of tables on a GPU need bertops._C with CUDA: "
            + (_backend.extension_error or "it was built without")
        )
    rows = table.shape[0]
    # fewer bits to sort by
    narrow = torch.uint8 if rows <= 2**8 else torch.int16 if rows <= 2**15 else torch.int32
    order = torch.sort(ids.to(narrow), stable=True).indices
    return torch.ops.bertops._embedding_table_grad(dx, ids, order, rows, padding_idx, table.dtype)
