"""Distilled BiLSTM: a small recurrent network learns the teacher's logits on an augmented task."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bertops.data.augmentation import TangAugmentation
from bertops.distill.data import Batch, inputs
from bertops.distill.losses import DistilledBiLSTMLoss, Term
from bertops.distill.objective import SAMPLES, Distillation, answers, correct
from bertops.distill.settings import TaskSettings
from bertops.distill.work import Work
from bertops.models import BiLSTMClassifier, BiLSTMConfig
from bertops.models.bilstm import CHANNELS
from bertops.pretraining.settings import setting
from bertops.training import Outcome


@dataclass(frozen=True, kw_only=True)
class Options(TaskSettings):
    learning_rate: float = setting(1e-3, "its peak")
    hidden_size: int = setting(150, "of the LSTM, in each direction")
    dense_size: int = setting(200, "of the layer before the logits")
    channels: str = setting("multi", f"word tables: {' or '.join(CHANNELS)}")
    alpha: float = setting(0.0, "weight of the labels; the teacher's logits have the rest")
    augment: int = setting(20, "variants of every text; 0 for none")


class Logits(Distillation):
    """The squared distance of the logits and, with alpha, the labels; equation 2."""

    over: ClassVar = {"logits": SAMPLES, "labels": SAMPLES, "accuracy": SAMPLES}

    def __init__(self, student: Any, teacher: Any, alpha: float) -> None:
        super().__init__(student, teacher)
        self.loss = DistilledBiLSTMLoss(alpha)

    def terms(self, batch: Batch) -> dict[str, Term]:
        logits = self.student(**inputs(self.student, batch)).logits
        terms = self.loss(logits, answers(self.teacher, batch), batch["labels"])
        return {**terms, "accuracy": correct(logits, batch["labels"])}


def distill(work: Work, options: Options) -> Outcome:
    """One stage on the texts and their variants, whose labels are the teacher's answers.

    The student reads the teacher's tokens, and its word tables start as the teacher's; the paper has words
    and word2vec. It trains with Adadelta, this with AdamW.

    Source: Tang et al. 2019 (Distilling Task-Specific Knowledge from BERT), sections 3 and 4.
    """
    teacher = work.teacher()
    vectors = teacher.encoder.embeddings.word.weight
    torch.manual_seed(options.seed)
    student = BiLSTMClassifier(
        BiLSTMConfig(
            vocab_size=vectors.shape[0],
            embedding_size=vectors.shape[1],
            hidden_size=options.hidden_size,
            dense_size=options.dense_size,
            num_labels=len(work.task.labels),
            pair=work.task.train.pairs is not None,
            channels=options.channels,
            pad_token_id=teacher.config.pad_token_id,
        ),
        vectors=vectors,
    )
    augmentation = TangAugmentation(work.task.train.all_texts(), work.mask_token, seed=options.seed)
    rows = work.augmented(augmentation, options.augment)
    work.open(work.plan(rows))
    return work.last_stage(Logits(student, teacher, options.alpha), work.stream(rows))
