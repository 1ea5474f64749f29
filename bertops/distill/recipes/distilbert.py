"""DistilBERT on a task: the teacher's answers, the labels, and the direction of the hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bertops.distill import layer_map
from bertops.distill.data import Batch, inputs
from bertops.distill.initialize import DISTILBERT_LAYERS
from bertops.distill.losses import Term
from bertops.distill.losses.terms import cross_entropy
from bertops.distill.objective import SAMPLES, TOKENS, Distillation, correct
from bertops.distill.settings import StudentSettings
from bertops.distill.work import Work
from bertops.ops.kl_div_logits import kl_div_logits
from bertops.ops.row_pair_losses import cosine_loss
from bertops.pretraining.settings import setting
from bertops.training import Outcome


@dataclass(frozen=True, kw_only=True)
class Options(StudentSettings):
    alpha_kl: float = setting(5.0, "weight of the teacher's answers")
    alpha_labels: float = setting(2.0, "weight of the labels")
    alpha_cosine: float = setting(1.0, "weight of the hidden states; 0 for a student of another width")
    temperature: float = setting(2.0, "of the answers")


class TripleLoss(Distillation):
    """Soft targets, labels in place of masked words, cosine of the last hidden states."""

    over: ClassVar = {"kl": SAMPLES, "labels": SAMPLES, "cosine": TOKENS, "accuracy": SAMPLES}

    def __init__(self, student: Any, teacher: Any, options: Options) -> None:
        super().__init__(student, teacher)
        self.options = options

    def terms(self, batch: Batch) -> dict[str, Term]:
        options, mask, labels = self.options, batch["mask"], batch["labels"]
        output = self.student(**inputs(self.student, batch))
        with torch.no_grad():
            target = self.teacher(**inputs(self.teacher, batch))
        kl = kl_div_logits(output.logits, target.logits, temperature=options.temperature, reduction="sum")
        terms = {
            "kl": Term(kl, len(labels), options.alpha_kl),
            "labels": cross_entropy(output.logits, labels, options.alpha_labels),
            "accuracy": correct(output.logits, labels),
        }
        if options.alpha_cosine:
            hidden = output.last_hidden_state, target.last_hidden_state
            cosine = cosine_loss(*hidden, mask, reduction="sum")
            terms["cosine"] = Term(cosine, mask.sum(), options.alpha_cosine)
        return terms


def start_layers(student_layers: int, teacher_layers: int) -> Sequence[int]:
    """Those of the official code for 6 of 12, the uniform map otherwise."""
    if (student_layers, teacher_layers) == (len(DISTILBERT_LAYERS), DISTILBERT_LAYERS[-1]):
        return DISTILBERT_LAYERS
    return layer_map.uniform(student_layers, teacher_layers)


def distill(work: Work, options: Options) -> Outcome:
    """One stage on the task; the student has the teacher's width and starts from its layers.

    The paper distils a masked language model on Wikipedia and books
    (:class:`bertops.distill.losses.DistilBertLoss`), and on a task once more, from a fine-tuned teacher
    (section 3, "additional distillation step"): this is that step, with the weights of the official README.

    Source: Sanh et al. 2019 (DistilBERT), sections 2 to 4.
    """
    teacher = work.teacher()
    student = work.student(teacher, start_layers)
    work.open(work.plan())
    return work.last_stage(TripleLoss(student, teacher, options))
