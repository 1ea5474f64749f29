"""MiniLM: self-attention relations of one layer, on plain text or a task; version 2; teacher assistant."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from bertops.distill import layer_map
from bertops.distill.capture import capture
from bertops.distill.data import Batch, inputs
from bertops.distill.initialize import encoder_of
from bertops.distill.losses import MiniLMLoss, MiniLMv2Loss, Term
from bertops.distill.objective import TOKENS, Classification, Distillation
from bertops.distill.settings import StudentChoice, StudentSettings, TextStudentSettings
from bertops.distill.text import TextWork
from bertops.distill.work import Work
from bertops.pretraining.settings import setting
from bertops.training import Outcome


@dataclass(frozen=True, kw_only=True)
class RelationSettings(StudentChoice):
    version: int = setting(1, "1: attention and values; 2: relations of queries, keys and values")
    relation_heads: int = setting(48, "of version 2; divides the width of teacher and student")
    teacher_layer: int = setting(-1, "whose attention is learnt; -1 is the last, the paper's for base sizes")
    assistant_layers: int = setting(0, "of a teacher assistant between both, of the student's width; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {self.version}")


@dataclass(frozen=True, kw_only=True)
class Options(StudentSettings, RelationSettings):
    relation_epochs: float = setting(10.0, "of the relations, before fine-tuning")
    relation_steps: int = setting(0, "of the relations, in place of epochs")
    relation_rate: float = setting(3e-4, "learning rate of the relations, its peak")


@dataclass(frozen=True, kw_only=True)
class TextOptions(TextStudentSettings, RelationSettings):
    learning_rate: float = setting(3e-4, "its peak, for 256 sequences a step")
    warmup: float = setting(0.01, "share of the steps over which the rate rises; it then falls to 0")
    weight_decay: float = setting(0.01, "of matrices")
    mask_prob: float = setting(0.0, "share of the tokens that are masked")


class Relations(Distillation):
    """The student's last layer attends as the teacher's does; no labels, any number of layers, any width."""

    over: ClassVar = dict.fromkeys(("attention", "value", "q", "k", "v"), TOKENS)

    def __init__(self, student: Any, teacher: Any, options: RelationSettings) -> None:
        super().__init__(student, teacher)
        self.layer = options.teacher_layer
        self.loss = MiniLMLoss() if options.version == 1 else MiniLMv2Loss(options.relation_heads)

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher = encoder_of("student", self.student), encoder_of("teacher", self.teacher)
        with capture(student, stop=True) as taps_s:
            student(**inputs(student, batch))
        with capture(teacher, [self.layer], stop=True) as taps_t, torch.no_grad():
            teacher(**inputs(teacher, batch))
        return self.loss(taps_s[-1], taps_t[self.layer])


def distill(work: Work, options: Options) -> Outcome:
    """Relations on the task's texts, without their labels, then fine-tuning with them.

    The paper distils on Wikipedia and books, task-agnostic (:func:`distill_text`); here the texts are the
    task's, and the student starts from the teacher's layers where it has the teacher's width. An assistant of
    the student's width and more layers starts at random: it learns from the teacher, and the student from it.

    Source: Wang et al. 2020 (MiniLM), sections 3 and 4; Wang et al. 2021 (MiniLMv2), section 3.
    """
    teacher = work.teacher()
    student = work.student(teacher, layer_map.uniform)
    work.open(work.plan())
    relations = work.plan(
        epochs=options.relation_epochs, steps=options.relation_steps, learning_rate=options.relation_rate
    )
    if options.assistant_layers:
        assistant = deeper(student, options.assistant_layers)
        work.stage("assistant", Relations(assistant, teacher, options), relations)
        work.stage("relations", Relations(student, assistant, replace(options, teacher_layer=-1)), relations)
    else:
        work.stage("relations", Relations(student, teacher, options), relations)
    return work.last_stage(Classification(student))


def distill_text(work: TextWork, options: TextOptions) -> Outcome:
    """Relations alone, on plain text, in one stage, or two with an assistant.

    The student is an encoder without a head, which starts from the teacher's layers where it has the
    teacher's width. The official training code was never published; the paper says nothing of masked words,
    and its students take 400,000 steps at these rates.

    Source: Wang et al. 2020 (MiniLM), sections 3 and 4; Wang et al. 2021 (MiniLMv2), section 3.
    """
    teacher = work.encoder()
    student = work.student(teacher, layer_map.uniform)
    plan = work.plan()
    work.open(plan)
    if options.assistant_layers:
        assistant = deeper(student, options.assistant_layers)
        work.stage("assistant", Relations(assistant, teacher, options), plan)
        teacher, options = assistant, replace(options, teacher_layer=-1)
    return work.last_stage(Relations(student, teacher, options))


def deeper(student: Any, layers: int) -> Any:
    """A teacher assistant: as wide as the student, with more layers, from random values."""
    return type(student)(replace(student.config, num_hidden_layers=layers)).train()
