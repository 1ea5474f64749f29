"""Peak memory of one loss, forward and backward, in a process of its own; with --sampled its errors too.

    python tests/loss_memory.py attention_kl --batch 1 --heads 12 --length 16384 --head-dim 64 --sampled

Prints JSON: bytes of the inputs, bytes at the peak beyond them, bytes of the whole process at its peak, and
with --sampled the relative error of sampled rows of every gradient against fp64.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.memory import peak_extra_bytes, resident  # noqa: E402  (of the repository)
from pair_cases import LOSSES  # noqa: E402

SAMPLE = (0, 777, -8193, -1)
PART = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=LOSSES)
    for name, value in (("batch", 1), ("heads", 12), ("length", 2048), ("head-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--sampled", action="store_true")
    wanted = parser.parse_args()
    torch.manual_seed(0)
    shape = (wanted.batch, wanted.heads, wanted.length, wanted.head_dim)
    count = 2 if wanted.op == "relation_kl" else 4
    inputs = [torch.randn(shape, dtype=torch.float32).to(getattr(torch, wanted.dtype)) for _ in range(count)]
    students = [x.requires_grad_() for x in inputs[: count // 2]]
    loss = LOSSES[wanted.op]
    small = [x[:1, :1, :300] for x in inputs]
    torch.autograd.grad(loss(*small), students)  # what a first call keeps for good

    grads = []
    extra = peak_extra_bytes(
        torch.device("cpu"),
        lambda: grads.extend(torch.autograd.grad(loss(*inputs, reduction="sum"), students)),
    )
    results = {
        "inputs": sum(x.numel() * x.element_size() for x in inputs),
        "extra": extra,
        "process": resident("VmHWM"),
    }
    if wanted.sampled:
        results["errors"] = sampled_errors(wanted.op, [x.detach() for x in inputs], grads)
    print(json.dumps(results))


def sampled_errors(op: str, inputs: list[Tensor], grads: list[Tensor]) -> list[float]:
    """Relative error norms of the first head's gradients at the sampled rows."""
    heads = [x[0, 0].double() for x in inputs]
    q_s, k_s, q_t, k_t = (heads[0], heads[0], heads[1], heads[1]) if op == "relation_kl" else heads
    length = len(q_s)
    sample = torch.tensor([i % length for i in SAMPLE])
    dq = score_grads(op, q_s[sample], k_s, q_t[sample], k_t) @ k_s
    dk = torch.zeros_like(dq)
    for rows in torch.arange(length).split(PART):
        dk += score_grads(op, q_s[rows], k_s, q_t[rows], k_t)[:, sample].T @ q_s[rows]
    exact = [dq + dk] if op == "relation_kl" else [dq, dk]
    scale = q_s.shape[1] ** -0.5
    return [
        float((grad[0, 0, sample] - scale * x).norm() / (scale * x).norm())
        for grad, x in zip(grads, exact, strict=True)
    ]


def score_grads(op: str, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """Gradient of the sum of the loss with respect to the student's scores."""
    scores_s, scores_t = q_s @ k_s.T * q_s.shape[1] ** -0.5, q_t @ k_t.T * q_t.shape[1] ** -0.5
    if op == "attention_score_mse":
        return 2 * (scores_s - scores_t)
    return scores_s.softmax(-1) - scores_t.softmax(-1)


if __name__ == "__main__":
    main()
