"""``bertops.normalized_mse`` beside eager and compiled eager."""

from collections.abc import Callable
from functools import partial

import pytest

import bertops
from bench import work
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.row_pair_providers import normalized_mse, row_pair_op
from bench.row_shapes import HIDDEN_PAIR


def op(impl: str) -> Op:
    return row_pair_op(
        "normalized_mse",
        HIDDEN_PAIR,
        partial(bertops.normalized_mse, impl=impl),
        normalized_mse,
        work.row_pair_loss,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_normalized_mse(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
