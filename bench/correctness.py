"""Whether a provider may show a number: the rule of the tests, against the fp64 reference."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from errors import assert_close_to_oracle  # tests/errors.py: the one place of that rule

SLICE_PAIRS = 2**24  # elements of an N x N map in fp64 held at a time


@dataclass(frozen=True)
class Truth:
    """Outputs, then gradients, of the reference in the dtype of the inputs and in fp64."""

    eager: list[Tensor]
    oracle: list[Tensor]
    names: list[str]


Reference = Callable[..., Sequence[Tensor]]


def truth(
    reference: Reference, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grads: list[Tensor]
) -> Truth:
    """``reference(q, k, v, mask)`` gives the outputs, ``grads`` are their gradients; runs groups of heads."""
    eager = run_in_groups(reference, q, k, v, mask, grads, q.dtype)
    oracle = run_in_groups(reference, q, k, v, mask, grads, torch.float64)
    names = [f"output {i}" for i in range(len(grads))] + ["grad q", "grad k", "grad v"]
    return Truth(eager, oracle, names)


def run_in_groups(
    reference: Reference,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    grads: list[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    batch, heads, length, _ = q.shape
    group = max(1, min(heads, SLICE_PAIRS // length**2))
    rows = []
    for b in range(batch):
        parts = []
        for h in range(0, heads, group):
            here = (slice(b, b + 1), slice(h, h + group))
            leaves = [x[here].detach().to(dtype).requires_grad_() for x in (q, k, v)]
            outputs = reference(*leaves, None if mask is None else mask[b : b + 1])
            gradients = torch.autograd.grad(outputs, leaves, [g[here].to(dtype) for g in grads])
            parts.append([x.detach() for x in (*outputs, *gradients)])
        rows.append([torch.cat(x, 1) for x in zip(*parts, strict=True)])
    return [torch.cat(x, 0) for x in zip(*rows, strict=True)]


def wrong(results: Sequence[Tensor], expected: Truth, mask: Tensor | None) -> str | None:
    """Why ``results`` (outputs, or outputs and gradients) are wrong, or None where they are right.

    Rows of padding are left out of the first output: bertops makes them 0, its peers leave a number there.
    """
    for place, (name, result) in enumerate(zip(expected.names, results, strict=False)):
        eager, oracle = expected.eager[place], expected.oracle[place]
        if place == 0 and mask is not None:
            rows = mask[:, None, :, None]
            result, eager, oracle = (x.masked_fill(~rows, 0.0) for x in (result, eager, oracle))
        try:
            assert_close_to_oracle(name, result.detach(), eager, oracle)
        except AssertionError as error:
            return str(error)
    return None
