"""Losses between paired hidden states in Triton: the forward keeps a few numbers a row, from which the
backward forms the gradient element by element. The formulas are those of csrc/cpu/row_pair_losses_loops.h.
"""

import triton
import triton.language as tl
from torch import Tensor

from bertops.kernels.launch import compiled
from bertops.kernels.rows import (
    find_rows,
    load_columns,
    load_upstream,
    row_pair_bwd,
    row_pair_fwd,
    row_pointers,
    store_columns,
)

_DIRECTION_STATS = tl.constexpr(3)  # 1 / |s|, |s| / |t|, (s - ratio t) . s / |s|^2
_FEATURE_STATS = tl.constexpr(7)  # means, 1 / deviation of s, ratio of deviations, along, mean of s - t, sign


@compiled
def _direction_fwd(
    rows,  # (B * N,)
    stats,  # (B * N, _DIRECTION_STATS)
    x_s,
    s_strides,
    x_t,
    t_strides,
    mask,
    count,
    N,
    option,  # a vector shorter than this counts as zero
    COSINE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, inside, real = find_rows(mask, count, ROWS)
    from_s, from_t = row_pointers(x_s, s_strides, row, N), row_pointers(x_t, t_strides, row, N)
    square_s = tl.zeros([ROWS], tl.float32)
    square_t = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        s = load_columns(from_s, real, first, 0.0, WIDTH, BLOCK)
        t = load_columns(from_t, real, first, 0.0, WIDTH, BLOCK)
        square_s += tl.sum(s * s, 1)
        square_t += tl.sum(t * t, 1)
    length_s, length_t = tl.sqrt_rn(square_s), tl.sqrt_rn(square_t)
    zero_s, zero_t = length_s < option, length_t < option
    zero = zero_s | zero_t
    ratio = tl.where(zero, 0.0, tl.div_rn(length_s, tl.where(zero_t, 1.0, length_t)))
    distance = tl.zeros([ROWS], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        s = load_columns(from_s, real, first, 0.0, WIDTH, BLOCK)
        d = s - load_columns(from_t, real, first, 0.0, WIDTH, BLOCK) * ratio[:, None]
        distance += tl.sum(d * d, 1)
        along += tl.sum(d * s, 1)
    one = tl.where(zero_s, 1.0, square_s)
    distance, along = tl.div_rn(distance, one), tl.div_rn(along, one)
    if COSINE:
        loss = tl.where(zero, 1.0, distance / 2)
    else:
        loss = tl.where(zero, tl.where(zero_s & zero_t, 0.0, 1.0), distance)
    tl.store(rows + row, tl.where(real, loss, 0.0), mask=inside)
    to = stats + row * _DIRECTION_STATS
    tl.store(to, tl.where(zero_s, 0.0, tl.div_rn(1.0, tl.where(zero_s, 1.0, length_s))), mask=inside)
    tl.store(to + 1, ratio, mask=inside)
    tl.store(to + 2, tl.where(zero, 1.0, along), mask=inside)


@compiled
def _direction_bwd(
    grad_rows,
    grad_strides,
    stats,
    grad,
    x_s,
    s_strides,
    x_t,
    t_strides,
    mask,
    count,
    N,
    option,
    COSINE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, inside, real = find_rows(mask, count, ROWS)
    from_s, from_t = row_pointers(x_s, s_strides, row, N), row_pointers(x_t, t_strides, row, N)
    known = stats + row * _DIRECTION_STATS
    inverse = tl.load(known, mask=real, other=0.0)
    ratio = tl.load(known + 1, mask=real, other=0.0)[:, None]
    along = tl.load(known + 2, mask=real, other=0.0)[:, None]
    factor = load_upstream(grad_rows, grad_strides, 0, row, N, real) * inverse * inverse
    if not COSINE:
        factor *= 2
    for first in range(0, WIDTH, BLOCK):
        s = load_columns(from_s, real, first, 0.0, WIDTH, BLOCK)
        d = s - load_columns(from_t, real, first, 0.0, WIDTH, BLOCK) * ratio
        store_columns(grad, row, inside, first, (d - s * along) * factor[:, None], WIDTH, BLOCK)


@triton.jit
def _centered(
    pointers,
    real,
    first,
    mean,  # (ROWS,)
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(ROWS, BLOCK): distances to the mean, 0 behind the end of a row."""
    x = load_columns(pointers, real, first, 0.0, WIDTH, BLOCK) - mean[:, None]
    return tl.where((first + tl.arange(0, BLOCK) < WIDTH)[None, :], x, 0.0)


@compiled
def _feature_fwd(
    rows,  # (3, B * N)
    stats,  # (B * N, _FEATURE_STATS)
    x_s,
    s_strides,
    x_t,
    t_strides,
    mask,
    count,
    N,
    option,  # eps
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, inside, real = find_rows(mask, count, ROWS)
    from_s, from_t = row_pointers(x_s, s_strides, row, N), row_pointers(x_t, t_strides, row, N)
    sum_s = tl.zeros([ROWS], tl.float32)
    sum_t = tl.zeros([ROWS], tl.float32)
    difference = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        s = load_columns(from_s, real, first, 0.0, WIDTH, BLOCK)
        t = load_columns(from_t, real, first, 0.0, WIDTH, BLOCK)
        sum_s += tl.sum(s, 1)
        sum_t += tl.sum(t, 1)
        difference += tl.sum(s - t, 1)
    width = tl.full([ROWS], WIDTH, tl.float32)
    mean_s, mean_t = tl.div_rn(sum_s, width), tl.div_rn(sum_t, width)
    difference = tl.div_rn(difference, width)
    square_s = tl.zeros([ROWS], tl.float32)
    square_t = tl.zeros([ROWS], tl.float32)
    between = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        s = _centered(from_s, real, first, mean_s, WIDTH, BLOCK)
        t = _centered(from_t, real, first, mean_t, WIDTH, BLOCK)
        square_s += tl.sum(s * s, 1)
        square_t += tl.sum(t * t, 1)
        between += tl.sum((s - t) * (s + t), 1)
    variance_s, variance_t = tl.div_rn(square_s, width) + option, tl.div_rn(square_t, width) + option
    between = tl.div_rn(between, width)
    ratio = tl.sqrt_rn(tl.div_rn(variance_s, variance_t))
    distance = tl.zeros([ROWS], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        s = _centered(from_s, real, first, mean_s, WIDTH, BLOCK)
        d = s - _centered(from_t, real, first, mean_t, WIDTH, BLOCK) * ratio[:, None]
        distance += tl.sum(d * d, 1)
        along += tl.sum(d * s, 1)
    scale = variance_s * width
    tl.store(rows + row, tl.where(real, tl.div_rn(distance, scale), 0.0), mask=inside)
    tl.store(rows + count + row, tl.where(real, difference * difference, 0.0), mask=inside)
    tl.store(rows + 2 * tl.cast(count, tl.int64) + row, tl.where(real, tl.abs(between), 0.0), mask=inside)
    to = stats + row * _FEATURE_STATS
    tl.store(to, mean_s, mask=inside)
    tl.store(to + 1, mean_t, mask=inside)
    tl.store(to + 2, tl.div_rn(1.0, tl.sqrt_rn(variance_s)), mask=inside)
    tl.store(to + 3, ratio, mask=inside)
    tl.store(to + 4, tl.div_rn(along, scale), mask=inside)
    tl.store(to + 5, difference, mask=inside)
    tl.store(to + 6, tl.where(between > 0, 1.0, tl.where(between < 0, -1.0, 0.0)), mask=inside)


@compiled
def _feature_bwd(
    grad_rows,
    grad_strides,
    stats,
    grad,
    x_s,
    s_strides,
    x_t,
    t_strides,
    mask,
    count,
    N,
    option,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, inside, real = find_rows(mask, count, ROWS)
    from_s, from_t = row_pointers(x_s, s_strides, row, N), row_pointers(x_t, t_strides, row, N)
    known = stats + row * _FEATURE_STATS
    mean_s = tl.load(known, mask=real, other=0.0)
    mean_t = tl.load(known + 1, mask=real, other=0.0)
    inverse = tl.load(known + 2, mask=real, other=0.0)
    ratio = tl.load(known + 3, mask=real, other=0.0)[:, None]
    along = tl.load(known + 4, mask=real, other=0.0)[:, None]
    difference = tl.load(known + 5, mask=real, other=0.0)
    sign = tl.load(known + 6, mask=real, other=0.0)
    normed = load_upstream(grad_rows, grad_strides, 0, row, N, real) * inverse * inverse * (2 / WIDTH)
    mean = load_upstream(grad_rows, grad_strides, 1, row, N, real) * difference * (2 / WIDTH)
    variance = load_upstream(grad_rows, grad_strides, 2, row, N, real) * sign * (2 / WIDTH)
    for first in range(0, WIDTH, BLOCK):
        s = _centered(from_s, real, first, mean_s, WIDTH, BLOCK)
        d = s - _centered(from_t, real, first, mean_t, WIDTH, BLOCK) * ratio
        values = (d - s * along) * normed[:, None] + (s * variance[:, None] + mean[:, None])
        store_columns(grad, row, inside, first, values, WIDTH, BLOCK)


def cosine_loss_fwd(
    hidden_s: Tensor, hidden_t: Tensor, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns rows (1, B, N) and stats; see :func:`bertops.cosine_loss`."""
    return row_pair_fwd(_direction_fwd, hidden_s, hidden_t, mask, eps, 1, _DIRECTION_STATS.value, COSINE=True)


def cosine_loss_bwd(grad_rows: Tensor, *arguments: Tensor) -> Tensor:
    return row_pair_bwd(_direction_bwd, grad_rows, *arguments, COSINE=True)


def normalized_mse_fwd(
    hidden_s: Tensor, hidden_t: Tensor, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns rows (1, B, N) and stats; see :func:`bertops.normalized_mse`."""
    return row_pair_fwd(
        _direction_fwd, hidden_s, hidden_t, mask, eps, 1, _DIRECTION_STATS.value, COSINE=False
    )


def normalized_mse_bwd(grad_rows: Tensor, *arguments: Tensor) -> Tensor:
    return row_pair_bwd(_direction_bwd, grad_rows, *arguments, COSINE=False)


def feature_map_transfer_fwd(
    hidden_s: Tensor, hidden_t: Tensor, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns rows (3, B, N) and stats; see :func:`bertops.feature_map_transfer`."""
    return row_pair_fwd(_feature_fwd, hidden_s, hidden_t, mask, eps, 3, _FEATURE_STATS.value)


def feature_map_transfer_bwd(grad_rows: Tensor, *arguments: Tensor) -> Tensor:
    return row_pair_bwd(_feature_bwd, grad_rows, *arguments)
