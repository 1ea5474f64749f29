"""What all benchmarks of a run share: options, machine, limits, model, and every result."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

from bench import limits
from bench.measure import Comparison, Op, Result
from bench.memory import METHODS
from bench.real import RealModel
from bench.shapes import Case, HeadCase, Inputs, Mode, Scope, Takes
from bertops.cli import machine

BUDGET_S = {"quick": 0.4, "lengths": 1.0, "full": 3.0}  # of timing, a comparison
MIN_ROUNDS = {"quick": 2, "lengths": 2, "full": 5}
LIMITS_EVERY_S = 20.0
QUICK_DTYPES = (torch.float32, torch.bfloat16)
FULL_DTYPES = (*QUICK_DTYPES, torch.float16)


class Run:
    """Measures what items ask for, once, and keeps it."""

    def __init__(self, config: pytest.Config) -> None:
        self.scope: Scope = "full"
        if config.getoption("quick") or config.getoption("lengths"):
            self.scope = "quick" if config.getoption("quick") else "lengths"
        self.impl = config.getoption("impl")
        self.device = torch.device(
            config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        self.machine = {**machine(self.device), "load": load(), "commit": commit()}
        self.step: Callable[[str], None] = lambda text: None  # the progress bar's line
        self._options = config.getoption("model"), config.getoption("text")
        self.limits: limits.Limits | None = None
        self._limits_at = 0.0
        self._model: RealModel | None = None
        self._inputs: dict[tuple[Takes, Case], Inputs] = {}
        self._comparison: Comparison | None = None
        self.results: dict[tuple[str, Case, str], list[Result]] = {}
        self._about: dict[tuple[str, Case, str], dict[str, str]] = {}  # title, and what was checked

    def measure_limits(self) -> limits.Limits:
        """The best of all measurements in this run."""
        self.step("limits of this machine")
        measured = limits.measure(self.device, FULL_DTYPES if self.scope == "full" else QUICK_DTYPES)
        if self.limits is None:
            self.limits = measured
        else:
            self.limits.improve(measured)
        self._limits_at = time.monotonic()
        return self.limits

    @property
    def model(self) -> RealModel:
        if self._model is None:
            self.step("loading the model")
            self._model = RealModel(*self._options, self.device, self.impl)
        return self._model

    def inputs(self, takes: Takes, case: Case) -> Inputs:
        if (takes, case) not in self._inputs:
            if case.source == "random":
                self._inputs[takes, case] = case.draw(takes, self.device)
            else:
                assert isinstance(case, HeadCase)
                self._inputs[takes, case] = self.model.inputs(takes, case)
        return self._inputs[takes, case]

    def result(self, op: Op, case: Case, mode: Mode, provider: str) -> Result:
        key = (op.name, case, mode)
        if key not in self.results:
            known = self._comparison
            if known is None or (known.op.name, known.case) != (op.name, case):
                inputs = self.inputs(op.takes, case)
                if self.limits is None or time.monotonic() - self._limits_at > LIMITS_EVERY_S:
                    self.measure_limits()
                known = self._comparison = Comparison(op, case, inputs, sampled=self.scope != "full")
            self.results[key] = known.run(mode, BUDGET_S[self.scope], MIN_ROUNDS[self.scope], self.step)
            self._about[key] = {"title": known.inputs.title, "checked": known.checked}
        return next(result for result in self.results[key] if result.provider == provider)

    def as_dict(self) -> dict[str, Any]:
        model = self._model
        known = self.limits or self.measure_limits()
        return {
            "machine": self.machine,
            "scope": self.scope,
            "impl": self.impl,
            "model": None if model is None else {"name": model.name, "text": model.text_name, **model.check},
            "limits": known.as_dict(),
            "memory_method": METHODS[self.device.type],
            "comparisons": [
                {
                    "op": op,
                    "mode": mode,
                    "case": case.as_dict(),
                    "curve": case.curve,
                    **self._about[op, case, mode],
                    "results": [result.as_dict(known) for result in results],
                }
                for (op, case, mode), results in self.results.items()
            ],
        }


def load() -> str:
    """Says how busy the machine was before the run: other work on it makes every figure noisy."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    average = os.getloadavg()[0]
    busy = ", BUSY: the figures are noisy" if average > cpus / 2 else ""
    return f"{average:.1f} on {cpus} CPUs before the run{busy}"


def commit() -> str:
    info = get_commit_info()
    return str(info.get("id", "unknown"))[:12] + (" with changes" if info.get("dirty") else "")


RUN = pytest.StashKey[Run]()
