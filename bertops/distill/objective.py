"""From the terms of a paper's loss to what the training loop minimises."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bertops.distill.data import Batch, inputs
from bertops.distill.losses.terms import IGNORED_LABEL, Term, cross_entropy
from bertops.training import Objective

SAMPLES, TOKENS, PAIRS, LABELS = "samples", "tokens", "pairs", "labels"  # what a term may be over


class Distillation(Objective):
    """A student learns from a frozen teacher; a recipe says by which :class:`~bertops.distill.losses.Term`.

    A recipe defines :meth:`terms` and ``over``: for each of them what its count is proportional to, the
    batch's samples, its real tokens, the pairs of real tokens of one text, or the labels that are not -100,
    which in plain text are the masked words. A batch of plain text is packed: ``input_ids`` and ``labels``
    (1, T), and ``cu_seqlens``. The loop divides by that number
    over all micro-batches and processes, so that a token weighs the same wherever it stands; the factor
    between it and the term's count, such as heads or widths, goes into the sum. Terms of weight 0 are
    measured and not minimised.

    Args:
        student: trained.
        teacher: in evaluation mode whatever ``train()`` says, without gradients; None where a recipe needs
            none.
    """

    over: ClassVar[Mapping[str, str]]
    student: Any
    teacher: Any

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.weights: Mapping[str, float] = {}  # those of the last forward's terms

    def terms(self, batch: Batch) -> dict[str, Term]:
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        terms, sizes = self.terms(batch), sizes_of(batch)
        self.weights = {name: term.weight for name, term in terms.items() if term.weight}
        return {name: term.total * (sizes[self.over[name]] / term.divisor()) for name, term in terms.items()}

    def counts(self, batch: Batch) -> dict[str, int]:
        sizes = {name: int(size) for name, size in sizes_of(batch).items()}
        return {**{name: sizes[unit] for name, unit in self.over.items()}, "tokens": sizes[TOKENS]}

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def sizes_of(batch: Batch) -> dict[str, Any]:
    """How many samples, real tokens, pairs of real tokens of one text, and labels a batch has."""
    lengths = batch["cu_seqlens"].diff().long() if "cu_seqlens" in batch else batch["mask"].sum(1)
    return {
        SAMPLES: len(lengths),
        TOKENS: lengths.sum(),
        PAIRS: lengths.square().sum(),
        LABELS: (batch["labels"] != IGNORED_LABEL).sum(),
    }


def correct(logits: Tensor, labels: Tensor) -> Term:
    """How many answers are right: measured, not minimised."""
    return Term((logits.detach().argmax(1) == labels).sum().float(), len(labels), 0.0)


class Classification(Distillation):
    """Plain fine-tuning: cross entropy of the labels."""

    over: ClassVar = {"loss": SAMPLES, "accuracy": SAMPLES}

    def terms(self, batch: Batch) -> dict[str, Term]:
        logits, labels = self.student(**inputs(self.student, batch)).logits, batch["labels"]
        return {"loss": cross_entropy(logits, labels, 1.0), "accuracy": correct(logits, labels)}


@torch.no_grad()
def answers(teacher: Any, batch: Batch) -> Tensor:
    """The teacher's logits (B, C)."""
    return teacher(**inputs(teacher, batch)).logits
