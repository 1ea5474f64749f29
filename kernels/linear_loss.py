"""What the losses behind a linear layer share on a GPU: chunks of rows, and the products of their gradients.

The products are cuBLAS's; a Triton kernel of the loss stands between them and works on a chunk in place.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertops._library import accumulator_dtype
from bertops.kernels.launch import ceil_div

CHUNK_BYTES = 2**26  # of what the kernel of the loss reads and writes


class Student(NamedTuple):
    hidden: Tensor  # (M, width), 0 in rows that are not real
    weight: Tensor  # (outputs, width)
    bias: Tensor | None


@triton.jit
def load_outputs(
    outputs,  # a row of the products, fp32; or of hidden states as they are
    bias,  # of the outputs, or None
    columns,  # (BLOCK,)
    inside,  # (BLOCK,) bool
    OTHER: tl.constexpr,
):
    """(BLOCK,) fp32, with the bias; OTHER where not inside."""
    x = tl.load(outputs + columns, mask=inside, other=OTHER).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return x


def without_padding(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """0 times NaN would be NaN in the products: rows that are not real become 0."""
    return hidden if mask is None else torch.where(mask[:, None], hidden, 0.0)


def chunks(rows: int, bytes_of_row: int) -> Iterator[slice]:
    """Of about equal size."""
    most = max(1, CHUNK_BYTES // bytes_of_row)
    step = ceil_div(rows, max(1, ceil_div(rows, most)))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, max(1, step)))


def loss_rows(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=accumulator_dtype(hidden.dtype))


class Grads:
    """The gradients of a student's three, in the dtype of losses; what is not wanted is empty."""

    def __init__(self, student: Student, wanted: tuple[bool, bool, bool]) -> None:
        self.student, self.wanted = student, wanted
        dtype = accumulator_dtype(student.hidden.dtype)
        hidden, weight, bias = (
            x.new_zeros(x.shape if x is not None and want else (0,), dtype=dtype)
            if x is not None
            else student.hidden.new_empty((0,), dtype=dtype)
            for x, want in zip(student, wanted, strict=True)
        )
        self.hidden, self.weight, self.bias = hidden, weight, bias

    def add(self, here: slice, outputs: Tensor) -> None:
        """``outputs``: of a chunk's outputs (rows, outputs), in the student's dtype that products take."""
        if self.wanted[0]:
            self.hidden[here] = product(outputs, self.student.weight)
        if self.wanted[1]:
            self.weight += product(outputs.t(), self.student.hidden[here])
        if self.wanted[2]:
            self.bias += outputs.sum(0, dtype=self.bias.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias


def outputs_and_grads(model: Student, here: slice, with_grads: bool) -> tuple[Tensor, Tensor | None]:
    """The products (rows, outputs) of a chunk in fp32, and memory for gradients in the model's dtype."""
    outputs = product(model.hidden[here], model.weight.t())
    if not with_grads:
        return outputs, None
    in_place = model.weight.dtype == outputs.dtype
    return outputs, outputs if in_place else torch.empty_like(outputs, dtype=model.weight.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32: logits in half precision would cost the loss its digits, and sums of fp16 gradients, whose
    factor is not known yet, could overflow."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
