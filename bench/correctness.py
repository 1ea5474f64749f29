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
    """Outputs, then gradients if wanted: the reference in fp64, and in the inputs' dtype in two orders."""

    oracle: list[Tensor]
    eagers: list[list[Tensor]]
    names: list[str]


Reference = Callable[..., Sequence[Tensor]]


def sample(x: Tensor) -> Tensor:
    """Two samples and four heads of (B, H, ...): what a quick run checks."""
    batch, heads = x.shape[:2]
    return x[:: max(1, batch // 2), :: max(1, heads // 4)]


def truth(
    reference: Reference,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    grads: list[Tensor],
    gradients: bool,
) -> Truth:
    """``reference(q, k, v, mask)`` gives the outputs, ``grads`` are their gradients; runs groups of heads."""
    oracle = run_in_groups(reference, q, k, v, mask, grads, gradients, torch.float64)
    forwards = run_in_groups(reference, q, k, v, mask, grads, gradients, q.dtype)
    out_grad, *others = grads
    flipped = [out_grad.flip(-1), *others]
    backwards = run_in_groups(
        reference, q.flip(-1), k.flip(-1), v.flip(-1), mask, flipped, gradients, q.dtype
    )
    names = [*["out", "scores"][: len(grads)], "grad q", "grad k", "grad v"]
    unflipped = [x if name == "scores" else x.flip(-1) for name, x in zip(names, backwards, strict=False)]
    return Truth(oracle, [forwards, unflipped], names)


def run_in_groups(
    reference: Reference,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    grads: list[Tensor],
    gradients: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    batch, heads, length, _ = q.shape
    group = max(1, min(heads, SLICE_PAIRS // length**2))
    rows = []
    for b in range(batch):
        parts = []
        for h in range(0, heads, group):
            here = (slice(b, b + 1), slice(h, h + group))
            leaves = [x[here].detach().to(dtype).requires_grad_(gradients) for x in (q, k, v)]
            results = list(reference(*leaves, None if mask is None else mask[b : b + 1]))
            if gradients:
                results += torch.autograd.grad(results, leaves, [g[here].to(dtype) for g in grads])
            parts.append([x.detach() for x in results])
        rows.append([torch.cat(x, 1) for x in zip(*parts, strict=True)])
    return [torch.cat(x, 0) for x in zip(*rows, strict=True)]


def wrong(results: Sequence[Tensor], expected: Truth, mask: Tensor | None) -> str | None:
    """Why ``results`` (outputs, or outputs and gradients) are wrong, or None where they are right.

    Rows of padding are left out of ``out``: bertops makes them 0, its peers leave a number there.
    """
    for place, (name, result) in enumerate(zip(expected.names, results, strict=False)):
        compared = [result, expected.oracle[place], *(eager[place] for eager in expected.eagers)]
        if name == "out" and mask is not None:
            compared = [x.masked_fill(~mask[:, None, :, None], 0.0) for x in compared]
        actual, oracle, *eagers = compared
        try:
            assert_close_to_oracle(name, actual, eagers, oracle)
        except AssertionError as error:
            return str(error)
    return None
