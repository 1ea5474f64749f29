"""What is measured: synthetic shapes, and real ones whose Q, K and V a model produced from real text."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Mode = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = ("forward", "backward", "both")
Source = Literal["random", "docstrings", "modules"]
Scope = Literal["quick", "lengths", "full"]

WHOLE_LENGTH = 2048  # results of longer inputs are always checked in part
SLICE_PAIRS = 2**24  # elements of an N x N map in fp64 that the reference holds at a time
SAMPLE_PAIRS = 2**22  # elements of such maps that a sample compares

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Takes:
    """The tensors that an op takes: of the model in training, which get a gradient, and of its teacher."""

    student: str | tuple[str, ...]  # letters, or longer names
    teacher: str = ""

    @property
    def leaf_names(self) -> list[str]:
        return [f"{name}_s" if self.teacher else name for name in self.student]


QKV = Takes("qkv")
QK_PAIR = Takes("qk", "qk")
V_PAIR = Takes("v", "v")


@dataclass(frozen=True)
class Inputs:
    """What a call takes, and a line that says what that is."""

    leaves: tuple[Tensor, ...]  # get a gradient
    constants: tuple[Tensor, ...]  # a teacher's
    title: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.leaves, *self.constants

    @property
    def extra(self) -> tuple[Any, ...]:
        """What the reference takes after the tensors."""
        return ()

    @property
    def too_large(self) -> bool:
        """To be checked whole in any run."""
        return False

    @property
    def reversible(self) -> bool:
        """Whether the reference with every last dim backwards gives its results backwards."""
        return True

    @property
    def map_elements(self) -> int:
        """Of one map of all heads."""
        return 0

    def part(self, x: Tensor) -> Tensor:
        """What a quick run checks of a tensor or of a result."""
        return x

    def groups(self) -> list[list[Any]]:
        """Indices of what the reference computes at a time: rows of the first two dims of every tensor."""
        return [[...]]

    def at(self, here: Any) -> "Inputs":
        return self.map(lambda x: x[here])

    def compared(self, name: str, x: Tensor) -> Tensor:
        """What the check looks at of the result ``name``."""
        return x

    def map(self: "AnyInputs", change: Callable[[Tensor], Tensor]) -> "AnyInputs":
        """``change`` applied to every tensor."""
        return replace(
            self,
            leaves=tuple(change(x) for x in self.leaves),
            constants=tuple(change(x) for x in self.constants),
        )

    def pick(self, part: Callable[[Tensor], Tensor]) -> "Inputs":
        """A ``part`` of every tensor and of what goes with it."""
        return self.map(part)


AnyInputs = TypeVar("AnyInputs", bound=Inputs)


@dataclass(frozen=True)
class HeadInputs(Inputs):
    """Tensors (B, H, N, D), and a mask (B, N) or None."""

    mask: Tensor | None = None

    @property
    def length(self) -> int:
        return self.leaves[0].shape[2]

    @property
    def extra(self) -> tuple[Any, ...]:
        return (self.mask,)

    @property
    def too_large(self) -> bool:
        return self.length > WHOLE_LENGTH

    @property
    def map_elements(self) -> int:
        return self.leaves[0].shape[:3].numel() * self.length

    def part(self, x: Tensor) -> Tensor:
        """Two samples and up to four heads of (B, H, N, ...), at least one."""
        batch, heads, length = x.shape[:3]
        kept = min(4, max(1, SAMPLE_PAIRS // (min(batch, 2) * length**2)))
        return x[:: max(1, batch // 2), :: max(1, heads // kept)][:2, :kept]

    def groups(self) -> list[list[Any]]:
        """Sample by sample, as many heads as their maps leave room for."""
        batch, heads, length, _ = self.leaves[0].shape
        group = max(1, min(heads, SLICE_PAIRS // length**2))
        return [
            [(slice(b, b + 1), slice(h, h + group)) for h in range(0, heads, group)] for b in range(batch)
        ]

    def at(self, here: Any) -> "HeadInputs":
        mask = None if self.mask is None else self.mask[here[0]]
        return replace(self.map(lambda x: x[here]), mask=mask)

    def compared(self, name: str, x: Tensor) -> Tensor:
        """Rows of padding are left out of ``out``: bertops makes them 0, its peers leave a number there."""
        if name == "out" and self.mask is not None:
            return x.masked_fill(~self.mask[:, None, :, None], 0.0)
        return x

    def pick(self, part: Callable[[Tensor], Tensor]) -> "HeadInputs":
        mask = None if self.mask is None else part(self.mask[:, None])[:, 0]
        return replace(self.map(part), mask=mask)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every kind of case says; subclasses add the sizes, and draw random tensors of them."""

    dtype: torch.dtype = torch.float32
    source: Source = "random"
    modes: tuple[Mode, ...] = ("forward",)
    compiled: bool = False  # torch.compile takes seconds a shape: only where asked for
    overhead: bool = False  # the time of the call, not of the kernel

    @property
    def sizes(self) -> str:
        """Such as B4-C2."""
        raise NotImplementedError

    @property
    def id(self) -> str:
        return f"{self.sizes}-{DTYPE_NAMES[self.dtype]}"

    @property
    def title(self) -> str:
        overhead = " (overhead of a call)" if self.overhead else ""
        return f"{self.sizes.replace('-', ' ')} {DTYPE_NAMES[self.dtype]}{overhead}"

    @property
    def curve(self) -> str:
        """What it has in common with the cases of other lengths that belong to the same curve, if any."""
        return ""

    def draw(self, takes: Takes, device: torch.device) -> Inputs:
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": DTYPE_NAMES[self.dtype]}


@dataclass(frozen=True)
class HeadCase(Case):
    """``source`` says where Q, K, V come from.

    Random numbers, or a layer of the model reading single docstrings (short, so mostly padding) or all
    docstrings of a module as one text (long); then the model and the text make heads, head dim and padding.
    """

    length: int
    batch: int = 4
    heads: int = 12
    head_dim: int = 64
    head_dim_t: int = 0  # the teacher's; 0: that of the student
    padding: float = 0.0
    chunked: bool = False  # no faster than eager

    @property
    def sizes(self) -> str:
        teacher = f"-Dt{self.head_dim_t}" if self.head_dim_t else ""
        return f"B{self.batch}-H{self.heads}-N{self.length}-D{self.head_dim}{teacher}"

    @property
    def id(self) -> str:
        if self.source != "random":
            return f"{self.source}-B{self.batch}-N{self.length}-{DTYPE_NAMES[self.dtype]}"
        return super().id + (f"-pad{self.padding:.0%}" if self.padding else "")

    @property
    def title(self) -> str:
        return super().title + (f", {self.padding:.0%} padding" if self.padding else "")

    @property
    def curve(self) -> str:
        if self.source != "random" or self.overhead:
            return ""
        teacher = f" D_t{self.head_dim_t}" if self.head_dim_t else ""
        padded = f", {self.padding:.0%} padding" if self.padding else ""
        return f"H{self.heads} D{self.head_dim}{teacher} {DTYPE_NAMES[self.dtype]}{padded}"

    def draw(self, takes: Takes, device: torch.device) -> HeadInputs:
        generator = torch.Generator().manual_seed(0)

        def draw(head_dim: int) -> Tensor:
            shape = (self.batch, self.heads, self.length, head_dim)
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        leaves = tuple(draw(self.head_dim) for _ in takes.student)
        constants = tuple(draw(self.head_dim_t or self.head_dim) for _ in takes.teacher)
        mask = self.padded_mask(device) if self.padding else None
        return HeadInputs(leaves, constants, self.title, mask)

    def padded_mask(self, device: torch.device) -> Tensor:
        """(B, N): every row right-padded by the same share."""
        real = round(self.length * (1 - self.padding))
        return (torch.arange(self.length, device=device) < real).expand(self.batch, -1).contiguous()


OVERHEAD = HeadCase(16, batch=1, heads=1, head_dim=16, modes=("forward", "both"), overhead=True)

QUICK = [
    HeadCase(128, batch=16, source="docstrings"),
    HeadCase(512, source="modules", modes=("forward", "both")),
    HeadCase(128),
    HeadCase(512, modes=("forward", "both"), compiled=True),
    HeadCase(512, padding=0.5),
    HeadCase(512, dtype=torch.bfloat16),
    OVERHEAD,
]

QUICK_WITH_SCORES = [
    HeadCase(512, source="modules", modes=("both",)),
    HeadCase(512, modes=("forward", "both"), compiled=True),
    HeadCase(512, padding=0.5),
]


def full(device: str) -> list[HeadCase]:
    """N from 128 to 2048 (8192 on a GPU) at a constant number of tokens; D, dtypes, padded and not."""
    tokens, longest = (16384, 8192) if device == "cuda" else (2048, 2048)
    lengths = [n for n in (128, 256, 512, 1024, 2048, 4096, 8192) if n <= longest]
    real = [
        *(HeadCase(n, batch=16, source="docstrings", modes=MODES, compiled=True) for n in (64, 128)),
        *(HeadCase(n, source="modules", modes=MODES, compiled=True) for n in (128, 256, 512)),
    ]
    synthetic = [
        HeadCase(n, batch=tokens // n, dtype=dtype, padding=padding, modes=MODES, compiled=True)
        for dtype in (torch.float32, torch.bfloat16)
        for padding in (0.0, 0.5)
        for n in lengths
    ]
    head_dims = [
        HeadCase(512, batch=tokens // 512, head_dim=head_dim, dtype=dtype, modes=MODES, compiled=True)
        for dtype in (torch.float32, torch.bfloat16)
        for head_dim in (32, 128)
    ]
    half = [HeadCase(512, batch=tokens // 512, dtype=torch.float16, modes=MODES)]
    return [*real, *synthetic, *head_dims, *half, OVERHEAD]


GPU_TOKENS = 16384
GPU_MODES: tuple[Mode, ...] = ("forward", "backward")


def on_gpu(length: int, **options: Any) -> HeadCase:
    """BERT-base in bf16, at 16384 tokens unless ``options`` say another batch."""
    tokens = {"batch": GPU_TOKENS // length, "dtype": torch.bfloat16, "modes": GPU_MODES}
    return HeadCase(length, **{**tokens, **options})


QUICK_ON_GPU = {
    "attention": [
        on_gpu(512, compiled=True),
        on_gpu(512, padding=0.5, compiled=True),
        on_gpu(128),
        on_gpu(2048),
        on_gpu(8192),
        on_gpu(512, batch=128),
        on_gpu(512, head_dim=32),
        on_gpu(512, head_dim=128),
        replace(OVERHEAD, dtype=torch.bfloat16),
    ],
    "attention_with_scores": [
        on_gpu(512, modes=("forward", "both"), compiled=True),
        on_gpu(512, padding=0.5, modes=("forward", "both")),
        on_gpu(128, modes=("forward", "both")),
        on_gpu(2048, modes=("forward", "both")),
        replace(OVERHEAD, dtype=torch.bfloat16, modes=("forward",)),
    ],
    "attention_score_mse": [
        on_gpu(128, modes=("both",), compiled=True),
        on_gpu(512, modes=("both",), compiled=True),
        on_gpu(2048, modes=("both",), compiled=True, chunked=True),
        on_gpu(8192, modes=("both",), chunked=True),
        replace(OVERHEAD, dtype=torch.bfloat16, modes=("forward",)),
    ],
    "attention_kl": [
        on_gpu(128, compiled=True),
        on_gpu(512, compiled=True),
        on_gpu(1024),
        on_gpu(2048, compiled=True, chunked=True),
        on_gpu(8192, chunked=True),
        replace(OVERHEAD, dtype=torch.bfloat16, modes=("forward",)),
    ],
    "relation_kl": [
        on_gpu(128, compiled=True),
        on_gpu(512, compiled=True),
        on_gpu(1024),
        on_gpu(2048, compiled=True, chunked=True),
        on_gpu(512, heads=48, head_dim=16),
        replace(OVERHEAD, dtype=torch.bfloat16, modes=("forward",)),
    ],
}

MINILM_V2 = HeadCase(512, batch=1, heads=48, head_dim=8, head_dim_t=16, modes=("both",))  # widths 384 and 768

QUICK_LOSSES = [
    HeadCase(128, batch=8, modes=("both",)),
    HeadCase(512, modes=("both",), compiled=True),
    HeadCase(2048, batch=1, modes=("both",), chunked=True),
]
QUICK_OF_LOSS = {  # one each, as peers take a second a call
    "attention_score_mse": [HeadCase(512, padding=0.5, modes=("both",))],
    "attention_kl": [HeadCase(512, source="modules", modes=("both",))],
    "relation_kl": [HeadCase(512, dtype=torch.bfloat16, modes=("both",)), MINILM_V2],
}


def lengths(
    dtype: torch.dtype = torch.float32, padding: float = 0.0, modes: tuple[Mode, ...] = ("both",)
) -> list[HeadCase]:
    """N from 128 to 16384 at B * N = 2048, and B = 1 beyond."""
    return [
        HeadCase(
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


def full_losses() -> list[HeadCase]:
    modes: tuple[Mode, ...] = ("forward", "both")
    real = [
        HeadCase(128, batch=16, source="docstrings", modes=modes, compiled=True),
        HeadCase(512, source="modules", modes=modes, compiled=True, chunked=True),
    ]
    synthetic = [
        case
        for dtype in (torch.float32, torch.bfloat16)
        for padding in (0.0, 0.5)
        for case in lengths(dtype, padding, modes)
    ]
    sizes = [
        HeadCase(128, batch=8, modes=modes, compiled=True),
        HeadCase(512, head_dim=26, head_dim_t=64, modes=modes, compiled=True),  # TinyBERT's 312 over 12 heads
        HeadCase(512, dtype=torch.float16, modes=modes),
    ]
    return [*real, *synthetic, *sizes, replace(OVERHEAD, modes=modes)]


def cases(op: str, scope: Scope, device: str) -> list[HeadCase]:
    if (scope, device) == ("quick", "cuda"):
        return QUICK_ON_GPU[op]
    if op in ("attention", "attention_with_scores"):
        quick = QUICK if op == "attention" else QUICK_WITH_SCORES
        return {"quick": quick, "lengths": [], "full": full(device)}[scope]
    if scope == "quick":
        return [*QUICK_LOSSES, *QUICK_OF_LOSS[op]]
    resplit = [MINILM_V2] if op == "relation_kl" and scope == "full" else []
    return [*(lengths() if scope == "lengths" else full_losses()), *resplit]
