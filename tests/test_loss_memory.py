"""Losses hold nothing of size N x N, forward or backward."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pair_cases import LOSSES

SCRIPT = Path(__file__).with_name("loss_memory.py")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def measure(op: str, *options: object) -> dict:
    command = [sys.executable, str(SCRIPT), op, *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@linux
@pytest.mark.parametrize(
    "shape",
    [
        ("--batch", 2, "--length", 1024),
        ("--batch", 8, "--length", 128),
        ("--length", 4096, "--dtype", "bfloat16"),
        ("--heads", 48, "--head-dim", 16, "--length", 1024),
    ],
    ids=lambda shape: "".join(map(str, shape)),
)
@pytest.mark.parametrize("op", sorted(LOSSES))
def test_extra_memory_is_three_times_the_inputs(op, shape):
    """And one fp32 for every row, with 2 MB for what the system counts in whole batches of pages."""
    measured = measure(op, *shape)
    sizes = dict(zip(shape[::2], shape[1::2], strict=True))
    rows = sizes.get("--batch", 1) * sizes.get("--heads", 12) * sizes["--length"]
    assert measured["extra"] <= 3 * measured["inputs"] + 4 * 4 * rows + 2**21, measured


@linux
@pytest.mark.parametrize("op", sorted(LOSSES))
def test_16384_tokens_within_two_gigabytes_and_right(op):
    measured = measure(op, "--heads", 12, "--length", 16384, "--sampled")
    assert measured["process"] <= 2 * 10**9, measured
    assert max(measured["errors"]) <= 1e-5, measured
