"""Inputs and comparisons that the tests of ``linear_kl_div`` and ``projected_mse`` share."""

from dataclasses import dataclass

import torch
from torch import Tensor

import bertops
from errors import assert_close_to_oracle

OPS = ("linear_kl_div", "projected_mse")
STUDENT = ("hidden_s", "weight_s", "bias_s")


@dataclass(frozen=True)
class Case:
    """One call: ``outputs`` are the words of a vocabulary, or the teacher's width."""

    rows: tuple[int, ...] = (2, 17)
    outputs: int = 50
    width: int = 24
    width_t: int = 0  # 0: that of the student; of linear_kl_div alone
    dtype: torch.dtype = torch.float32
    dtype_t: torch.dtype | None = None
    masked: bool = False
    bias: bool = True
    temperature: float = 1.0
    reduction: str = "mean"
    spread: float = 1.0  # of the logits
    noise: float | None = None  # the student is the teacher plus this much noise

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.rows)), f"V{self.outputs}", f"H{self.width}"]
        parts += [f"Ht{self.width_t}"] if self.width_t else []
        parts += [str(self.dtype).split(".")[1]]
        parts += [f"t{str(self.dtype_t).split('.')[1]}"] if self.dtype_t else []
        parts += ["masked"] if self.masked else []
        parts += [] if self.bias else ["no bias"]
        parts += [f"T{self.temperature}"] if self.temperature != 1 else []
        parts += [self.reduction] if self.reduction != "mean" else []
        return "-".join(parts + ([f"noise{self.noise}"] if self.noise is not None else []))

    def inputs(self, op: str, device: str = "cpu") -> tuple[list[Tensor | None], list[Tensor | None], dict]:
        """The student's three with gradients, the teacher's tensors, and the keyword arguments."""
        width_t = self.width_t or self.width
        teacher = self._linear(width_t, self.dtype_t or self.dtype)
        if self.noise is None:
            student = self._linear(self.width, self.dtype)
        else:
            student = [x if x is None else x + self.noise * torch.randn_like(x) for x in teacher]
        if op == "projected_mse":
            teacher = [torch.randn(*self.rows, self.outputs).to(self.dtype_t or self.dtype)]
        leaves = [x if x is None else x.to(device).requires_grad_() for x in student]
        options: dict = {"reduction": self.reduction}
        if op == "linear_kl_div":
            options["temperature"] = self.temperature
        if self.masked:
            mask = torch.rand(self.rows) < 0.6
            mask.view(-1)[0], mask.view(-1)[-1] = False, True
            options["mask"] = mask.to(device)
        return leaves, [x if x is None else x.to(device) for x in teacher], options

    def _linear(self, width: int, dtype: torch.dtype) -> list[Tensor | None]:
        hidden = torch.randn(*self.rows, width).to(dtype)
        weight = (self.spread * width**-0.5 * torch.randn(self.outputs, width)).to(dtype)
        return [hidden, weight, torch.randn(self.outputs).to(dtype) if self.bias else None]


def call(op: str, student: list, teacher: list, options: dict, impl: str) -> Tensor:
    hidden, weight, bias = student
    if op == "projected_mse":
        return bertops.projected_mse(hidden, teacher[0], weight, bias, impl=impl, **options)
    hidden_t, weight_t, bias_t = teacher
    biases = {"bias_s": bias, "bias_t": bias_t}
    return bertops.linear_kl_div(hidden, weight, hidden_t, weight_t, **biases, impl=impl, **options)


def upstream_of(loss: Tensor) -> Tensor:
    return torch.rand(loss.shape, generator=torch.Generator().manual_seed(2)).add(0.5).to(loss)


def run(op: str, student: list, teacher: list, options: dict, impl: str, dtype=None) -> dict[str, Tensor]:
    """The loss and the student's gradients."""
    leaves = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in student]
    teacher = [x if x is None or dtype is None else x.to(dtype) for x in teacher]
    loss = call(op, leaves, teacher, options, impl)
    loss.backward(upstream_of(loss))
    grads = {f"d{name}": x.grad for name, x in zip(STUDENT, leaves, strict=True) if x is not None}
    return {"loss": loss.detach()} | grads


def flipped(op: str, student: list, teacher: list) -> tuple[list, list]:
    """Widths backwards: sums over them run in the other order."""

    def flip(hidden, weight, bias):
        return [hidden.flip(-1), None if weight is None else weight.flip(-1), bias]

    return flip(*(x if x is None else x.detach() for x in student)), (
        flip(*teacher) if op == "linear_kl_div" else teacher
    )


def to_cpu(x):
    return x.detach().cpu() if isinstance(x, Tensor) else x


def check(op: str, case: Case, kernel: tuple[str, str]) -> None:
    """The kernel against the fp64 oracle, by the rule of errors.py."""
    impl, device = kernel
    compare(op, str(case), *case.inputs(op, device), impl)


def compare(op: str, label: str, student: list, teacher: list, options: dict, impl: str) -> None:
    actual = run(op, student, teacher, options, impl)
    forwards = run(op, student, teacher, options, "reference")
    backwards = run(op, *flipped(op, student, teacher), options, "reference")
    for name in ("dhidden_s", "dweight_s"):
        if name in backwards:
            backwards[name] = backwards[name].flip(-1)
    on_cpu = {name: to_cpu(x) for name, x in options.items()}
    inputs = [to_cpu(x) for x in student], [to_cpu(x) for x in teacher]
    oracle = run(op, *inputs, on_cpu, "reference", torch.float64)
    for name in actual:
        eagers = [results[name].cpu() for results in (forwards, backwards)]
        assert_close_to_oracle(f"{op} {label} {name}", actual[name].cpu(), eagers, oracle[name])
