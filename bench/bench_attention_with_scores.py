"""``bertops.attention_with_scores`` beside eager, compiled eager, and SDPA with the scores computed again."""

from collections.abc import Callable
from functools import partial

import pytest

from bench import shapes, work
from bench.measure import Op, Result, noise
from bench.paired import replay_clock
from bench.providers import attention_with_scores_providers
from bench.shapes import QKV
from bertops import reference


def op(impl: str) -> Op:
    return Op(
        "attention_with_scores",
        QKV,
        partial(shapes.cases, "attention_with_scores"),
        attention_with_scores_providers(impl),
        lambda q, k, v, mask: reference.attention_with_scores(q, k, v, mask)[::2],
        ("out", "scores"),
        lambda inputs: noise(inputs, maps=1),
        work.attention_with_scores,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_attention_with_scores(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
