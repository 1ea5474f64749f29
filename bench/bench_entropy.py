"""``bertops.entropy`` beside eager, compiled eager, and ``torch.distributions``."""

from collections.abc import Callable
from functools import partial

import pytest

from bench import row_shapes, work
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.row_providers import entropy_providers, entropy_upstream
from bench.row_shapes import LOGITS
from bertops import reference


def op(impl: str) -> Op:
    return Op(
        "entropy",
        LOGITS,
        partial(row_shapes.cases, "entropy"),
        entropy_providers(impl),
        lambda logits: [reference.entropy(logits)],
        ("entropy",),
        entropy_upstream,
        work.entropy,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_entropy(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
