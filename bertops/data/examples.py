"""What the sources of pretraining examples have in common: sequences gathered from a corpus by number."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bertops.data._host import MAX_TOKENS, integers
from bertops.data.corpus import TokenCorpus

PAIR_LABELS = ("sentence_order_label", "next_sentence_label")


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences with their special tokens: (B, length) padded on the right, or (T,) end to end."""

    input_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]  # (B + 1,), offsets of the sequences as if they lay end to end
    token_type_ids: NDArray[np.int64] | None = None  # of the shape of input_ids
    sentence_order_label: NDArray[np.int64] | None = None  # (B,), 1 = swapped
    next_sentence_label: NDArray[np.int64] | None = None  # (B,), 1 = a random second segment

    @property
    def pair_labels(self) -> dict[str, NDArray[np.int64]]:
        """Those of pairs, by name; empty where sequences are none."""
        labels = {name: getattr(self, name) for name in PAIR_LABELS}
        return {name: label for name, label in labels.items() if label is not None}

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(B,): real tokens of each."""
        return np.diff(self.cu_seqlens)

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """(B, length), true for a real token; None where sequences lie end to end."""
        if self.input_ids.ndim == 1:
            return None
        return np.arange(self.input_ids.shape[1], dtype=np.int32) < self.lengths[:, None]

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """(T,), from 0 in every sequence, as if they lay end to end."""
        starts = self.cu_seqlens[:-1].astype(np.int64)
        return np.arange(self.cu_seqlens[-1], dtype=np.int64) - np.repeat(starts, self.lengths)


class Examples(Protocol):
    """A source of sequences: ``SentenceBlocks``, ``SentenceOrderPairs`` or ``NextSentencePairs``."""

    corpus: TokenCorpus
    length: int  # most tokens of a sequence

    def count(self, epoch: int = 0) -> int:
        """How many sequences an epoch has."""

    def gather(self, indices: ArrayLike, epoch: int = 0, *, packed: bool = False) -> Sequences:
        """The sequences of these numbers, in this order."""


def checked_indices(indices: ArrayLike, count: int, length: int) -> NDArray[np.int64]:
    """Numbers in [0, count) as int64; not so many that int32 could not count their tokens."""
    array = integers("indices", indices)
    if array.size and not (array.min() >= 0 and array.max() < count):
        raise IndexError(f"indices must lie in [0, {count}), got {array.min()} to {array.max()}")
    if array.size * length > MAX_TOKENS:
        raise ValueError(
            f"indices must ask for at most {MAX_TOKENS} tokens, int32 offsets count no further: got "
            f"{array.size} sequences of length {length}"
        )
    return array
