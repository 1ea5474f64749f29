"""``bertops.feature_map_transfer`` beside eager and compiled eager."""

from collections.abc import Callable
from functools import partial

import pytest

import bertops
from bench import work
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.row_pair_providers import feature_map_transfer, row_pair_op
from bench.row_shapes import HIDDEN_PAIR


def op(impl: str) -> Op:
    return row_pair_op(
        "feature_map_transfer",
        HIDDEN_PAIR,
        partial(bertops.feature_map_transfer, impl=impl),
        feature_map_transfer,
        work.row_pair_loss,
        outputs=("fmt", "mean", "variance"),
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_feature_map_transfer(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
