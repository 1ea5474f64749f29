"""``bertops.factorized_embedding`` beside eager and compiled eager."""

from collections.abc import Callable

import pytest

from bench import embedding
from bench.measure import Op, Result
from bench.paired import replay_clock


def op(impl: str) -> Op:
    return Op(
        "factorized_embedding",
        embedding.PARAMETERS,
        embedding.cases,
        embedding.providers(impl),
        embedding.embedding_reference,
        ("out",),
        embedding.upstream,
        embedding.work,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_factorized_embedding(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
