"""Packs token sequences end to end, without padding, as ``cu_seqlens`` wants them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bertops.data._host import MAX_TOKENS, host


class Unpadded(NamedTuple):
    """Where the T real tokens of a padded (B, N) batch stand."""

    indices: NDArray[np.int64]  # (T,), into the flattened batch, in row order
    position_ids: NDArray[np.int64]  # (T,), counted over the real tokens of a row
    cu_seqlens: NDArray[np.int32]  # (B + 1,), the offset of every row's first token


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end.

    A model takes ``torch.from_numpy(batch.input_ids)[None]`` with ``torch.from_numpy(batch.cu_seqlens)``.
    """

    input_ids: NDArray[np.int64]  # (T,)
    position_ids: NDArray[np.int64]  # (T,), from 0 in every sequence
    cu_seqlens: NDArray[np.int32]  # (number of sequences + 1,)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(number of sequences,): tokens in each."""
        return np.diff(self.cu_seqlens)

    def split(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        """Views of ``rows`` (T, ...), one for every sequence."""
        if rows.shape[:1] != self.input_ids.shape:
            raise ValueError(f"rows must have shape ({len(self.input_ids)}, ...), got {rows.shape}")
        offsets = self.cu_seqlens.tolist()
        return [rows[start:end] for start, end in pairwise(offsets)]


def unpad(mask: ArrayLike) -> Unpadded:
    """Finds the real tokens of a padded batch.

    ``rows.reshape(B * N, ...)[indices]`` packs; assigning to the same places puts results back.

    Args:
        mask: (B, N), bool or integer, true for a real token, in any pattern; rows may be empty.

    Raises:
        ValueError: another rank, or more places than int32 offsets can count.
        TypeError: another dtype.
        ImportError: the compiled module ``bertops._host`` is missing; says how to build it.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape (B, N), got {mask.shape}")
    if mask.dtype != np.bool_ and not np.issubdtype(mask.dtype, np.integer):
        raise TypeError(f"mask must be bool or integer, true for a real token, got {mask.dtype}")
    _check_count("mask", mask.size)
    return Unpadded(*host().unpad(mask != 0))


def pack(sequences: Sequence[ArrayLike]) -> PackedBatch:
    """Lays token sequences end to end.

    Args:
        sequences: 1-D integer sequences, of any length, 0 included; there may be none.

    Raises:
        ValueError: a sequence is not 1-D, or there are more tokens than int32 offsets can count.
        TypeError: a sequence does not hold integers.
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    for i, array in enumerate(arrays):
        if array.ndim != 1:
            raise ValueError(f"sequences[{i}] must be 1-D, got shape {array.shape}")
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"sequences[{i}] must hold integers, got {array.dtype}")
    lengths = np.array([array.size for array in arrays], dtype=np.int64)
    _check_count("sequences", int(lengths.sum()))
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = np.arange(cu_seqlens[-1], dtype=np.int64)
    return PackedBatch(
        input_ids=np.concatenate([np.empty(0, np.int64), *arrays]).astype(np.int64),
        position_ids=tokens - np.repeat(cu_seqlens[:-1], lengths),
        cu_seqlens=cu_seqlens,
    )


def _check_count(name: str, count: int) -> None:
    if count > MAX_TOKENS:
        raise ValueError(
            f"{name} must hold at most {MAX_TOKENS} tokens, int32 offsets count no further: {count}"
        )
