"""What a pool has done so far."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LayerStats:
    """One layer of a pool."""

    batches: int
    samples: int  # that it ran, a sample whose batch had failed and who ran again alone once
    answered: int  # samples that left here with their answer
    mean_fill: float  # samples / (batches * max_batch); NaN before the first batch


@dataclass(frozen=True)
class PoolStats:
    """Counts since the pool was opened: submitted = answered + failed + cancelled + pending.

    Latencies and throughput are those of the last answers, at most ``WINDOW``, and NaN before the first one.
    Latency counts from the moment at which the pool took the request, not the time that ``submit`` blocked.
    Throughput is answers over the time from their first submission to their last answer.
    """

    submitted: int
    answered: int
    failed: int
    cancelled: int
    pending: int
    layers: tuple[LayerStats, ...]  # layers[0] is layer 1
    latency_p50_s: float
    latency_p95_s: float
    latency_p99_s: float
    throughput: float  # answers a second


WINDOW = 4096


class Tally:
    """Counts for :class:`PoolStats`. Not thread-safe."""

    def __init__(self, num_layers: int, max_batch: int) -> None:
        self.submitted = self.answered = self.failed = self.cancelled = 0
        self._max_batch = max_batch
        self._batches = [0] * num_layers
        self._samples = [0] * num_layers
        self._exits = [0] * num_layers
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # submitted, latency

    def ran(self, layer: int, samples: int) -> None:
        self._batches[layer - 1] += 1
        self._samples[layer - 1] += samples

    def answer(self, layer: int, submitted: float, latency: float) -> None:
        self.answered += 1
        self._exits[layer - 1] += 1
        self._window.append((submitted, latency))

    def stats(self) -> PoolStats:
        p50 = p95 = p99 = throughput = math.nan
        if self._window:
            submitted, latency = np.array(self._window).T
            p50, p95, p99 = np.percentile(latency, (50, 95, 99)).tolist()
            seconds = (submitted + latency).max() - submitted.min()
            throughput = float(len(latency) / seconds) if seconds else math.inf
        columns = zip(self._batches, self._samples, self._exits, strict=True)
        layers = tuple(
            LayerStats(
                batches, samples, exits, samples / (batches * self._max_batch) if batches else math.nan
            )
            for batches, samples, exits in columns
        )
        pending = self.submitted - self.answered - self.failed - self.cancelled
        counts = self.submitted, self.answered, self.failed, self.cancelled, pending
        return PoolStats(*counts, layers, p50, p95, p99, throughput)
