"""Text, its selection set, and the training of the models that :mod:`bench.early_exit` compares."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bench.real import model_folder
from bertops.data import pack, read_tsv
from bertops.distill.self_distillation import self_distillation_loss
from bertops.models import BertModel, FastBert, FastBertOutput

MAX_TOKENS = 128  # of a row; the longer ones are cut
MIN_WORDS = 8  # of a row of the selection set
WARMUP, WEIGHT_DECAY, CLIP = 0.1, 0.01, 1.0


@dataclass(frozen=True)
class Rows:
    """Token ids of texts, and their labels (rows,)."""

    ids: list[NDArray[np.int64]]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> "Rows":
        return Rows([self.ids[i] for i in index], self.labels[index])

    def batches(self, size: int) -> Iterator["Rows"]:
        """In their order, the last one shorter."""
        for start in range(0, len(self), size):
            yield Rows(self.ids[start : start + size], self.labels[start : start + size])

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids and mask (B, N), labels (B,)."""
        length = max(map(len, self.ids))
        ids = np.zeros((len(self), length), np.int64)
        mask = np.zeros((len(self), length), bool)
        for row, tokens in enumerate(self.ids):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(self.labels)

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids (1, T), cu_seqlens (B + 1,), labels (B,)."""
        batch = pack(self.ids)
        ids, cu_seqlens = torch.from_numpy(batch.input_ids)[None], torch.from_numpy(batch.cu_seqlens)
        return ids, cu_seqlens, torch.from_numpy(self.labels)


@dataclass(frozen=True)
class Task:
    name: str
    label_names: list[str]
    train: Rows
    selection: Rows  # carved out of the training file: every choice is made on it
    dev: Rows  # only measured


def read_task(folder: Path, held_out: int, limit: int | None) -> Task:
    """From ``train.tsv``, ``dev.tsv`` and ``labels.txt``; ``limit`` cuts the training rows."""
    tokenizer = Tokenizer.from_file(str(model_folder(None) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)

    def encode(texts: Sequence[str], labels: Sequence[int]) -> Rows:
        return Rows([np.array(e.ids) for e in tokenizer.encode_batch(list(texts))], np.array(labels))

    texts, labels = read_tsv(folder / "train.tsv")
    selected, kept = split(texts, held_out)
    kept = kept[:limit]
    return Task(
        name=folder.name,
        label_names=(folder / "labels.txt").read_text(encoding="utf-8").split(),
        train=encode([texts[i] for i in kept], [labels[i] for i in kept]),
        selection=encode([texts[i] for i in selected], [labels[i] for i in selected]),
        dev=encode(*read_tsv(folder / "dev.tsv")),
    )


def split(texts: Sequence[str], held_out: int) -> tuple[list[int], list[int]]:
    """Rows of the selection set, and those that training may see.

    Where rows are phrases of others (SST-2), only whole sentences are held out, rows that stand in no other
    row, and with them goes every phrase of theirs.
    """
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    bounded = [f" {text.strip()} " for text in texts]
    everything = "\n".join(bounded)
    selected: list[int] = []
    for i in order:
        if len(selected) == held_out:
            break
        if len(texts[i].split()) >= MIN_WORDS and everything.count(bounded[i]) == 1:
            selected.append(i)
    if len(selected) < held_out:
        raise ValueError(f"{len(selected)} rows can be held out, expected {held_out}")
    seen = "\n".join(bounded[i] for i in selected)
    return selected, [i for i in order if bounded[i] not in seen]


@dataclass(frozen=True)
class Recipe:
    """How the models are trained; rates are AdamW's peaks, batches are texts."""

    epochs: float = 1.0
    batch: int = 64
    learning_rate: float = 1e-4
    student_epochs: float = 1.0
    student_learning_rate: float = 5e-4
    bfloat16: bool = True

    def train(self, title: str, model: FastBert, rows: Rows, seed: int, stage: str) -> None:
        """Warmed up and decayed linearly, over shuffled packed batches."""
        torch.manual_seed(seed)
        generator = np.random.default_rng(seed)
        loss_of, students = LOSSES[stage], stage == "students"
        epochs = self.student_epochs if students else self.epochs
        rate = self.student_learning_rate if students else self.learning_rate
        steps = max(1, math.ceil(epochs * len(rows) / self.batch))
        warmup = max(1, round(WARMUP * steps))
        if students:
            model.freeze()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        order = np.concatenate([generator.permutation(len(rows)) for _ in range(math.ceil(epochs))])
        bar = tqdm(range(steps), desc=title, unit="step", dynamic_ncols=True, mininterval=1.0)
        model.train()
        shown = 0.0
        for step in bar:
            index = order[step * self.batch : (step + 1) * self.batch]
            input_ids, cu_seqlens, labels = rows.take(index).packed()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                output = model(input_ids, cu_seqlens=cu_seqlens)
            loss = loss_of(output, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
            shown += (loss.item() - shown) * max(0.02, 1 / (step + 1))
            bar.set_postfix(loss=f"{shown:.3f}", refresh=False)
        model.eval()


def loss_of_full(output: FastBertOutput, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.float(), labels)


def loss_of_exits(output: FastBertOutput, labels: Tensor) -> Tensor:
    return torch.stack(
        [F.cross_entropy(z.float(), labels) for z in (*output.student_logits, output.logits)]
    ).sum()


def loss_of_students(output: FastBertOutput, labels: Tensor) -> Tensor:
    return self_distillation_loss(output)


# with exits every classifier learns the labels first, before the students learn from the teacher
LOSSES: dict[str, Callable[[FastBertOutput, Tensor], Tensor]] = {
    "full": loss_of_full,
    "exits": loss_of_exits,
    "students": loss_of_students,
}


def new_model(num_labels: int, seed: int) -> FastBert:
    """all-MiniLM-L6-v2 with new classifiers; its embeddings stay as they are."""
    torch.manual_seed(seed)
    encoder = BertModel.from_pretrained(model_folder(None), pooler=False)
    encoder.embeddings.requires_grad_(False)
    return FastBert(encoder, num_labels)
