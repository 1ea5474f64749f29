"""What is measured of the losses behind a linear layer: rows of hidden states, and weights over V outputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.row_shapes import BOTH
from bench.shapes import Case, Inputs, Scope, Takes

VOCABULARY = Takes(("hidden_s", "weight_s"))
PROJECTION = Takes(("hidden_s", "weight"))
TEACHER_WIDTH = 768
TEMPERATURE = 2.0


@dataclass(frozen=True)
class VocabularyInputs(Inputs):
    """hidden_s (M, H_s) and weight_s (V, H_s); of the teacher hidden_t and weight_t."""

    @property
    def map_elements(self) -> int:
        return self.leaves[0].shape[0] * self.leaves[1].shape[0]


@dataclass(frozen=True)
class ProjectionInputs(Inputs):
    """hidden_s (M, H_s) and weight (H_t, H_s); of the teacher hidden_t (M, H_t)."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "ProjectionInputs":
        """Of the student's tensors alone: the width of the teacher's is that of the result."""
        return replace(self, leaves=tuple(change(x) for x in self.leaves))


@dataclass(frozen=True)
class LinearCase(Case):
    """``rows`` of the student's ``width``; ``outputs`` words, or the teacher's width."""

    rows: int
    width: int
    outputs: int
    chunked: bool = True

    @property
    def sizes(self) -> str:
        return f"M{self.rows}-H{self.width}-V{self.outputs}"

    def draw(self, takes: Takes, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def weight(width: int) -> Tensor:
            return draw(self.outputs, width) * width**-0.5

        leaves = draw(self.rows, self.width), weight(self.width)
        teacher: tuple[Tensor, ...] = (draw(self.rows, self.outputs),)
        if takes == VOCABULARY:
            teacher = draw(self.rows, TEACHER_WIDTH), weight(TEACHER_WIDTH)
        kind = VocabularyInputs if takes == VOCABULARY else ProjectionInputs
        students, teachers = (tuple(x.to(device, self.dtype) for x in xs) for xs in (leaves, teacher))
        return kind(students, teachers, self.title)


BERT_WORDS = 30522

CASES: dict[str, dict[Scope, list[Case]]] = {
    "linear_kl_div": {
        "quick": [LinearCase(512, 384, BERT_WORDS, modes=("both",))],
        "full": [
            LinearCase(2048, width, BERT_WORDS, dtype=dtype, modes=BOTH, compiled=True)
            for dtype in (torch.float32, torch.bfloat16)
            for width in (384, 768)
        ],
    },
    "projected_mse": {
        "quick": [LinearCase(4096, 384, 768, chunked=False, modes=("both",))],
        "full": [
            LinearCase(rows, width, 768, chunked=False, dtype=dtype, modes=BOTH, compiled=True)
            for dtype in (torch.float32, torch.bfloat16)
            for rows, width in ((2048, 312), (16384, 384))
        ],
    },
}


GPU_ROWS = 16384
QUICK_ON_GPU: dict[str, list[Case]] = {
    "linear_kl_div": [
        LinearCase(GPU_ROWS, 768, BERT_WORDS, dtype=torch.bfloat16, modes=("both",), compiled=True)
    ],
    "projected_mse": [LinearCase(GPU_ROWS, 384, 768, chunked=False, dtype=torch.bfloat16, modes=("both",))],
}


def cases(op: str, scope: Scope, device: str) -> list[Case]:
    """None over lengths."""
    if (scope, device) == ("quick", "cuda"):
        return QUICK_ON_GPU[op]
    return CASES[op].get(scope, [])
