"""BERT-PKD: the teacher's answers, and the first token of several layers."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bertops.distill import layer_map
from bertops.distill.data import Batch, inputs
from bertops.distill.losses import PKDLoss, Term
from bertops.distill.objective import SAMPLES, Distillation, correct
from bertops.distill.settings import StudentSettings
from bertops.distill.work import Work
from bertops.models.rows import first_tokens
from bertops.pretraining.settings import setting
from bertops.training import Outcome

MAPS = {"skip": layer_map.skip, "last": layer_map.last}


@dataclass(frozen=True, kw_only=True)
class Options(StudentSettings):
    epochs: float = setting(4.0, "of the task's texts")
    map: str = setting("skip", "teacher layers of the student's: skip or last")
    alpha: float = setting(0.5, "weight of the teacher's answers; the labels have the rest")
    beta: float = setting(100.0, "weight of the first tokens")
    temperature: float = setting(10.0, "of the answers")
    normalize: bool = setting(True, "compare the directions of the first tokens, as in the paper")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map not in MAPS:
            raise ValueError(f"map must be one of {', '.join(MAPS)}, got {self.map!r}")


class PatientDistillation(Distillation):
    """Labels, answers and first tokens, equation 7."""

    over: ClassVar = dict.fromkeys(("labels", "logits", "hidden", "accuracy"), SAMPLES)

    def __init__(self, student: Any, teacher: Any, options: Options) -> None:
        super().__init__(student, teacher)
        self.layers = MAPS[options.map](len(student.encoder.layers), len(teacher.encoder.layers))
        self.loss = PKDLoss(options.alpha, options.beta, options.temperature, normalize=options.normalize)

    def terms(self, batch: Batch) -> dict[str, Term]:
        output = self.student(**inputs(self.student, batch), output_hidden_states=True)
        with torch.no_grad():
            target = self.teacher(**inputs(self.teacher, batch), output_hidden_states=True)

        def first(states: tuple[Tensor, ...], layers: Any) -> list[Tensor]:
            return [first_tokens(states[layer], batch["mask"]) for layer in layers]

        terms = self.loss(
            output.logits,
            target.logits,
            batch["labels"],
            first(output.hidden_states, range(1, len(self.layers) + 1)),
            first(target.hidden_states, self.layers),
        )
        return {**terms, "accuracy": correct(output.logits, batch["labels"])}


def distill(work: Work, options: Options) -> Outcome:
    """One stage; the student starts from the teacher's first layers and has the teacher's width.

    Source: Sun et al. 2019 (Patient Knowledge Distillation), section 3; rates and weights of section 4.2.
    """
    teacher = work.teacher()
    student = work.student(teacher, layer_map.bottom)
    work.open(work.plan())
    return work.last_stage(PatientDistillation(student, teacher, options))
