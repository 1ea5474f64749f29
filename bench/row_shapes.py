"""What is measured of the ops over rows: logits (B, C), and hidden states of which some samples stay."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.shapes import Case, Inputs, Mode, Scope, Takes

LOGITS = Takes(("logits",))
HIDDEN = Takes(("hidden",))
LOGITS_PAIR = Takes(("logits",), "t")
HIDDEN_PAIR = Takes(("hidden",), "t")
SPREAD = 2.0  # of logits: about half of the rows of two classes are less certain than THRESHOLD
THRESHOLD = 0.5


@dataclass(frozen=True)
class LogitsCase(Case):
    batch: int
    classes: int

    @property
    def sizes(self) -> str:
        return f"B{self.batch}-C{self.classes}"

    def draw(self, takes: Takes, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        logits = SPREAD * torch.randn(self.batch, self.classes, generator=generator)
        return Inputs((logits.to(device, self.dtype),), (), self.title)


@dataclass(frozen=True)
class RowPairCase(Case):
    """Rows of a student and of its teacher: logits, or hidden states of all tokens of a batch."""

    rows: int
    width: int

    @property
    def sizes(self) -> str:
        return f"R{self.rows}-W{self.width}"

    def draw(self, takes: Takes, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        pair = [SPREAD * torch.randn(self.rows, self.width, generator=generator) for _ in range(2)]
        student, teacher = (x.to(device, self.dtype) for x in pair)
        return Inputs((student,), (teacher,), self.title)


@dataclass(frozen=True)
class HiddenInputs(Inputs):
    """Hidden states (B, N, H), or (1, B * N, H) with ``cu_seqlens``; ``stay`` (B,) is true for who stays."""

    stay: Tensor
    cu_seqlens: Tensor | None

    @property
    def extra(self) -> tuple[Tensor | None, ...]:
        return self.stay, self.cu_seqlens


@dataclass(frozen=True)
class HiddenCase(Case):
    """Half of the samples stay; packed, they have from 1 to ``length`` tokens each."""

    batch: int
    length: int
    width: int = 768
    packed: bool = False

    @property
    def sizes(self) -> str:
        return f"B{self.batch}-N{self.length}-H{self.width}{'-packed' if self.packed else ''}"

    @property
    def title(self) -> str:
        return f"{super().title}, half stay"

    def draw(self, takes: Takes, device: torch.device) -> HiddenInputs:
        generator = torch.Generator().manual_seed(0)
        stay = torch.randperm(self.batch, generator=generator) < self.batch // 2
        shape, cu_seqlens = (self.batch, self.length), None
        if self.packed:
            lengths = torch.randint(1, self.length + 1, (self.batch,), generator=generator)
            cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
            shape = (1, int(lengths.sum()))
        hidden = torch.randn(*shape, self.width, generator=generator).to(device, self.dtype)
        return HiddenInputs((hidden,), (), self.title, stay.to(device), cu_seqlens)


BOTH: tuple[Mode, ...] = ("forward", "both")

ENTROPY_QUICK = [
    LogitsCase(4096, 20, modes=BOTH, compiled=True),
    LogitsCase(8, 131072, modes=BOTH),
]
ENTROPY_FULL = [
    LogitsCase(batch, classes, dtype=dtype, modes=BOTH, compiled=True)
    for dtype in (torch.float32, torch.bfloat16)
    for batch, classes in ((64, 2), (4096, 2), (4096, 20), (4096, 1000), (8, 131072))
]

EXIT_DECISION_QUICK = [
    LogitsCase(4096, 2, compiled=True),
    LogitsCase(4096, 20),
    LogitsCase(32, 4),
    LogitsCase(64, 2, overhead=True),
]
EXIT_DECISION_FULL = [
    *(
        LogitsCase(batch, classes, dtype=dtype, compiled=True)
        for dtype in (torch.float32, torch.bfloat16)
        for batch in (32, 512, 4096, 65536)
        for classes in (2, 4, 20)
    ),
    LogitsCase(4096, 1000, compiled=True),
    LogitsCase(64, 2, overhead=True),
]

COMPACT_QUICK = [HiddenCase(64, 128), HiddenCase(64, 128, packed=True)]
COMPACT_FULL = [
    HiddenCase(batch, length, packed=packed, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for packed in (False, True)
    for batch, length in ((8, 128), (64, 128), (16, 512))
]

ROW_PAIR_QUICK = [RowPairCase(16384, 768, modes=BOTH, compiled=True)]
ROW_PAIR_FULL = [
    RowPairCase(rows, width, dtype=dtype, modes=BOTH, compiled=True)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, width in ((512, 768), (16384, 312), (16384, 768))
]
KL_DIV_LOGITS_QUICK = [RowPairCase(2048, 30522, modes=BOTH, compiled=True)]
KL_DIV_LOGITS_FULL = [
    RowPairCase(rows, width, dtype=dtype, modes=BOTH, compiled=True)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, width in ((4096, 20), (256, 30522), (2048, 30522), (128, 262144))
]

GPU_ROWS = [RowPairCase(16384, 768, dtype=torch.bfloat16, modes=BOTH, compiled=True)]

QUICK_ON_GPU: dict[str, list[Case]] = {
    "entropy": [LogitsCase(65536, 1000, dtype=torch.bfloat16, modes=BOTH)],
    "exit_decision": [
        *(LogitsCase(batch, 2) for batch in (64, 4096)),
        LogitsCase(4096, 20),
        LogitsCase(64, 2, overhead=True),
    ],
    "compact": [HiddenCase(512, 128, dtype=torch.bfloat16), HiddenCase(512, 128, packed=True)],
    "cosine_loss": [*GPU_ROWS],
    "normalized_mse": [*GPU_ROWS],
    "feature_map_transfer": [*GPU_ROWS],
    "kl_div_logits": [RowPairCase(2048, 30522, dtype=torch.bfloat16, modes=BOTH, compiled=True)],
}

CASES: dict[str, dict[Scope, list[Case]]] = {
    "entropy": {"quick": [*ENTROPY_QUICK], "full": [*ENTROPY_FULL]},
    "exit_decision": {"quick": [*EXIT_DECISION_QUICK], "full": [*EXIT_DECISION_FULL]},
    "compact": {"quick": [*COMPACT_QUICK], "full": [*COMPACT_FULL]},
    "cosine_loss": {"quick": [*ROW_PAIR_QUICK], "full": [*ROW_PAIR_FULL]},
    "normalized_mse": {"quick": [*ROW_PAIR_QUICK], "full": [*ROW_PAIR_FULL]},
    "feature_map_transfer": {"quick": [*ROW_PAIR_QUICK], "full": [*ROW_PAIR_FULL]},
    "kl_div_logits": {"quick": [*KL_DIV_LOGITS_QUICK], "full": [*KL_DIV_LOGITS_FULL]},
}


def cases(op: str, scope: Scope, device: str) -> list[Case]:
    """None over lengths."""
    if (scope, device) == ("quick", "cuda"):
        return QUICK_ON_GPU[op]
    return CASES[op].get(scope, [])
