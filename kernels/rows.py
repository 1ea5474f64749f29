"""What the kernels over paired rows share: a program goes over its ROWS rows in blocks of columns."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertops.kernels.launch import BlockConfig, ceil_div, power_of_two

TILE = 4096  # elements that a program holds of either model at a time


@triton.jit
def find_rows(
    mask,  # (B, N) bool, contiguous, or None
    count,  # B * N
    ROWS: tl.constexpr,
):
    """(ROWS,) int64 row, and bool: inside, and real."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    real = inside
    if mask is not None:
        real = real & (tl.load(mask + row, mask=inside, other=0) != 0)
    return row, inside, real


@triton.jit
def row_pointers(
    x,  # (B, N, WIDTH), last stride 1
    strides,  # of B and N
    row,
    N,
):
    return x + (row // N) * strides[0] + (row % N) * strides[1]


@triton.jit
def load_columns(
    pointers,  # (ROWS,)
    real,  # (ROWS,) bool
    first,
    rest,  # what stands behind the end of a row, and in rows that are not real
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(ROWS, BLOCK) in fp32, from column ``first`` on."""
    columns = first + tl.arange(0, BLOCK)
    seen = real[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointers[:, None] + columns[None, :], mask=seen, other=rest).to(tl.float32)


@triton.jit
def store_columns(
    grad,  # (B * N, WIDTH), contiguous
    row,
    inside,
    first,
    values,  # (ROWS, BLOCK)
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = first + tl.arange(0, BLOCK)
    stored = inside[:, None] & (columns < WIDTH)[None, :]
    pointers = grad + row[:, None] * WIDTH + columns[None, :]
    tl.store(pointers, values.to(grad.dtype.element_ty), mask=stored)


@triton.jit
def load_upstream(
    grad_rows,  # (losses, B, N)
    strides,
    loss,
    row,
    N,
    real,
):
    """(ROWS,): 0 for a row that is not real, whatever came."""
    pointers = grad_rows + loss * strides[0] + (row // N) * strides[1] + (row % N) * strides[2]
    return tl.load(pointers, mask=real, other=0.0)


def row_pair_fwd(
    kernel: Any,
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    option: float,
    losses: int,
    numbers: int,
    **flags: Any,
) -> tuple[Tensor, Tensor]:
    """Returns rows (losses, B, N) and stats (B, N, numbers), both fp32."""
    rows = x_s.new_empty((losses, *x_s.shape[:2]), dtype=torch.float32)
    stats = rows.new_empty((*x_s.shape[:2], numbers))
    launch(kernel, (rows, stats), x_s, x_t, mask, option, flags)
    return rows, stats


def row_pair_bwd(
    kernel: Any,
    grad_rows: Tensor,
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    option: float,
    stats: Tensor,
    **flags: Any,
) -> Tensor:
    """Returns the gradient (B, N, WIDTH) of the student."""
    grad = x_s.new_empty(x_s.shape)
    launch(kernel, (grad_rows, grad_rows.stride(), stats, grad), x_s, x_t, mask, option, flags)
    return grad


def row_blocks(width: int) -> BlockConfig:
    """Rows and columns that a program holds at a time."""
    block = min(TILE, max(16, power_of_two(width)))
    return BlockConfig(max(1, TILE // 4 // block), block, 8 if block == TILE else 4, 3)


def launch(
    kernel: Any,
    own: tuple,
    x_s: Tensor,
    x_t: Tensor,
    mask: Tensor | None,
    option: float,
    flags: dict[str, Any],
) -> None:
    batch, length, width = x_s.shape
    count = batch * length
    if count == 0:
        return
    x_s, x_t = (x if x.stride(-1) == 1 else x.contiguous() for x in (x_s, x_t))
    mask = None if mask is None else mask.contiguous()
    config = row_blocks(width)
    sizes = {"WIDTH": width, "BLOCK": config.block_n, "ROWS": config.block_m, "num_warps": config.num_warps}
    pair = x_s, x_s.stride()[:2], x_t, x_t.stride()[:2], mask, count, length, float(option)
    with torch.cuda.device_of(x_s):
        kernel[(ceil_div(count, config.block_m),)](*own, *pair, **flags, **sizes)
