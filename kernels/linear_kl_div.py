"""KL between two models' predictions of a vocabulary: a Triton kernel over the logits of a chunk of rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertops.kernels.launch import power_of_two
from bertops.kernels.linear_loss import (
    Grads,
    Student,
    chunks,
    load_outputs,
    loss_rows,
    outputs_and_grads,
    without_padding,
)
from bertops.kernels.pairs import exp_difference, log_ratio
from bertops.kernels.tiles import exact_exp

BLOCK, NUM_WARPS = 2048, 8


def vocabulary_kernel(
    logits_s,  # (rows, V) fp32, a chunk's without the bias
    bias_s,  # (V,) or None
    logits_t,  # (rows, V) fp32
    bias_t,  # (V,) or None
    grads,  # (rows, V), of logits_s, whose place they may take
    grad_rows,  # (M,) fp32, or None for the loss alone
    mask,  # (M,) bool or None
    rows,  # (M,) fp32: the loss
    first,  # row of the chunk
    V,
    inverse,  # of the temperature
    temperature,
    BLOCK: tl.constexpr,
):
    # A program for each row. The first pass finds the largest logits, the second the sums
    #   total_s = sum e^b, total_t = sum e^a, excess = sum (e^b - e^a), drift = sum e^a (a - b)
    # of a = T - top_t and b = S - top_s, so that KL = drift / total_t + ln(total_s / total_t) subtracts no
    # lse, and the third writes p_s - p_t. What stands in a row that is not real is not looked at.
    program = tl.program_id(0)
    row = first + program
    end = V
    if mask is not None:
        end = tl.where(tl.load(mask + row) != 0, V, 0)
    real = end > 0
    logits_s += tl.cast(program, tl.int64) * V
    logits_t += tl.cast(program, tl.int64) * V
    words = tl.arange(0, BLOCK)
    inverse = tl.cast(inverse, tl.float32)
    temperature = tl.cast(temperature, tl.float32)
    top_s = float("-inf")
    top_t = float("-inf")
    for start in range(0, V, BLOCK):
        inside = start + words < end
        s = load_outputs(logits_s, bias_s, start + words, inside, float("-inf"))
        t = load_outputs(logits_t, bias_t, start + words, inside, float("-inf"))
        top_s = tl.maximum(top_s, tl.max(s, 0))
        top_t = tl.maximum(top_t, tl.max(t, 0))
    top_s = tl.where(real, top_s, 0.0)
    top_t = tl.where(real, top_t, 0.0)

    total_s = tl.zeros([BLOCK], tl.float32)
    total_t = tl.zeros([BLOCK], tl.float32)
    excess = tl.zeros([BLOCK], tl.float32)
    drift = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + words < end
        b = (load_outputs(logits_s, bias_s, start + words, inside, 0.0) - top_s) * inverse
        a = (load_outputs(logits_t, bias_t, start + words, inside, 0.0) - top_t) * inverse
        exp_s = exact_exp(b)
        exp_t = exact_exp(a)
        total_s += tl.where(inside, exp_s, 0.0)
        total_t += tl.where(inside, exp_t, 0.0)
        excess += tl.where(inside, exp_difference(exp_s, exp_t, b - a), 0.0)
        drift += tl.where(inside, exp_t * (a - b), 0.0)
    sum_s = tl.where(real, tl.sum(total_s, 0), 1.0)
    sum_t = tl.where(real, tl.sum(total_t, 0), 1.0)
    sum_excess = tl.sum(excess, 0)
    kl = tl.sum(drift, 0) / sum_t + log_ratio(sum_s, sum_t, sum_excess)
    kl = tl.where(kl < 0, 0.0, kl)  # below 0 by rounding alone
    tl.store(rows + row, tl.where(real, kl * temperature * temperature, 0.0))
    if grad_rows is not None:
        grads += tl.cast(program, tl.int64) * V
        # p_s - p_t = (near e^b - e^a + far e^b) / total_t with near + far = total_t / total_s; near is 1
        # where that is close to 1, and far then has all its digits
        missing = -sum_excess / sum_s
        close = tl.abs(missing) < 0.5
        near = tl.where(close, 1.0, sum_t / sum_s)
        far = tl.where(close, missing, 0.0)
        factor = tl.load(grad_rows + row) * temperature / sum_t
        for start in range(0, V, BLOCK):
            inside = start + words < end
            b = (load_outputs(logits_s, bias_s, start + words, inside, 0.0) - top_s) * inverse
            a = (load_outputs(logits_t, bias_t, start + words, inside, 0.0) - top_t) * inverse
            exp_s = exact_exp(b)
            grad = ((exp_s * near - exact_exp(a)) + exp_s * far) * factor
            grad = tl.where(real, grad, 0.0)
            tl.store(grads + start + words, grad.to(grads.dtype.element_ty), mask=start + words < V)


_kernel = triton.jit(vocabulary_kernel, do_not_specialize=["first", "inverse", "temperature"])


def linear_kl_div_fwd(
    hidden_s: Tensor,
    weight_s: Tensor,
    bias_s: Tensor | None,
    hidden_t: Tensor,
    weight_t: Tensor,
    bias_t: Tensor | None,
    mask: Tensor | None,
    temperature: float,
) -> Tensor:
    """Returns the loss (M,) of every row; see :func:`bertops.linear_kl_div`."""
    student = Student(hidden_s, weight_s, bias_s)
    return _run(student, Student(hidden_t, weight_t, bias_t), mask, temperature, None, None)


def linear_kl_div_with_grads(
    grad_rows: Tensor,
    hidden_s: Tensor,
    weight_s: Tensor,
    bias_s: Tensor | None,
    hidden_t: Tensor,
    weight_t: Tensor,
    bias_t: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the loss (M,) of every row, and the gradients of the student's three, fp32."""
    student = Student(without_padding(hidden_s, mask), weight_s, bias_s)
    teacher = Student(without_padding(hidden_t, mask), weight_t, bias_t)
    grads = Grads(student, (want_hidden, want_weight, want_bias))
    rows = _run(student, teacher, mask, temperature, grad_rows.float().contiguous(), grads)
    return rows, *grads.results()


def _run(
    student: Student,
    teacher: Student,
    mask: Tensor | None,
    temperature: float,
    grad_rows: Tensor | None,
    grads: Grads | None,
) -> Tensor:
    rows = loss_rows(student.hidden)
    words = student.weight.shape[0]
    mask = None if mask is None else mask.contiguous()
    block = min(BLOCK, power_of_two(words))
    for here in chunks(rows.shape[0], 10 * words):
        logits_s, outputs = outputs_and_grads(student, here, grads is not None)
        logits_t, _ = outputs_and_grads(teacher, here, False)
        tensors = logits_s, student.bias, logits_t, teacher.bias, outputs, grad_rows, mask, rows
        with torch.cuda.device_of(rows):
            _kernel[(here.stop - here.start,)](
                *tensors, here.start, words, 1 / temperature, temperature, BLOCK=block, num_warps=NUM_WARPS
            )
        if grads is not None and outputs is not None:
            grads.add(here, outputs)
    return rows
