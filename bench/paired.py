"""Interleaved timing: every round runs every contestant once, so that a ratio compares neighbours in time.

A machine that slows down for a second slows a whole round: the median of the per-round ratios does not see
it, where the ratio of two medians taken one after the other would.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

MIN_SAMPLE_S = 5e-4  # calls shorter than this are repeated inside one sample
MAX_CALLS = 1000
CUDA_SCRUB_BYTES = 2**30  # larger than any L2; takes longer than a call of eager's kernels to launch


@dataclass(frozen=True)
class Contestant:
    """``prepare`` runs untimed before every call; ``run``, which is timed, takes its result.

    ``known_s``: about how long a call takes, where that was seen already.
    """

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    known_s: float | None = None


class WallClock:
    """Seconds a call takes as the caller sees it; on a GPU the queue is drained before and after a sample."""

    def __init__(self, device: torch.device) -> None:
        self.synchronize: Callable[[], object] = (
            torch.cuda.synchronize if device.type == "cuda" else lambda: None
        )

    def sample(self, contestant: Contestant, calls: int) -> float:
        states = [contestant.prepare() for _ in range(calls)]
        run = contestant.run
        self.synchronize()
        start = time.perf_counter()
        for state in states:
            run(state)
        self.synchronize()
        return (time.perf_counter() - start) / calls


class EventClock:
    """Seconds between two CUDA events around a call, the L2 cache flushed before it."""

    def __init__(self, device: torch.device) -> None:
        self.scrub = torch.empty(CUDA_SCRUB_BYTES, dtype=torch.uint8, device=device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def sample(self, contestant: Contestant, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            state = contestant.prepare()
            self.scrub.zero_()  # so long that the host runs ahead: launches stay out of the events
            self.start.record()
            contestant.run(state)
            self.end.record()
            self.end.synchronize()
            total += self.start.elapsed_time(self.end) * 1e-3
        return total / calls


Clock = WallClock | EventClock


def run_rounds(
    contestants: Sequence[Contestant],
    clock: Clock,
    *,
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 50,
) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one entry a round; they come warm, called once at least.

    Rounds go on until ``budget_s`` is spent, but number at least ``min_rounds`` and at most ``max_rounds``.
    The order rotates by one each round, so nobody always goes first.
    """
    calls = {}
    for contestant in contestants:
        estimate = contestant.known_s or clock.sample(contestant, 1)
        calls[contestant.name] = calls_per_sample(estimate)
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    deadline = time.perf_counter() + budget_s
    with collector_paused():
        for turn in range(max_rounds):
            if turn >= min_rounds and time.perf_counter() > deadline:
                break
            first = turn % len(contestants)
            for contestant in (*contestants[first:], *contestants[:first]):
                seconds[contestant.name].append(clock.sample(contestant, calls[contestant.name]))
    return seconds


def calls_per_sample(estimate_s: float) -> int:
    return min(MAX_CALLS, max(1, math.ceil(MIN_SAMPLE_S / max(estimate_s, 1e-9))))


@contextmanager
def collector_paused() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def paired_ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> Spread:
    """How many times longer ``name`` takes than ``base``: the spread of their ratio within each round.

    Where one of the two ran outside the rounds, to their medians.
    """
    mine, theirs = seconds[name], seconds[base]
    if len(mine) != len(theirs):
        return Spread.of([Spread.of(mine).median / Spread.of(theirs).median])
    return Spread.of([a / b for a, b in zip(mine, theirs, strict=True)])


class ReplayClock:
    """A timer for pytest-benchmark that shows what was measured here: the fixture times one contestant after
    the other, and CUDA events are not a host clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def record(self, benchmark: Any, seconds: Sequence[float]) -> None:
        """Gives ``benchmark`` (the fixture, its timer being this clock) a round per entry of ``seconds``."""
        remaining = iter(seconds)

        def advance() -> None:
            self.now += next(remaining)

        benchmark.pedantic(advance, rounds=len(seconds))


replay_clock = ReplayClock()
