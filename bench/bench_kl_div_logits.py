"""``bertops.kl_div_logits`` beside eager and compiled eager."""

from collections.abc import Callable
from functools import partial

import pytest

import bertops
from bench import work
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.row_pair_providers import kl_div, row_pair_op
from bench.row_shapes import LOGITS_PAIR


def op(impl: str) -> Op:
    return row_pair_op(
        "kl_div_logits",
        LOGITS_PAIR,
        partial(bertops.kl_div_logits, impl=impl),
        kl_div,
        work.kl_div_logits,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_kl_div_logits(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
