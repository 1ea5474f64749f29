"""``bertops.projected_mse`` beside eager and compiled eager."""

from collections.abc import Callable
from functools import partial

import pytest

from bench import linear_shapes, work
from bench.linear_providers import mse_rows, projected_mse_providers, share_of_rows
from bench.linear_shapes import PROJECTION
from bench.measure import Op, Result
from bench.paired import replay_clock


def op(impl: str) -> Op:
    return Op(
        "projected_mse",
        PROJECTION,
        partial(linear_shapes.cases, "projected_mse"),
        projected_mse_providers(impl),
        mse_rows,
        ("loss",),
        lambda inputs: share_of_rows(inputs, inputs.leaves[1].shape[0]),
        work.projected_mse,
    )


@pytest.mark.benchmark(timer=replay_clock)
def test_projected_mse(result: Result, show: Callable[[Result], None]) -> None:
    show(result)
