"""KL between the softmax of paired rows in Triton, by the formulas of csrc/cpu/kl_div_logits_loops.h."""

import math

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

_STATS = tl.constexpr(5)  # the largest logits, 1 / sums, log2 of the ratio of the sums
_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(-126.0)  # 2^x is a normal number from here
_IMPOSSIBLE = tl.constexpr(-200.0)  # and 0 here
_NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _exp2_parts(x):
    """For x <= 0: 2^x, 2^x - 1 and 2^x - 1 - x ln 2 with all digits near 0."""
    y = tl.where(x < -0.5, 0.0, x)
    curve = 1.53458121613e-4 * y + 1.33999311772e-3
    curve = curve * y + 9.61848895633e-3
    curve = curve * y + 5.55032877711e-2
    curve = curve * y + 2.40226468906e-1
    less_one = (curve * y + _LN2) * y
    far = tl.exp2(x)
    value = tl.where(x < -0.5, far, less_one + 1.0)
    less_one = tl.where(x < -0.5, far - 1.0, less_one)
    return value, less_one, tl.where(x < -0.5, less_one - x * _LN2, curve * y * y)


@triton.jit
def _logits(
    s,
    t,
    top_s,  # (ROWS,)
    top_t,
    unit,
):
    """Both in units of log 2 from their largest; see logits_of in the C++ kernel for impossible classes."""
    a, b = (s - top_s[:, None]) * unit, (t - top_t[:, None]) * unit
    none = b < _LOWEST
    return tl.where(none & (a < _IMPOSSIBLE), _IMPOSSIBLE, a), tl.where(none, _IMPOSSIBLE, b)


@triton.jit
def _log1p_less_x(x):
    """ln(1 + x) - x for |x| <= 1/2, by the series of 2 artanh(s) with s = x / (2 + x)."""
    s = tl.div_rn(x, x + 2.0)
    z = s * s
    series = z * (1 / 15) + 1 / 13
    series = series * z + 1 / 11
    series = series * z + 1 / 9
    series = series * z + 1 / 7
    series = series * z + 1 / 5
    series = series * z + 1 / 3
    return 2.0 * s * z * series - x * s


@compiled
def _fwd_kernel(
    rows,  # (B * N,)
    stats,  # (B * N, _STATS)
    x_s,
    s_strides,
    x_t,
    t_strides,
    mask,
    count,
    N,
    option,  # temperature
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, inside, real = find_rows(mask, count, ROWS)
    from_s, from_t = row_pointers(x_s, s_strides, row, N), row_pointers(x_t, t_strides, row, N)
    top_s = tl.full([ROWS], _NOTHING, tl.float32)
    top_t = tl.full([ROWS], _NOTHING, tl.float32)
    for first in range(0, WIDTH, BLOCK):
        s = load_columns(from_s, real, first, _NOTHING, WIDTH, BLOCK)
        t = load_columns(from_t, real, first, _NOTHING, WIDTH, BLOCK)
        top_s, top_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(t, 1))
    unit = _LOG2E / option
    student = tl.zeros([ROWS], tl.float32)
    teacher = tl.zeros([ROWS], tl.float32)
    drift = tl.zeros([ROWS], tl.float32)
    bend = tl.zeros([ROWS], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        s = load_columns(from_s, real, first, _NOTHING, WIDTH, BLOCK)
        t = load_columns(from_t, real, first, _NOTHING, WIDTH, BLOCK)
        a, b = _logits(s, t, top_s, top_t, unit)
        v = a - b
        student_larger = v > 0
        u = tl.where(student_larger, -v, v)
        larger = tl.exp2(tl.where(student_larger, a, b))
        value, less_one, less_line = _exp2_parts(u)
        smaller = larger * value
        exp_t = tl.where(student_larger, smaller, larger)
        student += tl.sum(tl.where(student_larger, larger, smaller), 1)
        teacher += tl.sum(exp_t, 1)
        drift += tl.sum(exp_t * v, 1)
        bend += tl.sum(larger * tl.where(student_larger, u * _LN2 * less_one - less_line, less_line), 1)
    drift, bend = tl.div_rn(drift, teacher) * _LN2, tl.div_rn(bend, teacher)
    x = bend + drift
    close = (bend < 0.25) & (tl.abs(drift) < 0.25)
    rest = _log1p_less_x(tl.where(close, x, 0.0))
    log_ratio = tl.where(close, x + rest, tl.log(tl.div_rn(student, teacher)))
    nats = tl.where(close, bend + rest, log_ratio - drift)
    nats = tl.where(nats < 0, 0.0, nats)  # negative by rounding alone
    tl.store(rows + row, tl.where(real, option * option * nats, 0.0), mask=inside)
    to = stats + row * _STATS
    tl.store(to, top_s, mask=inside)
    tl.store(to + 1, top_t, mask=inside)
    tl.store(to + 2, tl.div_rn(1.0, student), mask=inside)
    tl.store(to + 3, tl.div_rn(1.0, teacher), mask=inside)
    tl.store(to + 4, log_ratio * _LOG2E, mask=inside)


@compiled
def _bwd_kernel(
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
    option,  # temperature
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, inside, real = find_rows(mask, count, ROWS)
    from_s, from_t = row_pointers(x_s, s_strides, row, N), row_pointers(x_t, t_strides, row, N)
    known = stats + row * _STATS
    top_s = tl.load(known, mask=real, other=0.0)
    top_t = tl.load(known + 1, mask=real, other=0.0)
    factor = load_upstream(grad_rows, grad_strides, 0, row, N, real) * option
    factor_s = -factor * tl.load(known + 2, mask=real, other=0.0)
    factor_t = factor * tl.load(known + 3, mask=real, other=0.0)
    shift = tl.load(known + 4, mask=real, other=0.0)
    unit = _LOG2E / option
    for first in range(0, WIDTH, BLOCK):
        s = load_columns(from_s, real, first, 0.0, WIDTH, BLOCK)
        t = load_columns(from_t, real, first, 0.0, WIDTH, BLOCK)
        a, b = _logits(s, t, top_s, top_t, unit)
        w = a - b - shift[:, None]
        student_larger = w > 0
        larger = tl.exp2(tl.where(student_larger, a, b))
        _, less_one, _ = _exp2_parts(tl.where(student_larger, -w, w))
        values = larger * less_one * tl.where(student_larger, factor_s[:, None], factor_t[:, None])
        store_columns(grad, row, inside, first, values, WIDTH, BLOCK)


def kl_div_logits_fwd(
    logits_s: Tensor, logits_t: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns rows (1, B, N) and stats; see :func:`bertops.kl_div_logits`."""
    return row_pair_fwd(_fwd_kernel, logits_s, logits_t, mask, temperature, 1, _STATS.value)


def kl_div_logits_bwd(grad_rows: Tensor, *arguments: Tensor) -> Tensor:
    return row_pair_bwd(_bwd_kernel, grad_rows, *arguments)
