"""``bertops.attention`` beside eager, compiled eager, SDPA and FlexAttention."""

from collections.abc import Callable
from functools import partial

import pytest

from bench import shapes, work
from bench.measure import Op, Result, noise
from bench.paired import replay_clock
from bench.providers import attention_providers
from bench.shapes import QKV
from bertops import reference


def op(impl: str) -> Op:
    return Op(
        "attention",
        QKV,
        partial(shapes.cases, "attention"),
        attention_providers(impl),
        lambda q, k, v, mask: reference.attention(q, k, v, mask)[:1],
        ("out",),
        noise,
        work.attention,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_attention(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
