"""Sums of losses and counts between two lines of ``metrics.jsonl``."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class Window:
    """Sums since the last line, over all processes, and the time that training took."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}  # numbers on the device, so that a step need not wait for them
        self.counts: dict[str, Any] = {}
        self.seconds, self.total_seconds = 0.0, 0.0
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for an evaluation or a checkpoint."""
        self._lap()
        yield
        self._since = time.perf_counter()

    def _lap(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self.total_seconds += now - self._since
        self._since = now

    def add(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> None:
        for total, new in ((self.sums, sums), (self.counts, counts)):
            for name, value in new.items():
                total[name] = total.get(name, 0.0) + value

    def state_dict(self) -> dict[str, Any]:
        """Raises FloatingPointError where a sum is not finite; names it."""
        sums = {name: float(total) for name, total in self.sums.items()}
        counts = {name: float(total) for name, total in self.counts.items()}
        wrong = [name for name, total in sums.items() if not math.isfinite(total)]
        if wrong:
            raise FloatingPointError(f"{', '.join(wrong)} is not finite: try a lower learning rate")
        self._lap()
        return {"sums": sums, "counts": counts, "seconds": self.seconds, "total_seconds": self.total_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
        self.seconds, self.total_seconds = state["seconds"], state["total_seconds"]

    def means(self) -> dict[str, float]:
        """Of the sums, and the speed; the next window begins."""
        state = self.state_dict()
        sums, counts = state["sums"], state["counts"]
        self.sums, self.counts, self.seconds = {}, {}, 0.0
        return {
            **{name: total / max(1.0, counts[name]) for name, total in sums.items()},
            "tokens_per_second": round(counts["tokens"] / state["seconds"], 1),
            "seconds": round(state["total_seconds"], 2),
        }
