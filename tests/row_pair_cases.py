"""Inputs and comparisons that the tests of the losses between paired rows share."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import bertops
from attention_cases import padding_mask
from errors import assert_close_to_oracle

LOSSES = {
    "cosine_loss": bertops.cosine_loss,
    "normalized_mse": bertops.normalized_mse,
    "feature_map_transfer": bertops.feature_map_transfer,
    "kl_div_logits": bertops.kl_div_logits,
}
OPS = list(LOSSES)


@dataclass
class Case:
    """One call: sizes, dtypes of both models, which rows are real."""

    batch: int = 3
    length: int = 21
    width: int = 48
    dtype: torch.dtype = torch.float32
    dtype_t: torch.dtype | None = None
    padding: str | None = None
    reduction: str = "mean"
    noise: float | None = None  # the student is the teacher plus this much noise
    spread: float = 2.0
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"B{self.batch}N{self.length}H{self.width}", str(self.dtype).split(".")[1]]
        parts += [f"t{str(self.dtype_t).split('.')[1]}"] if self.dtype_t else []
        parts += [str(self.padding)] if self.padding else []
        parts += [self.reduction] if self.reduction != "mean" else []
        parts += [f"{name}{value}" for name, value in self.options.items()]
        return "-".join(parts)

    def inputs(self, device: str) -> tuple[list[Tensor], dict]:
        """Student and teacher, and the keyword arguments of the call."""
        shape = (self.batch, self.length, self.width)
        teacher = 0.5 + self.spread * torch.randn(shape)
        student = self.spread * torch.randn(shape) - 0.2
        if self.noise is not None:
            student = teacher.to(self.dtype_t or self.dtype).float() + self.noise * student
        options = {"reduction": self.reduction, **self.options}
        if self.padding:
            options["mask"] = padding_mask(self.padding, self.batch, self.length).to(device)
        pair = student.to(self.dtype), teacher.to(self.dtype_t or self.dtype)
        return [x.to(device) for x in pair], options


def call(op: str, inputs: list[Tensor], options: dict, impl: str) -> list[Tensor]:
    losses = LOSSES[op](*inputs, impl=impl, **options)
    return [losses] if isinstance(losses, Tensor) else list(losses)


def run(op: str, inputs: list[Tensor], options: dict, impl: str, dtype: torch.dtype | None = None) -> dict:
    """The losses, and the student's gradient for other upstream gradients than 1."""
    student, teacher = (x.detach().to(dtype or x.dtype) for x in inputs)
    losses = call(op, [student.requires_grad_(), teacher], options, impl)
    generator = torch.Generator().manual_seed(2)
    upstreams = [torch.rand(x.shape, generator=generator).add(0.5).to(x) for x in losses]
    (grad,) = torch.autograd.grad(losses, student, upstreams)
    return {f"loss {i}": x.detach() for i, x in enumerate(losses)} | {"grad": grad}


def on_cpu(options: dict) -> dict:
    return {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}


def truth(op: str, inputs: list[Tensor], options: dict) -> dict:
    return run(op, [x.cpu() for x in inputs], on_cpu(options), "reference", torch.float64)


def check(op: str, label: str, inputs: list[Tensor], options: dict, impl: str) -> None:
    """The kernel against the fp64 oracle, by the rule of errors.py."""
    actual = run(op, inputs, options, impl)
    forwards = run(op, inputs, options, "reference")
    backwards = run(op, [x.flip(-1) for x in inputs], options, "reference")
    backwards["grad"] = backwards["grad"].flip(-1)
    oracle = truth(op, inputs, options)
    dtype = inputs[0].dtype
    assert actual["grad"].dtype == dtype
    assert actual["loss 0"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, exact in oracle.items():
        eagers = [results[name].cpu() for results in (forwards, backwards)]
        assert_close_to_oracle(f"{op} {label} {name}", actual[name].cpu(), eagers, exact)
