"""Inputs and comparisons of the tests of ``factorized_embedding``."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import bertops
from errors import assert_close_to_oracle


@dataclass
class Case:
    """One call. ``rows`` of word, position and token_type, 0: no such table; ``height`` 0: no projection."""

    batch: int = 2
    length: int = 9
    width: int = 12
    height: int = 20
    rows: tuple[int, int, int] = (30, 16, 3)
    dtype: torch.dtype = torch.float32
    projection_dtype: torch.dtype | None = None
    norm: bool = True
    bias: bool = True
    ids: str = "uniform"  # or "skewed": half of them equal; "one": all of them
    id_dtype: torch.dtype = torch.int64
    position_ids: int | None = None  # rows of (B, N) ids: batch or 1
    token_type_ids: int | None = None
    lengths: tuple[int, ...] | None = None  # packed sequences
    strided: bool = False  # every table inside a wider one, ids too
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"B{self.batch}N{self.length}E{self.width}H{self.height}", str(self.dtype).split(".")[1]]
        parts += ["V{}P{}T{}".format(*self.rows)] if self.rows != Case.rows else []
        parts += [f"A{str(self.projection_dtype).split('.')[1]}"] if self.projection_dtype else []
        parts += [] if self.norm else ["no-norm"]
        parts += [] if self.bias else ["no-bias"]
        parts += [self.ids] if self.ids != "uniform" else []
        parts += ["int32"] if self.id_dtype == torch.int32 else []
        parts += [f"p{self.position_ids}"] if self.position_ids else []
        parts += [f"t{self.token_type_ids}"] if self.token_type_ids else []
        parts += ["packed"] if self.lengths else []
        parts += ["strided"] if self.strided else []
        return "-".join(parts + [f"{name}{value}" for name, value in self.options.items()])

    def inputs(self, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor], dict]:
        """input_ids, the parameters that exist by name, and the other keyword arguments."""
        word, position, token_type = self.rows
        shapes = {
            "word": (word, self.width),
            "position": (position, self.width) if position else None,
            "token_type": (token_type, self.width) if token_type else None,
            "norm_weight": (self.width,) if self.norm else None,
            "norm_bias": (self.width,) if self.norm else None,
            "projection": (self.height, self.width) if self.height else None,
            "projection_bias": (self.height,) if self.height and self.bias else None,
        }
        parameters = {
            name: self._parameter(name, shape).to(device) for name, shape in shapes.items() if shape
        }
        options = dict(self.options)
        for name, rows, table in (
            ("position_ids", self.position_ids, position),
            ("token_type_ids", self.token_type_ids, token_type),
        ):
            if rows:
                options[name] = self._strided(torch.randint(0, table, (rows, self.length))).to(device)
        if self.lengths is not None:
            offsets = torch.tensor((0, *self.lengths)).cumsum(0)
            options["cu_seqlens"] = offsets.to(torch.int32).to(device)
        input_ids = torch.randint(0, word, (self.batch, self.length))
        if self.ids != "uniform":
            share = 0.5 if self.ids == "skewed" else 2.0
            input_ids[torch.rand(input_ids.shape) < share] = word // 2
        return self._strided(input_ids).to(device), parameters, options

    def _parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        projects = name.startswith("projection")
        x = torch.randn(shape) + (1.0 if name == "norm_weight" else 0.0)
        x = x.to((self.projection_dtype or self.dtype) if projects else self.dtype)
        if not self.strided:
            return x
        wider = torch.full((*shape[:-1], 2 * shape[-1] + 3), float("nan"), dtype=x.dtype)
        if name == "token_type" or len(shape) == 1:  # a last stride of 2
            wider[..., : 2 * shape[-1] : 2] = x
            return wider[..., : 2 * shape[-1] : 2]
        wider[..., 1 : 1 + shape[-1]] = x
        return wider[..., 1 : 1 + shape[-1]]

    def _strided(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.id_dtype)
        if not self.strided:
            return ids
        wider = torch.full((ids.shape[1], 3, ids.shape[0]), -7, dtype=ids.dtype)
        wider[:, 1] = ids.T
        return wider[:, 1].T


def call(input_ids: Tensor, parameters: dict[str, Tensor], options: dict, impl: str) -> Tensor:
    """The same dropout in every call: its seed comes from the generator."""
    torch.manual_seed(5)
    return bertops.factorized_embedding(input_ids, **parameters, **options, impl=impl)


def upstream_of(out: Tensor) -> Tensor:
    """The same numbers in every dtype."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-32, 33, out.shape, generator=generator).div(16).to(out)


def run(
    input_ids: Tensor,
    parameters: dict[str, Tensor],
    options: dict,
    impl: str,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The output and the gradient of every parameter."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in parameters.items()}
    out = call(input_ids, leaves, options, impl)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream_of(out))
    grads = [grad.to_dense() for grad in grads]
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def flipped(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything of width E backwards: sums over it run in the other order."""
    return {name: x if name == "projection_bias" else x.flip(-1) for name, x in parameters.items()}


def check(case: Case, kernel: tuple[str, str]) -> None:
    """The kernel against the fp64 oracle, by the rule of errors.py."""
    impl, device = kernel
    if kernel == ("triton", "cpu") and case.height and torch.bfloat16 in (case.dtype, case.projection_dtype):
        pytest.skip("bf16 products are wrong in Triton's interpreter")
    input_ids, parameters, options = case.inputs(device)
    compare(str(case), input_ids, parameters, options, impl)


def compare(label: str, input_ids: Tensor, parameters: dict[str, Tensor], options: dict, impl: str) -> None:
    actual = run(input_ids, parameters, options, impl)
    dense = {name: x for name, x in options.items() if name != "sparse"}
    # on the device of the kernel, whose generator draws the seed of dropout
    oracle = run(input_ids, parameters, dense, "reference", torch.float64)
    eagers = [run(input_ids, parameters, dense, "reference")]
    if not options.get("dropout_p"):  # what drops is not backwards
        backwards = run(input_ids, flipped(parameters), dense, "reference")
        if "projection" not in parameters:
            backwards["out"] = backwards["out"].flip(-1)
        out = backwards.pop("out")
        eagers.append({"out": out, **flipped(backwards)})
    for name, result in actual.items():
        assert result.dtype == oracle_dtype(name, parameters), name
        label_of = f"factorized_embedding {label} {name}"
        assert_close_to_oracle(label_of, result, [e[name] for e in eagers], oracle[name])


def oracle_dtype(name: str, parameters: dict[str, Tensor]) -> torch.dtype:
    last = "projection" if "projection" in parameters else "word"
    return parameters[last if name == "out" else name].dtype
