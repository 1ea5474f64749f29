"""DistilBERT: the teacher's answers, the labels or masked words, and the direction of the hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from bertops.distill import layer_map
from bertops.distill.classifiers import new_masked_lm
from bertops.distill.data import Batch, inputs
from bertops.distill.initialize import DISTILBERT_LAYERS
from bertops.distill.losses import DistilBertLoss, Term
from bertops.distill.losses.terms import cross_entropy
from bertops.distill.objective import LABELS, SAMPLES, TOKENS, Distillation, correct
from bertops.distill.settings import StudentSettings, TextStudentSettings
from bertops.distill.text import TextWork, masked_words
from bertops.distill.work import Work
from bertops.models.config import EncoderConfig
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


@dataclass(frozen=True, kw_only=True)
class TextOptions(TextStudentSettings):
    learning_rate: float = setting(5e-4, "its peak")
    warmup: float = setting(0.05, "share of the steps over which the rate rises; it then falls to 0")
    alpha_kl: float = setting(5.0, "weight of the teacher's words")
    alpha_mlm: float = setting(2.0, "weight of the masked words")
    alpha_cosine: float = setting(1.0, "weight of the hidden states; 0 for a student of another width")
    temperature: float = setting(2.0, "of the teacher's words")
    token_types: bool = setting(False, "keep those of a BERT: the student is a BERT and no DistilBERT")


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


class TextTripleLoss(Distillation):
    """The teacher's words, the masked words, and cosine of the last hidden states over all tokens."""

    over: ClassVar = {"kl": LABELS, "mlm": LABELS, "cosine": TOKENS, "mlm_accuracy": LABELS}

    def __init__(self, student: Any, teacher: Any, options: TextOptions) -> None:
        super().__init__(student, teacher)
        self.loss = DistilBertLoss(
            options.alpha_kl, options.alpha_mlm, options.alpha_cosine, temperature=options.temperature
        )

    def terms(self, batch: Batch) -> dict[str, Term]:
        words_s, labels, hidden_s = masked_words(self.student, batch)
        with torch.no_grad():
            words_t, _, hidden_t = masked_words(self.teacher, batch)
        terms = self.loss(words_s, words_t, hidden_s, hidden_t, labels)
        if not self.training:  # the logits once more
            terms["mlm_accuracy"] = correct(F.linear(*words_s), labels)
        return terms


def start_layers(student_layers: int, teacher_layers: int) -> Sequence[int]:
    """Those of the official code for 6 of 12, the uniform map otherwise."""
    if (student_layers, teacher_layers) == (len(DISTILBERT_LAYERS), DISTILBERT_LAYERS[-1]):
        return DISTILBERT_LAYERS
    return layer_map.uniform(student_layers, teacher_layers)


def distill(work: Work, options: Options) -> Outcome:
    """One stage on the task; the student has the teacher's width and starts from its layers.

    The paper distils a masked language model on Wikipedia and books (:func:`distill_text`), and on a task
    once more, from a fine-tuned teacher (section 3, "additional distillation step"): this is that step, with
    the weights of the official README.

    Source: Sanh et al. 2019 (DistilBERT), sections 2 to 4.
    """
    teacher = work.teacher()
    student = work.student(teacher, start_layers)
    work.open(work.plan())
    return work.last_stage(TripleLoss(student, teacher, options))


def distill_text(work: TextWork, options: TextOptions) -> Outcome:
    """One stage on plain text; the student starts from the teacher's layers and its head.

    Of a BERT it is a DistilBERT, without token types, of a RoBERTa a RoBERTa with fewer layers. Weights,
    temperature, rate and optimizer are those of the official code on one GPU. There words are compared at all
    tokens unless ``restrict_ce_to_mask`` is given; here at the masked ones.

    Source: Sanh et al. 2019 (DistilBERT), sections 2 and 3, and its code, ``distiller.py``.
    """
    teacher = work.masked_lm()

    def build(config: EncoderConfig) -> Any:
        if config.family == "bert" and not options.token_types:
            config = replace(config, family="distilbert", type_vocab_size=0, attention_output_dropout_p=0.0)
        return new_masked_lm(config)

    student = work.student(teacher, start_layers, build)
    work.open(work.plan(betas=(0.9, 0.98), eps=1e-6))
    return work.last_stage(TextTripleLoss(student, teacher, options))
