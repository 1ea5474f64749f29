"""``bertops.attention_kl`` beside eager, compiled and chunked eager, and FlexAttention."""

from collections.abc import Callable
from functools import partial

import pytest

import bertops
from bench import work
from bench.loss_providers import FLEX_KL, KL
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.shapes import QK_PAIR
from bertops import reference


def op(impl: str) -> Op:
    return KL.op(
        "attention_kl",
        QK_PAIR,
        partial(bertops.attention_kl, impl=impl),
        lambda *arguments: reference.attention_kl(*arguments)[0],
        work.attention_kl,
        FLEX_KL,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_attention_kl(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
