"""Squared error of projected hidden states: a Triton kernel over the projections of a chunk of rows."""

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

BLOCK, NUM_WARPS = 1024, 4


def difference_kernel(
    projected,  # (rows, width), a chunk's without the bias
    bias,  # (width,) or None
    hidden_t,  # (M, width)
    grad_rows,  # (M,) fp32, or None for the loss alone
    mask,  # (M,) bool or None
    rows,  # (M,) fp32: the loss
    grads,  # (rows, width): of ``projected``, whose place they may take
    first,  # row of the chunk
    width,
    projected_stride,  # of a row
    hidden_t_stride,
    BLOCK: tl.constexpr,
):
    # A program for each row. What stands in a row that is not real is not looked at.
    program = tl.program_id(0)
    row = first + program
    end = width
    if mask is not None:
        end = tl.where(tl.load(mask + row) != 0, width, 0)
    projected += tl.cast(program, tl.int64) * projected_stride
    hidden_t += tl.cast(row, tl.int64) * hidden_t_stride
    total = tl.zeros([BLOCK], tl.float32)
    factor = 0.0
    if grad_rows is not None:
        grads += tl.cast(program, tl.int64) * width
        factor = 2 * tl.load(grad_rows + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < end
        x = load_outputs(projected, bias, columns, inside, 0.0)
        difference = x - tl.load(hidden_t + columns, mask=inside, other=0.0).to(tl.float32)
        total += difference * difference
        if grad_rows is not None:
            tl.store(grads + columns, (difference * factor).to(grads.dtype.element_ty), mask=columns < width)
    tl.store(rows + row, tl.sum(total, 0))


_kernel = triton.jit(difference_kernel, do_not_specialize=["first"])


def projected_mse_fwd(
    hidden_s: Tensor, weight: Tensor | None, bias: Tensor | None, hidden_t: Tensor, mask: Tensor | None
) -> Tensor:
    """Returns the loss (M,) of every row; see :func:`bertops.projected_mse`."""
    rows = loss_rows(hidden_s)
    if weight is None:
        _launch(hidden_s, None, hidden_t, None, mask, rows, None, 0)
    else:
        _run(Student(hidden_s, weight, bias), hidden_t, mask, rows, None, None)
    return rows


def projected_mse_with_grads(
    grad_rows: Tensor,
    hidden_s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden_t: Tensor,
    mask: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the loss (M,) of every row, and the gradients of the student's three, fp32."""
    rows = loss_rows(hidden_s)
    grad_rows = grad_rows.float().contiguous()
    if weight is None:
        grad_hidden = hidden_s.new_empty(hidden_s.shape, dtype=rows.dtype)
        _launch(hidden_s, None, hidden_t, grad_rows, mask, rows, grad_hidden, 0)
        return rows, grad_hidden, rows.new_empty((0,)), rows.new_empty((0,))
    student = Student(without_padding(hidden_s, mask), weight, bias)
    grads = Grads(student, (want_hidden, want_weight, want_bias))
    _run(student, hidden_t, mask, rows, grad_rows, grads)
    return rows, *grads.results()


def _run(
    student: Student,
    hidden_t: Tensor,
    mask: Tensor | None,
    rows: Tensor,
    grad_rows: Tensor | None,
    grads: Grads | None,
) -> None:
    for here in chunks(rows.shape[0], 6 * student.weight.shape[0]):
        projected, outputs = outputs_and_grads(student, here, grads is not None)
        _launch(projected, student.bias, hidden_t, grad_rows, mask, rows, outputs, here.start)
        if grads is not None and outputs is not None:
            grads.add(here, outputs)


def _launch(
    projected: Tensor,
    bias: Tensor | None,
    hidden_t: Tensor,
    grad_rows: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    grads: Tensor | None,
    first: int,
) -> None:
    count, width = projected.shape
    if count == 0:
        return
    mask = None if mask is None else mask.contiguous()
    tensors = projected, bias, hidden_t, grad_rows, mask, rows, grads
    strides = projected.stride(0), hidden_t.stride(0)
    block = min(BLOCK, power_of_two(width))
    with torch.cuda.device_of(rows):
        _kernel[(count,)](*tensors, first, width, *strides, BLOCK=block, num_warps=NUM_WARPS)
