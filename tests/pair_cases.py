"""Inputs and comparisons that the tests of the losses between two models' attention share."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import bertops
from attention_cases import padding_mask
from bertops import reference
from errors import assert_close_to_oracle

LOSSES = {
    "attention_kl": bertops.attention_kl,
    "relation_kl": bertops.relation_kl,
    "attention_score_mse": bertops.attention_score_mse,
}


@dataclass
class Case:
    """One call: sizes of both models, dtypes and which rows are real."""

    batch: int = 2
    heads: int = 2
    length: int = 17
    head_dim: int = 16
    head_dim_t: int = 0  # 0: that of the student
    dtype: torch.dtype = torch.float32
    dtype_t: torch.dtype | None = None
    padding: str | None = None
    lengths: tuple[int, ...] | None = None
    reduction: str = "mean"
    options: dict = field(default_factory=dict)
    packed_projection: bool = False
    noise: float | None = None  # the student is the teacher plus this much noise

    def __str__(self) -> str:
        parts = [f"B{self.batch}H{self.heads}N{self.length}D{self.head_dim}", str(self.dtype).split(".")[1]]
        parts += [f"Dt{self.head_dim_t}"] if self.head_dim_t else []
        parts += [f"t{str(self.dtype_t).split('.')[1]}"] if self.dtype_t else []
        parts += [str(self.padding)] if self.padding else []
        parts += ["packed"] if self.lengths else []
        parts += [self.reduction] if self.reduction != "mean" else []
        parts += [f"{name}{value}" for name, value in self.options.items()]
        parts += [f"noise{self.noise}"] if self.noise is not None else []
        return "-".join(parts + (["qkv"] if self.packed_projection else []))

    def inputs(self, device: str) -> tuple[list[Tensor], dict]:
        """q_s, k_s with gradients, q_t, k_t, and the keyword arguments of the call."""
        teacher = self._model(self.head_dim_t or self.head_dim, self.dtype_t or self.dtype, device)
        if self.noise is None:
            student = self._model(self.head_dim, self.dtype, device)
        else:
            student = [(x + self.noise * torch.randn_like(x)).to(self.dtype) for x in teacher]
        options = {"reduction": self.reduction, **self.options}
        if self.padding:
            options["mask"] = padding_mask(self.padding, self.batch, self.length).to(device)
        if self.lengths is not None:
            offsets = torch.tensor((0, *self.lengths)).cumsum(0)
            options["cu_seqlens"] = offsets.to(torch.int32).to(device)
        return [*(x.detach().requires_grad_() for x in student), *teacher], options

    def _model(self, head_dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
        packed = torch.randn(self.batch, self.length, 3, self.heads, head_dim).to(dtype).to(device)
        qk = list(packed.permute(2, 0, 3, 1, 4))[:2]
        return qk if self.packed_projection else [x.contiguous() for x in qk]


def run(op: str, inputs: list[Tensor], options: dict, impl: str, dtype: torch.dtype | None = None) -> dict:
    """The loss and the student's gradients; ``relation_kl`` takes q alone of both models."""
    if op == "relation_kl":
        inputs = inputs[::2]
    student = len(inputs) // 2
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(i < student) for i, x in enumerate(inputs)]
    loss = call(op, leaves, options, impl)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.rand(loss.shape, generator=generator).add(0.5).to(loss)
    loss.backward(upstream)
    names = ("dx_s",) if op == "relation_kl" else ("dq_s", "dk_s")
    results = {"loss": loss.detach()}
    return results | {name: x.grad for name, x in zip(names, leaves[:student], strict=True)}


def call(op: str, leaves: list[Tensor], options: dict, impl: str) -> Tensor:
    if impl == "reference":
        options = {name: value for name, value in options.items() if name not in ("lse_s", "lse_t")}
    return LOSSES[op](*leaves, impl=impl, **options)


def flipped(x: Tensor, heads: int | None) -> Tensor:
    """The head dims (of relation heads) backwards: sums over them run in the other order."""
    if heads is None:
        return x.flip(-1)
    split = x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).flip(-1)
    return split.flatten(2).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def check(op: str, case: Case, kernel: tuple[str, str]) -> None:
    """The kernel against the fp64 oracle, by the rule of errors.py."""
    impl, device = kernel
    compare(op, str(case), *case.inputs(device), impl)


def compare(op: str, label: str, inputs: list[Tensor], options: dict, impl: str) -> None:
    heads = options.get("num_relation_heads")
    actual = run(op, inputs, options, impl)
    forwards = run(op, inputs, options, "reference")
    backwards = run(op, [flipped(x.detach(), heads) for x in inputs], options, "reference")
    backwards = {name: x if name == "loss" else flipped(x, heads) for name, x in backwards.items()}
    on_cpu = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    oracle = run(op, [x.detach().cpu() for x in inputs], on_cpu, "reference", torch.float64)
    for name in actual:
        eagers = [results[name].cpu() for results in (forwards, backwards)]
        assert_close_to_oracle(f"{op} {label} {name}", actual[name].cpu(), eagers, oracle[name])


def reference_rows(op: str, inputs: list[Tensor], options: dict) -> Tensor:
    """(B, H, N) in fp64, of inputs on any device."""
    names = ("mask", "cu_seqlens", "scale_s", "scale_t")
    plain = [options.get(name) for name in names]
    rows = getattr(reference, op)(*(x.detach().double() for x in inputs), *plain)
    return rows if isinstance(rows, Tensor) else rows[0]
