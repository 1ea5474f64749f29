"""TinyBERT: general distillation on plain text, then two stages on an augmented task."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bertops.data.augmentation import NearestWords, TinyBertAugmentation
from bertops.distill import layer_map
from bertops.distill.capture import capture
from bertops.distill.data import Batch, inputs
from bertops.distill.initialize import encoder_of
from bertops.distill.losses import Term, TinyBertLoss, TinyBertPredictionLoss
from bertops.distill.objective import PAIRS, SAMPLES, TOKENS, Distillation, answers, correct
from bertops.distill.settings import StudentSettings, TextStudentSettings
from bertops.distill.text import TextWork
from bertops.distill.work import Work
from bertops.pretraining.settings import setting
from bertops.training import Outcome


@dataclass(frozen=True, kw_only=True)
class Options(StudentSettings):
    learning_rate: float = setting(3e-5, "of the prediction stage, its peak")
    intermediate_epochs: float = setting(20.0, "of the intermediate stage")
    intermediate_steps: int = setting(0, "of the intermediate stage, in place of epochs")
    intermediate_rate: float = setting(5e-5, "learning rate of the intermediate stage, its peak")
    temperature: float = setting(1.0, "of the teacher's answers")
    augment: int = setting(20, "variants of every text; 0 for none")
    masked_lm: str = setting("", "folder or hub id of a masked language model that proposes their words")


@dataclass(frozen=True, kw_only=True)
class TextOptions(TextStudentSettings):
    learning_rate: float = setting(5e-5, "its peak")
    weight_decay: float = setting(0.01, "of matrices")


class Intermediate(Distillation):
    """Embeddings, hidden states and attention scores of mapped layers; equation 11 without the last term."""

    over: ClassVar = {"embedding": TOKENS, "hidden": TOKENS, "attention": PAIRS}

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__(student, teacher)
        ours, theirs = encoder_of("student", student), encoder_of("teacher", teacher)
        self.layers = layer_map.uniform(len(ours.layers), len(theirs.layers))
        self.loss = TinyBertLoss(student.config.hidden_size, teacher.config.hidden_size)

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher = encoder_of("student", self.student), encoder_of("teacher", self.teacher)
        numbers = range(1, len(self.layers) + 1)
        with capture(student, numbers) as taps_s, capture(teacher, self.layers) as taps_t:
            hidden_s = student(**inputs(student, batch), output_hidden_states=True).hidden_states
            with torch.no_grad():
                hidden_t = teacher(**inputs(teacher, batch), output_hidden_states=True).hidden_states
        mapped = [hidden_t[layer] for layer in (0, *self.layers)]
        return self.loss(hidden_s, mapped, taps_s, taps_t, batch.get("mask"))


class Prediction(Distillation):
    """The teacher's answers, equation 10; the labels only measure."""

    over: ClassVar = {"logits": SAMPLES, "accuracy": SAMPLES}

    def __init__(self, student: Any, teacher: Any, temperature: float) -> None:
        super().__init__(student, teacher)
        self.loss = TinyBertPredictionLoss(temperature)

    def terms(self, batch: Batch) -> dict[str, Term]:
        logits = self.student(**inputs(self.student, batch)).logits
        terms = self.loss(logits, answers(self.teacher, batch))
        return {**terms, "accuracy": correct(logits, batch["labels"])}


def distill(work: Work, options: Options) -> Outcome:
    """Task distillation: the intermediate layers first, then the answers, on the texts and their variants.

    The student starts from the teacher's layers under the uniform map where it has the teacher's width. The
    paper starts it from general distillation (:func:`distill_text`): give such a model as ``student``. The
    official code keeps the intermediate stage's learning rate constant. Variants of a text take the words
    nearest by the teacher's word vectors, or those that ``masked_lm`` proposes.

    Source: Jiao et al. 2020 (TinyBERT), section 3.2; sizes and rates are those of section 4.2 and its code.
    """
    teacher = work.teacher()
    student = work.student(teacher, layer_map.uniform)
    nearest = NearestWords(teacher.encoder.embeddings.word.weight.numpy(force=True), work.tokenizer)
    proposed = work.masked_words(options.masked_lm, nearest) if options.masked_lm else nearest
    rows = work.augmented(TinyBertAugmentation(proposed, seed=options.seed), options.augment)
    work.open(work.plan(rows))
    intermediate = work.plan(
        rows,
        epochs=options.intermediate_epochs,
        steps=options.intermediate_steps,
        learning_rate=options.intermediate_rate,
    )
    work.stage("intermediate", Intermediate(student, teacher), intermediate, work.stream(rows))
    return work.last_stage(Prediction(student, teacher, options.temperature), work.stream(rows))


def distill_text(work: TextWork, options: TextOptions) -> Outcome:
    """General distillation: the intermediate layers of a pretrained teacher on plain text, and nothing else.

    The student is an encoder without a head. Words are masked as in the official code, of which the rates are
    too; it trains for three epochs of Wikipedia, 256 sequences a step.

    Source: Jiao et al. 2020 (TinyBERT), section 3.2, and its code, ``general_distill.py``.
    """
    teacher = work.encoder()
    student = work.student(teacher, layer_map.uniform)
    work.open(work.plan())
    return work.last_stage(Intermediate(student, teacher))
