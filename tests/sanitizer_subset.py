"""Every op once, forward and backward, on shapes that leave tiles half filled: what compute-sanitizer runs.

Usage: compute-sanitizer --tool memcheck python tests/sanitizer_subset.py [device]
"""

import sys

import torch

import bertops

LENGTHS = (37, 100)
OPTIONS = {
    "plain": {},
    "mask": {"mask": True},
    "window": {"window": 9},
    "dropout": {"dropout_p": 0.1, "mask": True},
    "packed": {"cu_seqlens": True},
}
LOSS_OPTIONS = ("plain", "mask", "packed")
# One block, blocks that wait for each other, a warp a row, a block a row.
ROWS = ((37, 3), (6000, 2), (70, 300), (9, 2051))
# Width and height: held in registers, in pieces, without a projection.
EMBEDDINGS = ((20, 40), (300, 72), (72, None))


def run(op, dtype: torch.dtype, length: int, head_dim: int, options: dict, device: str) -> None:
    batch = 1 if "cu_seqlens" in options else 2
    q, k, v = (torch.randn(batch, 2, length, head_dim, device=device, dtype=dtype) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    options = dict(options)
    if options.pop("mask", False):
        real = torch.tensor([[length], [length // 3]], device=device)
        options["mask"] = torch.arange(length, device=device) < real
    if options.pop("cu_seqlens", False):
        options["cu_seqlens"] = torch.tensor([0, 5, length], device=device, dtype=torch.int32)
    outputs = op(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert all(x.grad.isfinite().all() for x in inputs), (op.__name__, dtype, length, head_dim, options)


def run_rows(batch: int, classes: int, dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(batch, classes, device=device, dtype=dtype, requires_grad=True)
    bertops.entropy(logits).sum().backward()
    assert logits.grad.isfinite().all(), (batch, classes, dtype)
    decision = bertops.exit_decision(logits, 0.5)
    for width in (3, 40):
        hidden = torch.randn(batch, width, device=device, dtype=dtype)
        rows = bertops.compact(hidden, decision.order, decision.num_kept)
        assert torch.equal(rows.any(1), torch.arange(batch, device=device) < decision.num_kept)
        cu_seqlens = torch.arange(batch + 1, device=device, dtype=torch.int32)
        rows, _ = bertops.compact_packed(hidden[None], cu_seqlens, decision.order, batch, num_tokens=batch)
        assert torch.equal(rows[0], hidden[decision.order])


def run_embedding(width: int, height: int | None, dtype: torch.dtype, device: str) -> None:
    ids = torch.randint(0, 40, (3, 50), device=device)
    ids[ids < 20] = 3
    shapes = {"word": (40, width), "position": (50, width), "token_type": (2, width), "norm_weight": (width,)}
    if height is not None:
        shapes |= {"projection": (height, width), "projection_bias": (height,)}
    leaves = {
        name: torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    packed = {"cu_seqlens": torch.tensor([0, 7, 7, 50], device=device, dtype=torch.int32)}
    types = {"token_type_ids": ids % 2, "padding_idx": 3}
    for rows, options in ((ids, types), (ids[:1], packed)):
        out = bertops.factorized_embedding(rows, **leaves, **options, dropout_p=0.1)
        out.backward(torch.ones_like(out))
    assert all(x.grad.isfinite().all() for x in leaves.values()), (width, height, dtype)


def run_pair_loss(op, dtype: torch.dtype, length: int, head_dim: int, kind: str, device: str) -> None:
    batch = 1 if kind == "packed" else 2
    count = 1 if op is bertops.relation_kl else 2
    sizes = [head_dim] * count + [head_dim + 8] * count
    tensors = [torch.randn(batch, 2, length, size, device=device, dtype=dtype) for size in sizes]
    student = [x.requires_grad_() for x in tensors[:count]]
    options = {}
    if kind == "mask":
        options["mask"] = torch.arange(length, device=device) < torch.tensor([[length], [9]], device=device)
    if kind == "packed":
        options["cu_seqlens"] = torch.tensor([0, 5, length], device=device, dtype=torch.int32)
    op(*tensors, **options).backward()
    assert all(x.grad.isfinite().all() for x in student), (op.__name__, dtype, length, head_dim, kind)


def run_row_losses(width: int, dtype: torch.dtype, device: str) -> None:
    mask = torch.arange(37, device=device).expand(2, -1) < torch.tensor([[37], [9]], device=device)
    losses = bertops.cosine_loss, bertops.normalized_mse, bertops.feature_map_transfer
    for loss in losses:
        student, teacher = (torch.randn(2, 37, width, device=device, dtype=dtype) for _ in range(2))
        found = loss(student.requires_grad_(), teacher, mask)
        sum(found if isinstance(found, tuple) else (found,)).backward()
        assert student.grad.isfinite().all(), (loss.__name__, width, dtype)
    student, teacher = (torch.randn(37, width, device=device, dtype=dtype) for _ in range(2))
    bertops.kl_div_logits(student.requires_grad_(), teacher, temperature=2.0).backward()
    assert student.grad.isfinite().all(), ("kl_div_logits", width, dtype)


def run_linear_losses(outputs: int, dtype: torch.dtype, device: str) -> None:
    hidden_s, weight, hidden_t = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((37, 24), (outputs, 24), (37, outputs))
    )
    leaves = [hidden_s.requires_grad_(), weight.requires_grad_()]
    (
        bertops.linear_kl_div(*leaves, hidden_s.detach(), weight.detach() / 2)
        + bertops.projected_mse(hidden_s, hidden_t, weight)
    ).backward()
    assert all(x.grad.isfinite().all() for x in leaves), (outputs, dtype)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    torch.manual_seed(0)
    for op in (bertops.attention, bertops.attention_with_scores):
        for name, options in OPTIONS.items():
            for dtype, head_dim in ((torch.float32, 24), (torch.bfloat16, 64)):
                for length in LENGTHS:
                    run(op, dtype, length, head_dim, options, device)
            print(f"{op.__name__} {name}", flush=True)
    for batch, classes in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            run_rows(batch, classes, dtype, device)
        print(f"entropy, exit_decision, compact {batch} x {classes}", flush=True)
    for width, height in EMBEDDINGS:
        for dtype in (torch.float32, torch.bfloat16):
            run_embedding(width, height, dtype, device)
        print(f"factorized_embedding {width} to {height}", flush=True)
    for op in (bertops.attention_kl, bertops.relation_kl, bertops.attention_score_mse):
        for kind in LOSS_OPTIONS:
            for dtype, head_dim in ((torch.float32, 24), (torch.bfloat16, 56)):
                for length in LENGTHS:
                    run_pair_loss(op, dtype, length, head_dim, kind, device)
        print(op.__name__, flush=True)
    for width in (20, 5000):
        for dtype in (torch.float32, torch.bfloat16):
            run_row_losses(width, dtype, device)
            run_linear_losses(width, dtype, device)
        print(f"losses of rows and behind linear layers {width}", flush=True)


if __name__ == "__main__":
    main()
