"""Attention scores of a student and a teacher compared in Triton: the forward kernel and what all share.

One family serves attention_kl, relation_kl and the direct form of attention_score_mse; LOSS says which:

    "kl"        KL of every row and both lse, found in one pass
    "kl_given"  the same where both lse are known: one exp fewer for every pair
    "mse"       the sum over the keys of (S - T)^2

The backward is in pairs_bwd.py. In half precision exponents count in powers of 2 (the launcher puts log2(e)
into the slopes), in fp32, EXACT, in powers of e.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertops.kernels.launch import (
    architecture,
    block_config,
    in_place,
    padded_head_dim,
    prepare_sequences,
    run,
    tunable,
)
from bertops.kernels.tiles import (
    exact_exp,
    find_block,
    first_row,
    load_real,
    load_rows,
    visible_range,
)

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
_NO_KEY = tl.constexpr(-1e30)  # below every score; unlike -inf it can be subtracted from itself
_LOWEST = tl.constexpr(-3e38)
_INVERSE_FACTORIALS = tl.constexpr(tuple(1 / math.factorial(n) for n in range(8, 0, -1)))


@triton.jit
def power(
    x,
    EXACT: tl.constexpr,
):
    """e^x to about 1 ulp with EXACT, else 2^x."""
    return exact_exp(x) if EXACT else tl.exp2(x)


@triton.jit
def exp_difference(
    exp_s,  # exp(x + gap)
    exp_t,  # exp(x)
    gap,
):
    """exp_s - exp_t, with all digits of a small gap."""
    series = 1.0 / 362880
    for factor in tl.static_range(8):  # 1/8! + gap / 9!, 1/7! + gap / 8! + ..., down to 1 + gap / 2 + ...
        series = series * gap + _INVERSE_FACTORIALS[factor]
    return tl.where(tl.abs(gap) < 0.5, exp_t * gap * series, exp_s - exp_t)


@triton.jit
def log_ratio(
    total_s,
    total_t,
    excess,  # total_s - total_t
):
    """log(total_s / total_t), with all digits where they are close."""
    x = excess / total_t
    y = x / (2 + x)
    square = y * y
    series = 1.0 / 17
    for step in tl.static_range(8):  # 2 atanh(y) = 2 (y + y^3 / 3 + y^5 / 5 + ...)
        series = series * square + 1.0 / (15 - 2 * step)
    return tl.where(tl.abs(x) < 0.5, 2 * y * series, tl.log(total_s / total_t))


@triton.jit
def log_prob(
    s,  # fp32
    slope,
    shift,  # fp32
    EXACT: tl.constexpr,
):
    """slope * s - shift, for a shift that is the largest slope * s, or with less care an lse.

    With EXACT the product is rounded before the subtraction, as it was when it became the largest: their
    difference is 0 whatever the size of the scores, in every kernel.
    """
    product = s * slope
    if EXACT:
        product = tl.where(product < _LOWEST, _LOWEST, product)  # keeps the compiler from fusing the two
    return product - shift


@triton.jit
def load_block(
    x,  # at row 0
    stride,  # of a row
    row,  # first of the block
    real,  # (BLOCK,) bool, not looked at unless CHECK
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):
    """(BLOCK, BLOCK_D): rows that are not real, and dims from HEAD_DIM on, come as 0."""
    return load_rows(x + tl.cast(row, tl.int64) * stride, stride, real, HEAD_DIM, BLOCK_D, BLOCK, CHECK)


def pair_fwd_kernel(
    q_s,  # (B, H, N, D_s)
    k_s,  # (B, H, N, D_s)
    q_t,  # (B, H, N, D_t)
    k_t,  # (B, H, N, D_t)
    given_s,  # (B, H, N) fp32: lse, or None
    given_t,  # (B, H, N) fp32: lse, or None
    rows,  # (B, H, N) fp32: the loss
    lse_s,  # (B, H, N) fp32, or None for "mse"
    lse_t,  # (B, H, N) fp32, or None for "mse"
    near,  # (B, H, N) fp32, or None: see fp32_parts
    far,  # (B, H, N) fp32, or None
    q_s_strides,  # of B, H, N
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
):
    # With a = T - shift_t, b = S - shift_s, where any shifts of a row serve:
    # KL = sum_j e^a (a - b) / l_t + ln(l_s / l_t),  l_t = sum_j e^a,  l_s = sum_j e^b.
    # The shifts are the maxima so far; when they move, l shrinks and so does acc = sum_j e^a (a - b), whose
    # differences a - b all change by the same amount. Nothing of the size of a score or an lse cancels.
    # With EXACT, excess = l_s - l_t is a sum of its own: near convergence ln(l_s / l_t) would else have no
    # digits but those of 1. Given both lse, they are the shifts and KL = acc.
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
    # The maximum is taken before scaling, so a negative scale moves into q, where negation is exact.
    q_s_rows = tl.where(slope_s < 0, -q_s_rows, q_s_rows)
    q_t_rows = tl.where(slope_t < 0, -q_t_rows, q_t_rows)
    slope_s = tl.abs(slope_s)
    slope_t = tl.abs(slope_t)
    k_s = first_row(k_s, k_s_strides, batch, head, origin)
    k_t = first_row(k_t, k_t_strides, batch, head, origin)

    stat_rows = (tl.cast(batch, tl.int64) * H + head) * N + row + tl.arange(0, BLOCK_M)
    unit = 1.0 if EXACT else _LOG2E
    natural = 1.0 if EXACT else _LN2
    shift_s = tl.full([BLOCK_M], _NO_KEY, tl.float32)
    shift_t = tl.full([BLOCK_M], _NO_KEY, tl.float32)
    if given_s is not None:
        shift_s = tl.load(given_s + stat_rows, mask=real, other=0.0) * unit
        shift_t = tl.load(given_t + stat_rows, mask=real, other=0.0) * unit
    total_s = tl.zeros([BLOCK_M], tl.float32)
    total_t = tl.zeros([BLOCK_M], tl.float32)
    excess = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M], tl.float32)

    for CHECK in tl.static_range(2):
        start = dense if CHECK else begin
        stop = end if CHECK else dense
        # counted from a constant: Triton 3.9 does not pipeline a loop that starts where another one ended
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
            if LOSS == "mse":
                gap = s * slope_s - t * slope_t  # 0 where a key is not real: its rows came as 0
                acc += tl.sum(gap * gap, 1)
            elif LOSS == "kl_given":
                a = log_prob(t, slope_t, shift_t[:, None], EXACT)
                b = log_prob(s, slope_s, shift_s[:, None], EXACT)
                p = power(a, EXACT)
                if CHECK:
                    p = tl.where(real_keys[None, :], p, 0.0)
                acc += tl.sum(p * (a - b), 1)
            else:
                visible_s = s
                visible_t = t
                if CHECK:
                    visible_s = tl.where(real_keys[None, :], s, float("-inf"))
                    visible_t = tl.where(real_keys[None, :], t, float("-inf"))
                new_s = tl.maximum(shift_s, tl.max(visible_s, 1) * slope_s)
                new_t = tl.maximum(shift_t, tl.max(visible_t, 1) * slope_t)
                a = log_prob(t, slope_t, new_t[:, None], EXACT)
                b = log_prob(s, slope_s, new_s[:, None], EXACT)
                p_t = power(a, EXACT)
                p_s = power(b, EXACT)
                if CHECK:
                    p_t = tl.where(real_keys[None, :], p_t, 0.0)
                    p_s = tl.where(real_keys[None, :], p_s, 0.0)
                moved_s = shift_s - new_s
                moved_t = shift_t - new_t
                shrink_s = power(moved_s, EXACT)
                shrink_t = power(moved_t, EXACT)
                acc = (acc + (moved_t - moved_s) * total_t) * shrink_t + tl.sum(p_t * (a - b), 1)
                if EXACT:
                    difference = exp_difference(p_s, p_t, b - a)
                    if CHECK:
                        difference = tl.where(real_keys[None, :], difference, 0.0)
                    moved = exp_difference(shrink_s, shrink_t, moved_s - moved_t) * total_t
                    excess = excess * shrink_s + moved + tl.sum(difference, 1)
                total_t = total_t * shrink_t + tl.sum(p_t, 1)
                total_s = total_s * shrink_s + tl.sum(p_s, 1)
                shift_s = new_s
                shift_t = new_t

    total_s = tl.where(real, total_s, 1.0)
    total_t = tl.where(real, total_t, 1.0)
    loss = acc * gain
    if LOSS == "kl":
        loss = acc / total_t * gain
        loss += log_ratio(total_s, total_t, excess) if EXACT else tl.log(total_s / total_t)
        row_lse_s = shift_s * natural + tl.log(total_s)
        row_lse_t = shift_t * natural + tl.log(total_t)
        if near is not None:
            missing = -excess / total_s
            close = tl.abs(missing) < 0.5
            tl.store(near + stat_rows, tl.where(close, 1.0, total_t / total_s), mask=inside)
            tl.store(far + stat_rows, tl.where(close, missing, 0.0), mask=inside)
            loss = 1 / total_t
            row_lse_s = shift_s
            row_lse_t = shift_t
    elif LOSS == "kl_given":
        row_lse_s = tl.load(given_s + stat_rows, mask=inside, other=0.0)
        row_lse_t = tl.load(given_t + stat_rows, mask=inside, other=0.0)
    tl.store(rows + stat_rows, tl.where(real, loss, 0.0), mask=inside)
    if lse_s is not None:
        tl.store(lse_s + stat_rows, tl.where(real, row_lse_s, float("-inf")), mask=inside)
        tl.store(lse_t + stat_rows, tl.where(real, row_lse_t, float("-inf")), mask=inside)


_fwd_kernel = tunable(pair_fwd_kernel)


class Scales(NamedTuple):
    """What a kernel multiplies raw scores with, and what the result takes in the end."""

    slope_s: float
    slope_t: float
    gain: float


def is_exact(q_s: Tensor, q_t: Tensor) -> bool:
    """Both in fp32: rounding a model to half precision costs more than the fast exp2 does."""
    return q_s.dtype == q_t.dtype == torch.float32


def kl_scales(scale_s: float, scale_t: float, exact: bool) -> Scales:
    unit = 1.0 if exact else math.log2(math.e)
    return Scales(scale_s * unit, scale_t * unit, 1 / unit)


def mse_scales(scale_s: float, scale_t: float) -> Scales:
    """The larger slope is 1: where both are, a fused S - T of equal scores is 0 without a residue."""
    unit = max(abs(scale_s), abs(scale_t)) or 1.0
    return Scales(scale_s / unit, scale_t / unit, unit)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q_s, k_s, q_t, k_t


def pair_fwd(
    loss: str,
    inputs: Inputs,
    given: tuple[Tensor | None, Tensor | None],  # lse of student and teacher
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scales: Scales,
) -> tuple[Tensor, ...]:
    """Returns the rows' losses (B, H, N) and, but for "mse", the lse (B, H, N) of both models."""
    given_s, given_t = (None if lse is None else lse.float().contiguous() for lse in given)
    outputs = _new_rows(inputs[0], 1 if loss == "mse" else 3)
    _launch_fwd(loss, inputs, (given_s, given_t), outputs, mask, cu_seqlens, scales)
    return outputs


def fp32_parts(
    inputs: Inputs, mask: Tensor | None, cu_seqlens: Tensor | None, scales: Scales
) -> tuple[Tensor, ...]:
    """What the backward of fp32 models takes for the lse, five times (B, H, N).

    An lse rounded to fp32 is too coarse where one key has nearly all the weight: P_s - P_t then lives in
    digits that neither probability has. With e_s = exp(S - top_s), e_t = exp(T - top_t) and their sums l_s, l_t

        P_s - P_t = ((near e_s - e_t) + far e_s) / l_t,  near + far = l_t / l_s,

    where near is 1 if that is close to 1, and far then has all its digits. Returns 1 / l_t, top_s, top_t,
    near and far.
    """
    parts = _new_rows(inputs[0], 5)
    _launch_fwd("kl", inputs, (None, None), parts, mask, cu_seqlens, scales)
    return parts


def _new_rows(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[:3], dtype=torch.float32) for _ in range(count))


def _launch_fwd(
    loss: str,
    inputs: Inputs,
    given: tuple[Tensor | None, Tensor | None],
    outputs: tuple[Tensor, ...],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scales: Scales,
) -> None:
    if inputs[0].numel() == 0:
        return
    q_s, k_s, q_t, k_t = (in_place(x) for x in inputs)
    strides = tuple(x.stride()[:3] for x in (q_s, k_s, q_t, k_t))
    missing = (None,) * (5 - len(outputs))
    launch_pair(
        _fwd_kernel,
        f"pair_fwd_{loss}",
        "BLOCK_M",
        (q_s, q_t),
        (q_s, k_s, q_t, k_t, *given, *outputs, *missing, *strides),
        (mask, cu_seqlens),
        scales,
        {"LOSS": loss},
    )


def launch_pair(
    kernel: Any,
    name: str,
    block: str,
    models: tuple[Tensor, Tensor],  # the student's and the teacher's (B, H, N, D)
    tensors: tuple,
    rows: tuple[Tensor | None, Tensor | None],  # mask, cu_seqlens
    scales: Scales,
    flags: dict[str, Any],
) -> None:
    """Runs ``kernel`` of ``name`` with one program for each ``block`` of rows and each head."""
    x_s, x_t = models
    sequences = prepare_sequences(x_s, *rows)
    head_dim = max(x_s.shape[3], x_t.shape[3])
    dtype = torch.float32 if torch.float32 in (x_s.dtype, x_t.dtype) else x_s.dtype
    config = block_config(name, architecture(x_s.device), dtype, head_dim, False)
    flags = {
        "HEAD_DIM_S": x_s.shape[3],
        "HEAD_DIM_T": x_t.shape[3],
        "BLOCK_D_S": padded_head_dim(x_s.shape[3]),
        "BLOCK_D_T": padded_head_dim(x_t.shape[3]),
        "EXACT": is_exact(x_s, x_t),
        **flags,
    }
    run(kernel, config, block, x_s, sequences.num_sequences, (*tensors, *sequences, *scales), flags)
