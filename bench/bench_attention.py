"""``bertops.attention`` beside eager, compiled eager, SDPA and FlexAttention."""

from collections.abc import Callable

import pytest

from bench import work
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.providers import attention_providers
from bertops import reference


def op(impl: str) -> Op:
    return Op(
        "attention",
        attention_providers(impl),
        lambda q, k, v, mask: reference.attention(q, k, v, mask)[:1],
        lambda q: [tuple(q.shape)],
        work.attention,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_attention(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
