"""``bertops.relation_kl`` beside eager, compiled and chunked eager, and FlexAttention."""

from collections.abc import Callable
from functools import partial

import pytest

import bertops
from bench import work
from bench.loss_providers import FLEX_KL, KL
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.shapes import V_PAIR
from bertops import reference


def op(impl: str) -> Op:
    return KL.op(
        "relation_kl",
        V_PAIR,
        partial(bertops.relation_kl, impl=impl),
        lambda *arguments: reference.relation_kl(*arguments)[0],
        work.relation_kl,
        FLEX_KL,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_relation_kl(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
