"""Samples that wait at every layer, and the rule which layer runs next."""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(eq=False, slots=True)
class Sample:
    """One request on its way."""

    input_ids: NDArray[np.int64]  # (N,)
    token_type_ids: NDArray[np.int64] | None  # (N,)
    submitted: float  # seconds, on the clock of the pool
    future: "Future[Any]"


@dataclass(eq=False, slots=True)
class Chunk:
    """Samples that reached a layer together, packed end to end; one request that is not embedded yet."""

    samples: list[Sample]
    entered: float  # seconds, when they came to this layer
    hidden: Tensor | None = None  # (1, tokens of all samples, H)
    state: Tensor | None = None  # (number of samples, state_size), the criterion's

    def split(self, count: int) -> "tuple[Chunk, Chunk]":
        """The first ``count`` samples and the others; both read the storage of this chunk."""
        assert self.hidden is not None and self.state is not None
        tokens = sum(len(sample.input_ids) for sample in self.samples[:count])
        first = self.samples[:count], self.entered, self.hidden[:, :tokens], self.state[:count]
        others = self.samples[count:], self.entered, self.hidden[:, tokens:], self.state[count:]
        return Chunk(*first), Chunk(*others)

    def singles(self) -> "list[Chunk]":
        """One chunk a sample."""
        alone, rest = [], self
        while len(rest.samples) > 1:
            one, rest = rest.split(1)
            alone.append(one)
        return [*alone, rest]


class LayerQueues:
    """One first-in-first-out queue a layer, and the choice of the next layer. Not thread-safe.

    A layer is full where ``max_batch`` samples wait, stalled where its first sample has stood there for
    ``max_stall_s``. The deepest layer that is either of these runs: only shallower layers feed it, so all of
    them get their turn, and whenever a layer runs, no deeper one is full. A queue past the first therefore
    holds fewer than 2 * max_batch samples, all of them together at most
    (num_layers - 1) * (max_batch - 1) + max_batch. Where no layer is full or stalled:

    - in a hurry (nobody new can come), the shallowest layer with a sample runs, so that deeper ones fill up;
    - else, if the sample that was submitted first has waited ``max_wait_s`` since, the layer it stands at.

    Samples pass every queue in the order in which they were submitted, so the oldest stands at the head of
    one.
    """

    def __init__(self, num_layers: int, max_batch: int, max_wait_s: float, max_stall_s: float) -> None:
        self.max_batch = max_batch
        self.max_wait_s = max_wait_s
        self.max_stall_s = max_stall_s
        self.waiting = [0] * (num_layers + 1)  # samples at each layer, from index 1 on
        self._queues: list[deque[Chunk]] = [deque() for _ in self.waiting]

    def put(self, layer: int, chunk: Chunk) -> None:
        """``chunk`` is next to run ``layer``, counted from 1."""
        self._queues[layer].append(chunk)
        self.waiting[layer] += len(chunk.samples)

    def take(self, layer: int) -> list[Chunk]:
        """The first ``max_batch`` samples at ``layer``, or all there are."""
        queue, room = self._queues[layer], self.max_batch
        taken = []
        while queue and room:
            chunk = queue.popleft()
            if len(chunk.samples) > room:
                chunk, rest = chunk.split(room)
                queue.appendleft(rest)
            taken.append(chunk)
            room -= len(chunk.samples)
        self.waiting[layer] -= self.max_batch - room
        return taken

    def next_layer(self, now: float, hurry: bool) -> int | None:
        """The layer to run at the time ``now``, None to wait."""
        oldest, oldest_submitted = None, now - self.max_wait_s
        shallowest = None
        for layer in range(len(self._queues) - 1, 0, -1):
            if not self.waiting[layer]:
                continue
            head = self._queues[layer][0]
            if self.waiting[layer] >= self.max_batch or head.entered <= now - self.max_stall_s:
                return layer
            if head.samples[0].submitted <= oldest_submitted:
                oldest, oldest_submitted = layer, head.samples[0].submitted
            shallowest = layer
        return shallowest if hurry else oldest

    def due(self) -> float | None:
        """When a layer has to run even if nobody new comes; None where nobody waits."""
        heads = [queue[0] for queue in self._queues if queue]
        times = [
            min(head.samples[0].submitted + self.max_wait_s, head.entered + self.max_stall_s)
            for head in heads
        ]
        return min(times, default=None)
