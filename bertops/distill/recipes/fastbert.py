"""FastBERT: a classifier after every layer, taught by the last one, so that easy texts leave early."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from bertops.distill import classifiers
from bertops.distill.data import Batch, inputs
from bertops.distill.losses import Term, self_distillation_loss
from bertops.distill.losses.terms import cross_entropy
from bertops.distill.objective import SAMPLES, Distillation, correct
from bertops.distill.settings import TaskSettings
from bertops.distill.work import Work
from bertops.models import FastBert
from bertops.pretraining.settings import setting
from bertops.training import Outcome


@dataclass(frozen=True, kw_only=True)
class Options(TaskSettings):
    epochs: float = setting(5.0, "of the self-distillation")
    learning_rate: float = setting(2e-4, "of the self-distillation, its peak")
    finetune_epochs: float = setting(3.0, "of the fine-tuning before it")
    finetune_steps: int = setting(0, "of the fine-tuning, in place of epochs")
    finetune_rate: float = setting(2e-5, "learning rate of the fine-tuning, its peak")
    classifier_factor: float = setting(1.0, "how many times that rate the new classifier has in it")
    head_size: int = setting(128, "width of the classifiers")
    head_heads: int = setting(2, "attention heads of the classifiers")


class Backbone(Distillation):
    """Encoder and last classifier learn the labels."""

    over: ClassVar = {"loss": SAMPLES, "accuracy": SAMPLES}

    def terms(self, batch: Batch) -> dict[str, Term]:
        model, labels = self.student, batch["labels"]
        hidden = model.encoder(**inputs(model.encoder, batch)).last_hidden_state
        logits = model.classify(model.num_layers, hidden, batch["mask"])
        return {"loss": cross_entropy(logits, labels, 1.0), "accuracy": correct(logits, labels)}


class SelfDistillation(Distillation):
    """The other classifiers learn the last one's answers, equations 4 and 5; all else stands still."""

    over: ClassVar = dict.fromkeys(
        ("distillation", "first_accuracy", "mean_accuracy", "last_accuracy"), SAMPLES
    )

    def terms(self, batch: Batch) -> dict[str, Term]:
        output, labels = self.student(**inputs(self.student, batch)), batch["labels"]
        exits = [correct(logits, labels) for logits in (*output.student_logits, output.logits)]
        right = torch.stack([exit.total for exit in exits])
        return {
            "distillation": Term(self_distillation_loss(output) * len(labels), len(labels)),
            "first_accuracy": exits[0],
            "mean_accuracy": Term(right.mean(), len(labels), 0.0),
            "last_accuracy": exits[-1],
        }


def distill(work: Work, options: Options) -> Outcome:
    """Fine-tuning of the backbone, then self-distillation of the exits, which reads no labels.

    ``work.model`` is a pretrained encoder or a fine-tuned one; its own head is left out. How early texts
    leave is chosen when the model runs, with ``speed``.

    Source: Liu et al. 2020 (FastBERT), section 3; sizes and rates are those of its code.
    """
    labels = work.task.labels
    encoder = classifiers.load_encoder(work.model, labels, options.seed).encoder
    torch.manual_seed(options.seed)
    model = FastBert(encoder, len(labels), head_size=options.head_size, num_heads=options.head_heads)
    work.open(work.plan())
    finetuning = work.plan(
        epochs=options.finetune_epochs,
        steps=options.finetune_steps,
        learning_rate=options.finetune_rate,
        rates={"student.teacher.": options.classifier_factor},
    )
    work.stage("finetuning", Backbone(model), finetuning)
    return work.last_stage(SelfDistillation(model.freeze()))
