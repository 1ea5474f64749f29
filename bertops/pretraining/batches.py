"""Batches of pretraining as tensors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertops.data import DynamicMasker, PretrainingStream
from bertops.data.examples import PAIR_LABELS, Examples


class Batches:
    """A :class:`bertops.data.PretrainingStream` without end, as tensors."""

    def __init__(self, stream: PretrainingStream) -> None:
        self.stream = stream

    def __next__(self) -> dict[str, Tensor]:
        while True:
            for batch in self.stream:  # ends with the epoch
                return tensors(batch)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def held_out_batches(examples: Examples, masker: DynamicMasker, batch_size: int) -> list[dict[str, Tensor]]:
    """All of ``examples`` in order, with the masks of epoch 0."""
    stream = PretrainingStream(
        examples, masker, batch_size, shuffle=False, drop_last=False, packed=True, static=True
    )
    return [tensors(batch) for batch in stream]


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """What a model takes: rows of packed tokens become (1, T)."""
    found = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {name: x if name in ("cu_seqlens", *PAIR_LABELS) else x[None] for name, x in found.items()}
