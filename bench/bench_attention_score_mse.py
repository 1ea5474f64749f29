"""``bertops.attention_score_mse`` beside eager, compiled and chunked eager, and the Gram form in PyTorch."""

from collections.abc import Callable
from functools import partial

import pytest

import bertops
from bench import work
from bench.loss_providers import EAGER_GRAM, SCORE_MSE
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.shapes import QK_PAIR
from bertops import reference


def op(impl: str) -> Op:
    return SCORE_MSE.op(
        "attention_score_mse",
        QK_PAIR,
        partial(bertops.attention_score_mse, impl=impl),
        reference.attention_score_mse,
        work.attention_score_mse,
        EAGER_GRAM,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_attention_score_mse(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
