"""Inputs and comparisons that the tests of both attention ops share."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import bertops
from bertops import reference
from bertops.ops.attention import prepare
from errors import assert_close_to_oracle

OPS = {"attention": bertops.attention, "attention_with_scores": bertops.attention_with_scores}


@dataclass
class Case:
    """One call: sizes, dtype and which rows are real."""

    batch: int = 2
    heads: int = 2
    length: int = 17
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    padding: str | None = None
    lengths: tuple[int, ...] | None = None
    options: dict = field(default_factory=dict)
    packed_projection: bool = False

    def __str__(self) -> str:
        parts = [f"B{self.batch}H{self.heads}N{self.length}D{self.head_dim}", str(self.dtype).split(".")[1]]
        parts += [str(self.padding)] if self.padding else []
        parts += ["packed"] if self.lengths else []
        parts += [f"{name}{value}" for name, value in self.options.items()]
        return "-".join(parts + (["qkv"] if self.packed_projection else []))

    def inputs(self, device: str) -> tuple[list[Tensor], dict]:
        """q, k, v with gradients, and the keyword arguments of the call."""
        shape = (self.batch, self.length, 3, self.heads, self.head_dim)
        packed = torch.randn(shape, dtype=torch.float32).to(self.dtype).to(device)
        qkv = list(packed.permute(2, 0, 3, 1, 4))
        if not self.packed_projection:
            qkv = [x.contiguous() for x in qkv]
        options = dict(self.options)
        if self.padding:
            options["mask"] = padding_mask(self.padding, self.batch, self.length).to(device)
        if self.lengths is not None:
            offsets = torch.tensor((0, *self.lengths)).cumsum(0)
            options["cu_seqlens"] = offsets.to(torch.int32).to(device)
        return [x.detach().requires_grad_() for x in qkv], options


def padding_mask(kind: str, batch: int, length: int) -> Tensor:
    position = torch.arange(length).expand(batch, length)
    real = torch.tensor([max(1, length * (row + 1) // (batch + 1)) for row in range(batch)])[:, None]
    return {
        "right": position < real,
        "left": position >= length - real,
        "holes": (position * 7 + torch.arange(batch)[:, None]) % 5 > 1,
        "nothing": torch.zeros(batch, length, dtype=torch.bool),
        "one row empty": (position < real) & (torch.arange(batch) > 0)[:, None],
        "integer": (position < real).long() * 3,
    }[kind]


def call_reference(
    op: str, q: Tensor, k: Tensor, v: Tensor, seed: Tensor, options: dict
) -> tuple[Tensor, ...]:
    """The oracle behind the public function's own argument handling, with the dropout seed given."""
    names = ("mask", "cu_seqlens", "window", "scale")
    plain = [options.get(name) for name in names]
    *arguments, _ = prepare(q, k, v, *plain, options.get("dropout_p", 0.0))
    if op == "attention":
        return reference.attention(*arguments, seed)
    out, lse, scores = reference.attention_with_scores(*arguments, seed, options.get("scores_dtype"))
    return out, scores, lse


def draw_seed(device: str) -> Tensor:
    """The seed that a call draws after ``torch.manual_seed(1)``."""
    torch.manual_seed(1)
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def run(
    op: str,
    qkv: list[Tensor],
    options: dict,
    impl: str,
    dtype: torch.dtype | None = None,
    flip_upstream: bool = False,
) -> dict:
    """Outputs and gradients of one call, with upstream gradients for every output.

    The dropout seed and the upstream gradients are the same for every implementation, device and dtype.
    """
    dtype = dtype or qkv[0].dtype
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv]
    if impl == "reference":
        device = qkv[0].device
        outputs = call_reference(
            op, *inputs, draw_seed(options.get("seed_device", device)).to(device), options
        )
    else:
        torch.manual_seed(1)
        outputs = OPS[op](*inputs, return_lse=True, impl=impl, **options)
    names = ("out", "lse") if op == "attention" else ("out", "scores", "lse")
    results = dict(zip(names, outputs, strict=True))
    generator = torch.Generator().manual_seed(2)
    upstream = {}
    for name in names:
        noise = torch.randn(results[name].shape, generator=generator).to(qkv[0].dtype)
        upstream[name] = (unflip(name, noise) if flip_upstream else noise).to(results[name])
    # a masked row's lse is -inf and has no gradient to give
    upstream["lse"] = torch.where(results["lse"].isfinite(), upstream["lse"], 0.0)
    torch.autograd.backward(list(results.values()), [upstream[name] for name in names])
    gradients = {f"d{name}": x.grad for name, x in zip("qkv", inputs, strict=True)}
    return {name: x.detach() for name, x in {**results, **gradients}.items()}


def run_eager(op: str, qkv: list[Tensor], options: dict) -> list[dict]:
    """The reference in the inputs' own dtype, summing over the head dim forwards and backwards."""
    forwards = run(op, qkv, options, "reference")
    flipped = run(op, [x.detach().flip(-1) for x in qkv], options, "reference", flip_upstream=True)
    return [forwards, {name: unflip(name, x) for name, x in flipped.items()}]


def unflip(name: str, x: Tensor) -> Tensor:
    return x.flip(-1) if name in ("out", "dq", "dk", "dv") else x


def check(op: str, case: Case, kernel: tuple[str, str]) -> None:
    """The kernel against the fp64 oracle, by the rule of errors.py."""
    impl, device = kernel
    compare(op, str(case), *case.inputs(device), impl, device)


def compare(op: str, label: str, qkv: list[Tensor], options: dict, impl: str, device: str) -> None:
    actual = run(op, qkv, options, impl)
    eagers = run_eager(op, qkv, options)
    on_cpu = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    if "scores_dtype" in options:
        on_cpu["scores_dtype"] = torch.float64
    on_cpu["seed_device"] = device
    oracle = run(op, [x.detach().cpu() for x in qkv], on_cpu, "reference", torch.float64)
    for name in actual:
        eager = [results[name].cpu() for results in eagers]
        assert_close_to_oracle(f"{op} {label} {name}", actual[name].cpu(), eager, oracle[name])
