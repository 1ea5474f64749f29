"""The CPU kernels as every instruction set runs them, and their conversions of half precision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bertops
from bertops.cli import cpu_isa

LEVELS = ("baseline", "avx2", "avx512")
HERE = Path(__file__).parent


def has(level: str) -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return level == "baseline" or level.upper() in capability or capability == "AVX512"


def run_with(level: str, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "BERTOPS_CPU_ISA": level}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=HERE
    )


@pytest.mark.parametrize("level", [level for level in LEVELS if has(level) and level != cpu_isa()])
def test_every_other_instruction_set_matches_the_oracle(level):
    chosen = "test_matches_oracle and not many and (holes or dropout or window or float16 or D7 or D256)"
    tests = [
        "test_attention.py",
        "test_attention_with_scores.py",
        "test_pair_losses.py",
        "test_attention_score_mse.py",
        "test_linear_kl_div.py",
        "test_isa.py::test_half_values_and_rounding",
        "test_entropy.py",
        "test_exit_decision.py",
        "test_factorized_embedding.py",
    ]
    result = run_with(
        level,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        *tests,
        "-k",
        f"({chosen}) or half_values or rows_match or nearly or strides_match or first_of_equals",
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_the_instruction_set_can_be_named():
    code = "from bertops import _C; print(_C.cpu_isa)"
    assert run_with("baseline", "-c", code).stdout.strip() == "baseline"
    assert run_with("", "-c", code).stdout.strip() in LEVELS
    wrong = run_with(
        "sse9", "-c", "import bertops, torch; q = torch.ones(1, 1, 1, 1); bertops.attention(q, q, q)"
    )
    assert "BERTOPS_CPU_ISA" in wrong.stderr and "sse9" in wrong.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_values_and_rounding(dtype):
    """One key returns its value untouched; two equal keys return the mean, rounded to nearest even."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    values = torch.cat([values, values.new_zeros(-len(values) % 64)]).view(-1, 1, 1, 64)
    zeros = torch.zeros_like(values)
    out = bertops.attention(zeros, zeros, values)
    assert torch.equal(out.view(torch.int16) & 0x7FFF, values.view(torch.int16) & 0x7FFF)
    assert torch.equal(out, values)

    pairs = torch.cat([values, values[torch.randperm(len(values))].roll(1, -1)], 2)
    zeros = torch.zeros_like(pairs)
    mean = pairs.float().sum(2, keepdim=True) / 2
    expected = mean.to(dtype).expand_as(pairs)
    assert torch.equal(bertops.attention(zeros, zeros, pairs), expected)
