"""``bertops.compact`` and ``compact_packed`` beside ``index_select`` and boolean indexing."""

from collections.abc import Callable
from functools import partial

import pytest

from bench import row_shapes, work
from bench.measure import Op, Result
from bench.paired import replay_clock
from bench.row_providers import compact_providers, compact_reference, no_upstream
from bench.row_shapes import HIDDEN


def op(impl: str) -> Op:
    return Op(
        "compact",
        HIDDEN,
        partial(row_shapes.cases, "compact"),
        compact_providers(impl),
        compact_reference,
        ("out", "offsets"),
        no_upstream,
        work.compact,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_compact(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
