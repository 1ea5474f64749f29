"""``bertops.cosine_loss`` beside cosine_embedding_loss, eager and compiled, and cosine_similarity."""

from collections.abc import Callable
from functools import partial

import pytest

import bertops
from bench import work
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.providers import Provider
from bench.row_pair_providers import cosine_embedding, cosine_similarity, row_pair_op
from bench.row_shapes import HIDDEN_PAIR


def op(impl: str) -> Op:
    return row_pair_op(
        "cosine_loss",
        HIDDEN_PAIR,
        partial(bertops.cosine_loss, impl=impl),
        cosine_embedding,
        work.row_pair_loss,
        Provider("cosine_similarity", lambda inputs: cosine_similarity),
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_cosine_loss(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
