"""MiniLM: self-attention relations of one layer, then fine-tuning; version 2; teacher assistant."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from bertops.distill import layer_map
from bertops.distill.capture import capture
from bertops.distill.data import Batch, inputs
from bertops.distill.losses import MiniLMLoss, MiniLMv2Loss, Term
from bertops.distill.objective import TOKENS, Classification, Distillation
from bertops.distill.settings import StudentSettings
from bertops.distill.work import Work
from bertops.pretraining.settings import setting
from bertops.training import Outcome


@dataclass(frozen=True, kw_only=True)
class Options(StudentSettings):
    version: int = setting(1, "1: attention and values; 2: relations of queries, keys and values")
    relation_heads: int = setting(48, "of version 2; divides the width of teacher and student")
    teacher_layer: int = setting(-1, "whose attention is learnt; -1 is the last, the paper's for base sizes")
    relation_epochs: float = setting(10.0, "of the relations, before fine-tuning")
    relation_steps: int = setting(0, "of the relations, in place of epochs")
    relation_rate: float = setting(3e-4, "learning rate of the relations, its peak")
    assistant_layers: int = setting(0, "of a teacher assistant between both, of the student's width; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {self.version}")


class Relations(Distillation):
    """The student's last layer attends as the teacher's does; no labels, any number of layers, any width."""

    over: ClassVar = dict.fromkeys(("attention", "value", "q", "k", "v"), TOKENS)

    def __init__(self, student: Any, teacher: Any, options: Options) -> None:
        super().__init__(student, teacher)
        self.layer = options.teacher_layer
        self.loss = MiniLMLoss() if options.version == 1 else MiniLMv2Loss(options.relation_heads)

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher = self.student.encoder, self.teacher.encoder
        with capture(student, stop=True) as taps_s:
            student(**inputs(student, batch))
        with capture(teacher, [self.layer], stop=True) as taps_t, torch.no_grad():
            teacher(**inputs(teacher, batch))
        return self.loss(taps_s[-1], taps_t[self.layer])


def distill(work: Work, options: Options) -> Outcome:
    """Relations on the task's texts, without their labels, then fine-tuning with them.

    The paper distils on Wikipedia and books, task-agnostic; here the texts are the task's, and the student
    starts from the teacher's layers where it has the teacher's width. An assistant of the student's
    width and more layers starts at random: it learns from the teacher, and the student from it.

    Source: Wang et al. 2020 (MiniLM), sections 3 and 4; Wang et al. 2021 (MiniLMv2), section 3.
    """
    teacher = work.teacher()
    student = work.student(teacher, layer_map.uniform)
    work.open(work.plan())
    relations = work.plan(
        epochs=options.relation_epochs, steps=options.relation_steps, learning_rate=options.relation_rate
    )
    if options.assistant_layers:
        deeper = replace(student.config, num_hidden_layers=options.assistant_layers)
        assistant = type(student)(deeper).train()
        work.stage("assistant", Relations(assistant, teacher, options), relations)
        work.stage("relations", Relations(student, assistant, replace(options, teacher_layer=-1)), relations)
    else:
        work.stage("relations", Relations(student, teacher, options), relations)
    return work.last_stage(Classification(student))
