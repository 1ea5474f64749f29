"""A task's texts as token ids, and the batches that training draws from them, in an order that repeats."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertops.data._host import host
from bertops.data.task import TaskTexts
from bertops.data.text import special_tokens
from bertops.models.encoder import Pretrained

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Batch = dict[str, Tensor]


class Rows(Protocol):
    """Numbered texts, tokenised: :class:`EncodedTexts`, or variants of them."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int]) -> Batch:
        """These rows, as :func:`pad` makes a batch of them."""


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of every text, with its special tokens, and the labels."""

    ids: list[NDArray[np.int32]]
    types: list[NDArray[np.int32]] | None  # 1 in the second text of a pair
    labels: Sequence[int]
    pad_id: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, numbers: Sequence[int]) -> Batch:
        types = None if self.types is None else [self.types[i] for i in numbers]
        return pad([self.ids[i] for i in numbers], types, [self.labels[i] for i in numbers], self.pad_id)

    def batches(self, size: int) -> list[Batch]:
        """All rows, those of like length together."""
        order = sorted(range(len(self)), key=lambda i: len(self.ids[i]))
        return [self.batch(order[first : first + size]) for first in range(0, len(self), size)]


@dataclass(frozen=True)
class AugmentedTexts:
    """Texts and variants of them, made when they are drawn: row ``j * n + i`` is variant j of text i of n.

    Variant 0 is the text itself. A pair has a variant of both its texts.

    Args:
        examples: the n texts.
        augment: makes the variant of a text of a given number, the row's; see
            :mod:`bertops.data.augmentation`.
        copies: variants beside the text itself.
        tokenizer: as :func:`encode` takes it.
    """

    examples: TaskTexts
    augment: Callable[[str, int], str]
    copies: int
    tokenizer: "Tokenizer"

    def __len__(self) -> int:
        return len(self.examples) * (self.copies + 1)

    def batch(self, numbers: Sequence[int]) -> Batch:
        texts, count = self.examples, len(self.examples)

        def variant(text: str, number: int) -> str:
            return text if number < count else self.augment(text, number)

        rows = [number % count for number in numbers]
        drawn = list(zip(rows, numbers, strict=True))
        first = [variant(texts.texts[row], number) for row, number in drawn]
        pairs = texts.pairs and [variant(texts.pairs[row], number) for row, number in drawn]
        labels = [texts.labels[row] for row in rows]
        return encode(self.tokenizer, TaskTexts(first, labels, pairs)).batch(range(len(rows)))


def encode(tokenizer: "Tokenizer", examples: TaskTexts) -> EncodedTexts:
    """Tokenises all of it; the tokenizer cuts at the length that it was told.

    Raises:
        ValueError: the tokenizer has no padding token.
    """
    pairs = examples.pairs
    inputs = examples.texts if pairs is None else list(zip(examples.texts, pairs, strict=True))
    encodings = tokenizer.encode_batch(inputs)
    ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
    types = None if pairs is None else [np.array(encoding.type_ids, np.int32) for encoding in encodings]
    return EncodedTexts(ids, types, examples.labels, special_tokens(tokenizer).pad_token_id)


def pad(
    ids: Sequence[NDArray[np.int32]],
    types: Sequence[NDArray[np.int32]] | None,
    labels: Sequence[int],
    pad_id: int,
) -> Batch:
    """``input_ids`` (B, N) as long as the longest row, ``mask`` (B, N), true for a real token, ``labels``
    (B,), and for pairs ``token_type_ids`` (B, N)."""
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]

    def padded(rows: Sequence[NDArray[np.int32]], padding: int) -> Tensor:
        flat = torch.from_numpy(np.concatenate(rows).astype(np.int64))
        return torch.full(mask.shape, padding).masked_scatter_(mask, flat)

    batch = {"input_ids": padded(ids, pad_id), "mask": mask, "labels": torch.tensor(labels)}
    return batch if types is None else {**batch, "token_type_ids": padded(types, 0)}


def inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """What ``model`` takes of a batch: token types only where it knows more than one, no padding inside."""
    ids = batch["input_ids"]
    if "cu_seqlens" in batch:  # plain text comes packed
        given: dict[str, Any] = {"input_ids": ids, "cu_seqlens": batch["cu_seqlens"]}
    else:
        mask = batch["mask"]
        if getattr(model.config, "pair", False):  # a BiLSTM reads the two texts apart
            second = batch["token_type_ids"] == 1
            return {"input_ids": ids, "mask": mask & ~second, "pair_ids": ids, "pair_mask": mask & second}
        given = {"input_ids": ids, "mask": mask}
        if isinstance(model, Pretrained):
            given["unpad"] = len(mask) > 1
    if "token_type_ids" in batch and getattr(model.config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = batch["token_type_ids"]
    return given


class ClassificationStream:
    """Shuffled batches without end, of a size that never changes: epochs follow each other inside a batch.

    The n-th row drawn is a function of (seed, n) and of the number of rows, so that a run on several
    processes with smaller batches sees the same rows in the same step.

    Args:
        rows: what to draw from.
        batch_size: rows of a batch.
        seed: of the order, another one in every epoch.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int = 0) -> None:
        if not len(rows) or batch_size < 1:
            raise ValueError(f"rows and batch_size must be at least 1, got {len(rows)} and {batch_size}")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.drawn = 0  # rows
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        numbers = [self._number(n) for n in range(self.drawn, self.drawn + self.batch_size)]
        self.drawn += self.batch_size
        return self.rows.batch(numbers)

    def _number(self, drawn: int) -> int:
        epoch, place = divmod(drawn, len(self.rows))
        if self._order[0] != epoch:
            self._order = (epoch, host().permutation(len(self.rows), self.seed, epoch))
        return int(self._order[1][place])

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn, "rows": len(self.rows)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError where the state is of a stream over another number of rows."""
        if state["rows"] != len(self.rows):
            raise ValueError(f"state is of a stream over {state['rows']} rows, this one has {len(self.rows)}")
        self.drawn = state["drawn"]
