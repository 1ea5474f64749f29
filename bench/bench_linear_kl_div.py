"""``bertops.linear_kl_div`` beside eager, compiled and chunked eager, and Liger where it is installed."""

from collections.abc import Callable
from functools import partial

import pytest

from bench import linear_shapes, work
from bench.linear_providers import kl_rows, linear_kl_div_providers, share_of_rows
from bench.linear_shapes import VOCABULARY
from bench.measure import Op, Result
from bench.paired import replay_clock


def op(impl: str) -> Op:
    return Op(
        "linear_kl_div",
        VOCABULARY,
        partial(linear_shapes.cases, "linear_kl_div"),
        linear_kl_div_providers(impl),
        kl_rows,
        ("loss",),
        share_of_rows,
        work.linear_kl_div,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_linear_kl_div(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
