"""What is measured: synthetic shapes, and real ones whose Q, K and V a model produced from real text."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = ("forward", "backward", "both")
Source = Literal["random", "docstrings", "modules"]
Scope = Literal["quick", "lengths", "full"]

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Takes:
    """The projections that an op takes before the mask: of the model in training, and of its teacher."""

    student: str
    teacher: str = ""

    @property
    def leaf_names(self) -> list[str]:
        return [f"{letter}_s" if self.teacher else letter for letter in self.student]


QKV = Takes("qkv")
QK_PAIR = Takes("qk", "qk")
V_PAIR = Takes("v", "v")


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
    head_dim_t: int = 0  # the teacher's; 0: that of the student
    dtype: torch.dtype = torch.float32
    padding: float = 0.0
    source: Source = "random"
    modes: tuple[Mode, ...] = ("forward",)
    compiled: bool = False  # torch.compile takes seconds a shape: only where asked for
    chunked: bool = False  # no faster than eager
    overhead: bool = False  # the time of the call, not of the kernel

    @property
    def id(self) -> str:
        if self.source != "random":
            return f"{self.source}-B{self.batch}-N{self.length}-{DTYPE_NAMES[self.dtype]}"
        padded = f"-pad{self.padding:.0%}" if self.padding else ""
        teacher = f"-Dt{self.head_dim_t}" if self.head_dim_t else ""
        shape = f"B{self.batch}-H{self.heads}-N{self.length}-D{self.head_dim}{teacher}"
        return f"{shape}-{DTYPE_NAMES[self.dtype]}{padded}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": DTYPE_NAMES[self.dtype]}


@dataclass(frozen=True)
class Inputs:
    """What a call takes: tensors (B, H, N, D), mask (B, N) or None, and a line that says what they are."""

    leaves: tuple[Tensor, ...]  # get a gradient
    constants: tuple[Tensor, ...]  # a teacher's
    mask: Tensor | None
    title: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.leaves, *self.constants

    @property
    def length(self) -> int:
        return self.leaves[0].shape[2]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """``change`` applied to every tensor; the mask stays."""
        return replace(
            self,
            leaves=tuple(change(x) for x in self.leaves),
            constants=tuple(change(x) for x in self.constants),
        )

    def pick(self, part: Callable[[Tensor], Tensor]) -> "Inputs":
        """A ``part`` of the samples and heads, of the mask too."""
        mask = None if self.mask is None else part(self.mask[:, None])[:, 0]
        return replace(self.map(part), mask=mask)


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
    Case(512, source="modules", modes=("both",)),
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


MINILM_V2 = Case(512, batch=1, heads=48, head_dim=8, head_dim_t=16, modes=("both",))  # widths 384 and 768

QUICK_LOSSES = [
    Case(128, batch=8, modes=("both",)),
    Case(512, modes=("both",), compiled=True),
    Case(2048, batch=1, modes=("both",), chunked=True),
]
QUICK_OF_LOSS = {  # one each, as peers take a second a call
    "attention_score_mse": [Case(512, padding=0.5, modes=("both",))],
    "attention_kl": [Case(512, source="modules", modes=("both",))],
    "relation_kl": [Case(512, dtype=torch.bfloat16, modes=("both",)), MINILM_V2],
}


def lengths(
    dtype: torch.dtype = torch.float32, padding: float = 0.0, modes: tuple[Mode, ...] = ("both",)
) -> list[Case]:
    """N from 128 to 16384 at B * N = 2048, and B = 1 beyond."""
    return [
        Case(
            n,
            batch=max(1, 2048 // n),
            dtype=dtype,
            padding=padding,
            modes=modes,
            compiled=True,
            chunked=n > 128,
        )
        for n in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    ]


def full_losses() -> list[Case]:
    modes: tuple[Mode, ...] = ("forward", "both")
    real = [
        Case(128, batch=16, source="docstrings", modes=modes, compiled=True),
        Case(512, source="modules", modes=modes, compiled=True, chunked=True),
    ]
    synthetic = [
        case
        for dtype in (torch.float32, torch.bfloat16)
        for padding in (0.0, 0.5)
        for case in lengths(dtype, padding, modes)
    ]
    sizes = [
        Case(128, batch=8, modes=modes, compiled=True),
        Case(512, head_dim=26, head_dim_t=64, modes=modes, compiled=True),  # TinyBERT's 312 over 12 heads
        Case(512, dtype=torch.float16, modes=modes),
    ]
    return [*real, *synthetic, *sizes, replace(OVERHEAD, modes=modes)]


def cases(op: str, scope: Scope, device: str) -> list[Case]:
    if op in ("attention", "attention_with_scores"):
        quick = QUICK if op == "attention" else QUICK_WITH_SCORES
        return {"quick": quick, "lengths": [], "full": full(device)}[scope]
    if scope == "quick":
        return [*QUICK_LOSSES, *QUICK_OF_LOSS[op]]
    resplit = [MINILM_V2] if op == "relation_kl" and scope == "full" else []
    return [*(lengths() if scope == "lengths" else full_losses()), *resplit]


def random_inputs(takes: Takes, case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(head_dim: int) -> Tensor:
        shape = (case.batch, case.heads, case.length, head_dim)
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    leaves = tuple(draw(case.head_dim) for _ in takes.student)
    constants = tuple(draw(case.head_dim_t or case.head_dim) for _ in takes.teacher)
    title = (
        f"B{case.batch} H{case.heads} N{case.length} D{case.head_dim} "
        + (f"D_t{case.head_dim_t} " if case.head_dim_t else "")
        + DTYPE_NAMES[case.dtype]
        + (f", {case.padding:.0%} padding" if case.padding else "")
        + (" (overhead of a call)" if case.overhead else "")
    )
    mask = padded_mask(case, device) if case.padding else None
    return Inputs(leaves, constants, mask, title)


def padded_mask(case: Case, device: torch.device) -> Tensor:
    """(B, N): every row right-padded by the same share."""
    real = round(case.length * (1 - case.padding))
    return (torch.arange(case.length, device=device) < real).expand(case.batch, -1).contiguous()
