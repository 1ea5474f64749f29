"""MobileBERT: progressive transfer, layer after layer, from an IB-BERT teacher; then words or the task."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from bertops.distill.capture import capture
from bertops.distill.data import Batch, inputs
from bertops.distill.initialize import init_ends_from_teacher
from bertops.distill.losses import (
    MobileBertLayerLoss,
    MobileBertPretrainingLoss,
    ProgressiveTransfer,
    Term,
)
from bertops.distill.losses.terms import cross_entropy
from bertops.distill.objective import LABELS, SAMPLES, TOKENS, Distillation, answers, correct
from bertops.distill.settings import Settings, TaskSettings, TextSettings
from bertops.distill.text import TextWork, masked_words
from bertops.distill.work import Work
from bertops.models import MobileBertConfig, MobileBertForPreTraining, MobileBertForSequenceClassification
from bertops.ops.kl_div_logits import kl_div_logits
from bertops.pretraining.settings import setting
from bertops.training import Outcome


@dataclass(frozen=True, kw_only=True)
class TransferSettings(Settings):
    bottleneck: int = setting(128, "width inside the student's layers")
    feed_forward: int = setting(512, "width of its feed-forward networks")
    stacked: int = setting(4, "feed-forward networks of a layer")
    layer_steps: int = setting(0, "of each layer's transfer; on a task in place of epochs")
    layer_rate: float = setting(
        5e-4, "learning rate of the transfer; the current layer has three times as much"
    )
    alpha: float = setting(
        0.5, "weight of the labels or masked words in the last stage; the teacher's answers have the rest"
    )


@dataclass(frozen=True, kw_only=True)
class Options(TaskSettings, TransferSettings):
    layer_epochs: float = setting(1.0, "of each layer's transfer")


@dataclass(frozen=True, kw_only=True)
class TextOptions(TextSettings, TransferSettings):
    learning_rate: float = setting(5e-4, "of the last stage, its peak")
    layer_steps: int = setting(10_000, "of each layer's transfer")
    weight_decay: float = setting(0.01, "of matrices")


class LayerTransfer(Distillation):
    """One layer's feature map and attention, equations 2 to 4; the layers behind it stand still."""

    over: ClassVar = dict.fromkeys(("feature_map", "mean", "variance", "attention"), TOKENS)

    def __init__(self, student: Any, teacher: Any, layer: int) -> None:
        super().__init__(student, teacher)
        self.layer, self.loss = layer, MobileBertLayerLoss()
        student.requires_grad_(False)
        student.encoder.layers[:layer].requires_grad_(True)

    def terms(self, batch: Batch) -> dict[str, Term]:
        student, teacher, layer = self.student.encoder, self.teacher.encoder, self.layer
        with capture(student, [layer]) as taps_s, capture(teacher, [layer]) as taps_t:
            hidden_s = student(**inputs(student, batch), output_hidden_states=True).hidden_states[layer]
            with torch.no_grad():
                hidden_t = teacher(**inputs(teacher, batch), output_hidden_states=True).hidden_states[layer]
        return self.loss(hidden_s, hidden_t, taps_s[layer], taps_t[layer], batch.get("mask"))


class TaskDistillation(Distillation):
    """Labels and the teacher's answers: the pretraining distillation's loss, with classes for words."""

    over: ClassVar = {"labels": SAMPLES, "logits": SAMPLES, "accuracy": SAMPLES}

    def __init__(self, student: Any, teacher: Any, alpha: float) -> None:
        super().__init__(student.requires_grad_(True), teacher)
        self.alpha = alpha

    def terms(self, batch: Batch) -> dict[str, Term]:
        logits, labels = self.student(**inputs(self.student, batch)).logits, batch["labels"]
        soft = kl_div_logits(logits, answers(self.teacher, batch), reduction="sum")
        return {
            "labels": cross_entropy(logits, labels, self.alpha),
            "logits": Term(soft, len(labels), 1 - self.alpha),
            "accuracy": correct(logits, labels),
        }


class PretrainingDistillation(Distillation):
    """Masked words, the teacher's distribution over them and, of pairs, the next sentence: equation 5."""

    over: ClassVar = {
        **dict.fromkeys(("mlm", "kd", "mlm_accuracy"), LABELS),
        **dict.fromkeys(("nsp", "nsp_accuracy"), SAMPLES),
    }

    def __init__(self, student: Any, teacher: Any, alpha: float) -> None:
        super().__init__(student.requires_grad_(True), teacher)
        self.loss = MobileBertPretrainingLoss(alpha)

    def terms(self, batch: Batch) -> dict[str, Term]:
        words_s, labels, hidden = masked_words(self.student, batch)
        with torch.no_grad():
            words_t = masked_words(self.teacher, batch)[0]
        measured = {}
        if not self.training:  # the logits once more
            measured["mlm_accuracy"] = correct(F.linear(*words_s), labels)
        if "next_sentence_label" not in batch:
            return self.loss(words_s, words_t, labels) | measured
        random = batch["next_sentence_label"]
        logits = self.student.answer(hidden, batch.get("mask"), batch.get("cu_seqlens"))
        measured["nsp_accuracy"] = correct(logits, random)
        return self.loss(words_s, words_t, labels, logits, random) | measured


def narrow_student(
    teacher: Any, options: TransferSettings, kind: Any = MobileBertForSequenceClassification
) -> Any:
    """A MobileBERT as wide between its layers as the teacher, with its embeddings and head.

    Raises:
        ValueError: the teacher is of another architecture.
    """
    config = teacher.config
    if not isinstance(config, MobileBertConfig):
        raise ValueError(
            "mobilebert needs a teacher with a MobileBERT's embeddings, width and heads, an IB-BERT "
            f"(bertops.models.sizes.IB_BERT), got a {config.family}: its layers cannot be compared with a "
            "MobileBERT's one by one. Take another system, such as minilm, for it"
        )
    torch.manual_seed(options.seed)
    student = kind(
        replace(
            config,
            intra_bottleneck_size=options.bottleneck,
            intermediate_size=options.feed_forward,
            num_feedforward_networks=options.stacked,
            key_query_shared_bottleneck=True,
            use_bottleneck_attention=False,
            normalization_type="no_norm",
            hidden_act="relu",
            hidden_dropout_p=0.0,
            classifier_dropout_p=0.0,
        )
    )
    init_ends_from_teacher(student, teacher)
    return student.train()


def distill(work: Work, options: Options) -> Outcome:
    """A stage for every layer, in which it learns at three times the rate and those before it at 0.3 of it,
    then the task.

    The paper transfers 10,000 steps a layer on Wikipedia and books, and distils with masked words after that
    (:func:`distill_text`); here both happen on the task's texts, and every stage has a learning rate schedule
    of its own.

    Source: Sun et al. 2020 (MobileBERT), sections 3.4 and 3.5; rates are those of its code.
    """
    teacher = work.teacher()
    student = narrow_student(teacher, options)
    work.open(work.plan())
    transfer_layers(work, student, teacher, options, epochs=options.layer_epochs)
    return work.last_stage(TaskDistillation(student, teacher, options.alpha))


def distill_text(work: TextWork, options: TextOptions) -> Outcome:
    """The same stages on plain text, then pretraining distillation, which teaches words in place of a task.

    The teacher is an IB-BERT with a masked language model's head, from which the student's starts. Where it
    has one for the next sentence too, sequences are pairs and the student learns to answer that as well, the
    last term of equation 5; with another teacher they are ``packing``'s.

    Source: Sun et al. 2020 (MobileBERT), sections 3.4 and 3.5.
    """
    teacher = work.pretrained()
    work.next_sentence = isinstance(teacher, MobileBertForPreTraining)
    if work.next_sentence and options.packing != TextOptions.packing:
        raise ValueError(
            "packing cannot be chosen where the teacher has a head for the next sentence and sequences are "
            f"pairs, got {options.packing!r}"
        )
    student = narrow_student(teacher, options, type(teacher))
    work.open(work.plan())
    transfer_layers(work, student, teacher, options)
    return work.last_stage(PretrainingDistillation(student, teacher, options.alpha))


def transfer_layers(
    work: Work | TextWork, student: Any, teacher: Any, options: TransferSettings, **length: Any
) -> None:
    """A stage for every layer; ``length`` is what its plan takes beside ``layer_steps``."""
    depth = len(student.encoder.layers)
    transfer = ProgressiveTransfer(depth, 1)
    for layer in range(1, depth + 1):
        factors = transfer.at(layer - 1).factors[:layer]
        plan = work.plan(
            **length,
            steps=options.layer_steps,
            learning_rate=options.layer_rate,
            rates={f"student.encoder.layers.{i}.": factor for i, factor in enumerate(factors)},
        )
        work.stage(f"layer-{layer}", LayerTransfer(student, teacher, layer), plan)
