"""The search for block sizes, as far as it goes without a GPU."""

import pytest

pytest.importorskip("triton")

from bench import tune
from bertops.kernels import launch
from bertops.kernels.launch import BlockConfig

CONFIG = BlockConfig(64, 32, 4, 2)


@pytest.mark.parametrize("name", tune.KERNELS)
def test_a_candidate_takes_the_place_of_the_entry_and_gives_it_back(name):
    known = launch._SM90[name]
    during = []

    def fail():
        during.append(launch._SM90[name])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        tune.with_config(name, CONFIG, fail)
    assert during == [(CONFIG,) * 3] and launch._SM90[name] == known


@pytest.mark.parametrize("name", tune.KERNELS)
def test_candidates_are_block_sizes(name):
    found = tune.candidates(name)
    assert len(set(found)) == len(found) >= 8
    assert all(c.block_m % 16 == c.block_n % 16 == 0 and c.num_warps in (4, 8) for c in found)


def test_the_mean_is_geometric():
    assert tune.mean([1.0, 4.0]) == pytest.approx(2.0)
