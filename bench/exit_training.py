"""Text, its selection set, and the training of the models that :mod:`bench.early_exit` compares."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bench.real import model_folder
from bertops.data import pack, read_tsv
from bertops.distill.losses.fastbert import self_distillation_loss
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

    def packed(self) -> "PackedRows":
        batch = pack(self.ids)
        return PackedRows(
            torch.from_numpy(batch.input_ids)[None],
            torch.from_numpy(batch.cu_seqlens),
            torch.from_numpy(self.labels),
        )


class PackedRows(NamedTuple):
    input_ids: Tensor  # (1, T)
    cu_seqlens: Tensor  # (B + 1,)
    labels: Tensor  # (B,)


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
    """Rates are AdamW's peaks, ``batch`` counts texts, ``epochs`` those of every stage."""

    epochs: float = 1.0
    batch: int = 64
    learning_rate: float = 1e-4
    classifier_rate: float = 5e-4  # where classifiers learn from a model that is trained
    bfloat16: bool = True

    def fine_tune(self, title: str, model: FastBert, rows: Rows, seed: int) -> None:
        """The model without exits: cross entropy of the last classifier."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": parameters, "lr": self.learning_rate}]
        self.run(
            f"{title}, full model",
            model,
            groups,
            rows,
            seed,
            lambda output, batch: F.cross_entropy(output.logits.float(), batch.labels),
        )

    def add_exits(self, title: str, model: FastBert, rows: Rows, seed: int) -> None:
        """A fine-tuned model learns to answer at every layer as it did at the last; labels are not read.

        First the layers and all classifiers learn from the model as it was. FastBERT keeps its twelve layers
        as they are, but six have no layer to spare: they must learn to classify early. Then, as in FastBERT,
        all of it stands still but the students, which learn from their teacher.
        """
        before = copy.deepcopy(model).eval().requires_grad_(False)
        classifiers = [*model.students.parameters(), *model.teacher.parameters()]
        groups = [
            {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": self.learning_rate},
            {"params": classifiers, "lr": self.classifier_rate},
        ]

        def loss_of_all(output: FastBertOutput, batch: "PackedRows") -> Tensor:
            with torch.no_grad():
                hidden = before.encoder(batch.input_ids, cu_seqlens=batch.cu_seqlens).last_hidden_state
                target = before.classify(before.num_layers, hidden, cu_seqlens=batch.cu_seqlens)
            students = (*output.student_logits, output.logits)
            return self_distillation_loss(FastBertOutput(target, students))

        self.run(f"{title}, exits", model, groups, rows, seed + 100, loss_of_all)
        model.freeze()
        groups = [{"params": list(model.students.parameters()), "lr": self.classifier_rate}]
        self.run(
            f"{title}, students",
            model,
            groups,
            rows,
            seed,
            lambda output, batch: self_distillation_loss(output),
        )

    def run(
        self,
        title: str,
        model: FastBert,
        groups: list[dict[str, Any]],
        rows: Rows,
        seed: int,
        loss_of: Callable[[FastBertOutput, "PackedRows"], Tensor],
    ) -> None:
        """AdamW, warmed up and decayed linearly, over shuffled packed batches."""
        torch.manual_seed(seed)
        generator = np.random.default_rng(seed)
        steps = max(1, math.ceil(self.epochs * len(rows) / self.batch))
        warmup = max(1, round(WARMUP * steps))
        optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        order = np.concatenate([generator.permutation(len(rows)) for _ in range(math.ceil(self.epochs))])
        parameters = [p for group in groups for p in group["params"]]
        bar = tqdm(range(steps), desc=title, unit="step", dynamic_ncols=True, mininterval=1.0)
        shown = 0.0
        model.train()
        for step in bar:
            batch = rows.take(order[step * self.batch : (step + 1) * self.batch]).packed()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                loss = loss_of(model(batch.input_ids, cu_seqlens=batch.cu_seqlens), batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
            shown += (loss.item() - shown) * max(0.02, 1 / (step + 1))
            bar.set_postfix(loss=f"{shown:.3f}", refresh=False)
        model.eval()


def new_model(num_labels: int, seed: int) -> FastBert:
    """all-MiniLM-L6-v2 with new classifiers; its embeddings stay as they are."""
    torch.manual_seed(seed)
    encoder = BertModel.from_pretrained(model_folder(None), pooler=False)
    encoder.embeddings.requires_grad_(False)
    return FastBert(encoder, num_labels)
