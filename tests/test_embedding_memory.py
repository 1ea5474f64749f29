"""The embedding writes its output, two numbers a token and, backward, at most one buffer of width E."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bertops
from bench.memory import peak_extra_bytes
from embedding_cases import Case

PAGES = 2**22  # the system counts pages in batches, and gives huge ones
BYTES_PER_TOKEN = 64  # rows of three tables, place, moments
WIDTH = 256

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def extra(case: Case, gradients: bool) -> int:
    torch.use_deterministic_algorithms(False)  # NaN-filled memory is touched memory
    input_ids, parameters, _ = case.inputs()
    leaves = [x.requires_grad_(gradients) for x in parameters.values()]
    upstream = torch.ones(case.batch, case.length, case.height or case.width)

    def call() -> list:
        out = bertops.factorized_embedding(input_ids, **parameters)
        return [out, *(torch.autograd.grad(out, leaves, upstream) if gradients else ())]

    call()  # what a first call keeps for good
    measured = peak_extra_bytes(torch.device("cpu"), call)
    assert measured is not None
    return measured


@linux
@pytest.mark.parametrize("height", [0, 512])
def test_extra_memory(height):
    case = Case(batch=16, length=1024, width=WIDTH, height=height, rows=(1000, 1024, 2))
    tokens = case.batch * case.length
    out, rows = 4 * tokens * (height or WIDTH), 4 * tokens * WIDTH
    weights = 4 * WIDTH * (sum(case.rows) + height)
    assert extra(case, gradients=False) <= out + BYTES_PER_TOKEN * tokens + 2 * 4 * WIDTH * height + PAGES
    partial_sums = tokens // 1024 * 4 * WIDTH * height
    limit = out + rows + partial_sums + 3 * weights + 2 * BYTES_PER_TOKEN * tokens + PAGES
    assert extra(case, gradients=True) <= limit
