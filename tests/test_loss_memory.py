"""Losses hold nothing of size N x N, forward or backward, and are right where a map would not fit."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.memory import peak_extra_bytes
from pair_cases import LOSSES

OPS = sorted(LOSSES)
SAMPLE = (0, 777, -8193, -1)
PART = 512
PAGES = 2**21  # the system counts pages in batches

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(op: str, batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype):
    """Inputs, gradients of the sum, and bytes at the peak beyond the inputs."""
    torch.use_deterministic_algorithms(False)  # NaN-filled memory is touched memory
    count = 2 if op == "relation_kl" else 4
    inputs = [torch.randn(batch, heads, length, head_dim).to(dtype) for _ in range(count)]
    students = [x.requires_grad_() for x in inputs[: count // 2]]
    small = [x[:1, :1, :300] for x in inputs]
    torch.autograd.grad(LOSSES[op](*small), students)  # what a first call keeps for good
    grads: list[Tensor] = []
    extra = peak_extra_bytes(
        torch.device("cpu"),
        lambda: grads.extend(torch.autograd.grad(LOSSES[op](*inputs, reduction="sum"), students)),
    )
    return [x.detach() for x in inputs], grads, extra


@linux
@pytest.mark.parametrize(
    "shape",
    [
        (2, 12, 1024, 64, torch.float32),
        (8, 12, 128, 64, torch.float32),
        (1, 12, 4096, 64, torch.bfloat16),
        (1, 48, 1024, 16, torch.float32),
    ],
    ids=lambda shape: "B{}H{}N{}D{}-{}".format(*shape),
)
@pytest.mark.parametrize("op", OPS)
def test_extra_memory_is_three_times_the_inputs(op, shape):
    """And a few numbers for every row."""
    inputs, _, extra = run(op, *shape)
    input_bytes = sum(x.numel() * x.element_size() for x in inputs)
    rows = shape[0] * shape[1] * shape[2]
    assert extra <= 3 * input_bytes + 4 * 4 * rows + PAGES


@linux
@pytest.mark.parametrize("op", OPS)
def test_16384_tokens_within_two_gigabytes_and_right(op):
    inputs, grads, extra = run(op, 1, 12, 16384, 64, torch.float32)
    assert extra + sum(x.numel() * x.element_size() for x in inputs) <= 2 * 10**9
    for grad, exact in zip(grads, sampled_grads(op, inputs), strict=True):
        sampled = grad[0, 0, torch.tensor(SAMPLE)]
        assert (sampled - exact).norm() <= 1e-5 * exact.norm()


def sampled_grads(op: str, inputs: list[Tensor]) -> list[Tensor]:
    """The first head's gradients of the sum at the sampled rows, in fp64."""
    heads = [x[0, 0].double() for x in inputs]
    q_s, k_s, q_t, k_t = (heads[0], heads[0], heads[1], heads[1]) if op == "relation_kl" else heads
    scale, sample = q_s.shape[1] ** -0.5, torch.tensor(SAMPLE)

    def score_grads(rows: Tensor) -> Tensor:
        scores_s, scores_t = q_s[rows] @ k_s.T * scale, q_t[rows] @ k_t.T * scale
        if op == "attention_score_mse":
            return 2 * scale * (scores_s - scores_t)
        return scale * (scores_s.softmax(-1) - scores_t.softmax(-1))

    dq = score_grads(sample) @ k_s
    dk = torch.zeros_like(dq)
    for rows in torch.arange(len(q_s)).split(PART):
        dk += score_grads(rows)[:, sample].T @ q_s[rows]
    return [dq + dk] if op == "relation_kl" else [dq, dk]
