"""``bertops.exit_decision`` beside softmax, entropy, comparison and nonzero, eager and compiled."""

from collections.abc import Callable
from functools import partial

import pytest

from bench import row_shapes, work
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.row_providers import exit_decision_providers, exit_decision_reference, no_upstream
from bench.row_shapes import LOGITS


def op(impl: str) -> Op:
    return Op(
        "exit_decision",
        LOGITS,
        partial(row_shapes.cases, "exit_decision"),
        exit_decision_providers(impl),
        exit_decision_reference,
        ("uncertainty", "exited", "kept", "prediction"),
        no_upstream,
        work.exit_decision,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_exit_decision(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
