"""Whether a provider may show a number: the rule of the tests, against the fp64 reference."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.shapes import Inputs

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from errors import assert_close_to_oracle  # tests/errors.py: the one place of that rule

LOSS_PAIRS = 2**28  # beyond, the reference of a loss over all heads would take minutes

Reference = Callable[..., Sequence[Tensor]]  # the tensors and what goes with them to outputs


@dataclass(frozen=True)
class Truth:
    """Outputs, then gradients if wanted: the reference in fp64, and in the inputs' dtype in up to two orders.

    The oracle of a loss is None where it would take too long.
    """

    oracle: list[Tensor | None]
    eagers: list[list[Tensor]]
    names: list[str]


def truth(
    reference: Reference, names: Sequence[str], inputs: Inputs, upstream: list[Tensor], gradients: bool
) -> Truth:
    """``names``: of the outputs, then of the leaves' gradients; ``upstream``: the outputs' gradients."""
    oracle = run_in_groups(reference, inputs, upstream, gradients, torch.float64)
    forwards = run_in_groups(reference, inputs, upstream, gradients)
    if not inputs.reversible:
        return Truth(list(oracle), [forwards], list(names))
    with_head_dim = [name == "out" or name.startswith("grad") for name in names]
    flipped = [g.flip(-1) if flip else g for g, flip in zip(upstream, with_head_dim, strict=False)]
    backwards = run_in_groups(reference, inputs.map(lambda x: x.flip(-1)), flipped, gradients)
    unflipped = [x.flip(-1) if flip else x for x, flip in zip(backwards, with_head_dim, strict=False)]
    return Truth(list(oracle), [forwards, unflipped], list(names))


def loss_truth(
    reference: Reference,
    names: Sequence[str],
    inputs: Inputs,
    part: Callable[[Tensor], Tensor],
    upstream: Tensor,
    gradients: bool,
) -> Truth:
    """Of a loss that sums the reference's rows times ``upstream``; gradients of a ``part`` of the heads.

    The loss may err as much as its rows do on average: within one order of sums their errors cancel by luck.
    """
    rows = truth(reference, names, inputs.pick(part), [part(upstream)], gradients)
    part_rows = rows.oracle[0]
    assert part_rows is not None
    loss = None
    if inputs.map_elements <= LOSS_PAIRS:
        all_rows = run_in_groups(reference, inputs, [], False, torch.float64)[0]
        loss = (all_rows * upstream).sum()
    eagers = []
    for rounded, *grads in rows.eagers:
        error = ((rounded - part_rows).abs() * part(upstream)).sum() * (upstream.numel() / part_rows.numel())
        eagers.append([error if loss is None else loss + error, *grads])
    return replace(rows, oracle=[loss, *rows.oracle[1:]], eagers=eagers)


def run_in_groups(
    reference: Reference,
    inputs: Inputs,
    upstream: list[Tensor],
    gradients: bool,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    samples = []
    for groups in inputs.groups():
        parts = []
        for here in groups:
            group = inputs.at(here)
            leaves = [x.detach().to(dtype or x.dtype).requires_grad_(gradients) for x in group.leaves]
            constants = [x.to(dtype or x.dtype) for x in group.constants]
            with torch.set_grad_enabled(gradients):
                results = list(reference(*leaves, *constants, *group.extra))
            if gradients:
                grads = [g[here].to(x.dtype) for g, x in zip(upstream, results, strict=True)]
                results += torch.autograd.grad(results, leaves, grads)
            parts.append([x.detach() for x in results])
        samples.append([joined(x, 1) for x in zip(*parts, strict=True)])
    return [joined(x, 0) for x in zip(*samples, strict=True)]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def wrong(results: Sequence[Tensor], expected: Truth, inputs: Inputs) -> str | None:
    """Why ``results`` (outputs, or outputs and gradients) are wrong, or None where they are right.

    Integers must be equal. A loss counts as no more exact than the dtype of its inputs.
    """
    for place, (name, result) in enumerate(zip(expected.names, results, strict=False)):
        exact = expected.oracle[place]
        if exact is None:
            continue
        if not exact.is_floating_point():
            if not torch.equal(result, exact):
                return f"{name}: not equal"
            continue
        if name == "loss":
            result = result.to(inputs.leaves[0].dtype)
        compared = [result, exact, *(eager[place] for eager in expected.eagers)]
        actual, oracle, *eagers = (inputs.compared(name, x) for x in compared)
        try:
            assert_close_to_oracle(name, actual, eagers, oracle)
        except AssertionError as error:
            return str(error)
    return None
