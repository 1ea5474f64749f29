"""What is measured: synthetic shapes, and real ones whose Q, K and V a model produced from real text."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Mode = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = ("forward", "backward", "both")
Source = Literal["random", "docstrings", "modules"]

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """``source`` says where Q, K, V come from.

    Random numbers, or a layer of the model reading single docstrings (short, so mostly padding) or all
    docstrings of a module as one text (long); then the model and the text make heads, head dim and padding.
    """

    length: int
    batch: int = 4
    heads: int = 12
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    padding: float = 0.0
    source: Source = "random"
    modes: tuple[Mode, ...] = ("forward",)
    compiled: bool = False  # torch.compile takes seconds a shape: only where asked for
    overhead: bool = False  # the time of the call, not of the kernel

    @property
    def id(self) -> str:
        if self.source != "random":
            return f"{self.source}-B{self.batch}-N{self.length}-{DTYPE_NAMES[self.dtype]}"
        padded = f"-pad{self.padding:.0%}" if self.padding else ""
        shape = f"B{self.batch}-H{self.heads}-N{self.length}-D{self.head_dim}"
        return f"{shape}-{DTYPE_NAMES[self.dtype]}{padded}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": DTYPE_NAMES[self.dtype]}


@dataclass(frozen=True)
class Inputs:
    """q, k, v (B, H, N, D), mask (B, N) or None, and a line that says what they are."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    title: str


OVERHEAD = Case(16, batch=1, heads=1, head_dim=16, modes=("forward", "both"), overhead=True)

QUICK = [
    Case(128, batch=16, source="docstrings"),
    Case(512, source="modules", modes=("forward", "both")),
    Case(128),
    Case(512, modes=("forward", "both"), compiled=True),
    Case(512, padding=0.5),
    Case(512, dtype=torch.bfloat16),
    OVERHEAD,
]

QUICK_WITH_SCORES = [
    Case(512, source="modules", modes=("forward", "both")),
    Case(512, modes=("forward", "both"), compiled=True),
    Case(512, padding=0.5),
]


def full(device: str) -> list[Case]:
    """N from 128 to 2048 (8192 on a GPU) at a constant number of tokens; D, dtypes, padded and not."""
    tokens, longest = (16384, 8192) if device == "cuda" else (2048, 2048)
    lengths = [n for n in (128, 256, 512, 1024, 2048, 4096, 8192) if n <= longest]
    real = [
        *(Case(n, batch=16, source="docstrings", modes=MODES, compiled=True) for n in (64, 128)),
        *(Case(n, source="modules", modes=MODES, compiled=True) for n in (128, 256, 512)),
    ]
    synthetic = [
        Case(n, batch=tokens // n, dtype=dtype, padding=padding, modes=MODES, compiled=True)
        for dtype in (torch.float32, torch.bfloat16)
        for padding in (0.0, 0.5)
        for n in lengths
    ]
    head_dims = [
        Case(512, batch=tokens // 512, head_dim=head_dim, dtype=dtype, modes=MODES, compiled=True)
        for dtype in (torch.float32, torch.bfloat16)
        for head_dim in (32, 128)
    ]
    half = [Case(512, batch=tokens // 512, dtype=torch.float16, modes=MODES)]
    return [*real, *synthetic, *head_dims, *half, OVERHEAD]


def cases(op: str, quick: bool, device: str) -> list[Case]:
    if not quick:
        return full(device)
    return QUICK_WITH_SCORES if op == "attention_with_scores" else QUICK


def random_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.length, case.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, case.dtype) for _ in range(3))
    title = (
        f"B{case.batch} H{case.heads} N{case.length} D{case.head_dim} {DTYPE_NAMES[case.dtype]}"
        + (f", {case.padding:.0%} padding" if case.padding else "")
        + (" (overhead of a call)" if case.overhead else "")
    )
    mask = padded_mask(case, device) if case.padding else None
    return Inputs(q, k, v, mask, title)


def padded_mask(case: Case, device: torch.device) -> torch.Tensor:
    """(B, N): every row right-padded by the same share."""
    real = round(case.length * (1 - case.padding))
    return (torch.arange(case.length, device=device) < real).expand(case.batch, -1).contiguous()
