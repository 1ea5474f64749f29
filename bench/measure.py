"""One comparison: every provider on the same inputs, checked, timed round by round, its memory taken."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench import correctness, paired
from bench.limits import Limits, Work
from bench.memory import peak_extra_bytes
from bench.paired import Contestant, Spread
from bench.providers import Call, Provider
from bench.shapes import DTYPE_NAMES, Case, HeadInputs, Inputs, Mode, Scope, Takes

BASE = "bertops"
LONG_S = 0.5  # a first call as long as this needs no second for its memory and its time to be typical
ENDLESS_S = 10.0  # ... and no rounds


@dataclass(frozen=True)
class Op:
    """What the bench must know of an op: its outputs, what it costs at least, and who else can do it."""

    name: str
    takes: Takes
    cases: Callable[[Scope, str], Sequence[Case]]  # of a scope and a type of device
    providers: list[Provider]
    reference: correctness.Reference  # of a loss: its rows
    outputs: tuple[str, ...]
    upstream: Callable[[Any], list[Tensor]]  # gradients of the reference's outputs
    work: Callable[[Any, Mode], Work]

    @property
    def is_loss(self) -> bool:
        """Providers return a number: the sum of the reference's rows times ``upstream``."""
        return self.outputs == ("loss",)


def noise(inputs: HeadInputs, maps: int = 0) -> list[Tensor]:
    """For out (B, H, N, D), none at padding as no loss looks there, and for ``maps`` of (B, H, N, N)."""
    like = inputs.leaves[0]
    generator = torch.Generator().manual_seed(1)
    shapes = [like.shape, *[(*like.shape[:3], inputs.length)] * maps]
    grads = [torch.randn(shape, generator=generator).to(like) for shape in shapes]
    if inputs.mask is not None:
        grads[0] *= inputs.mask[:, None, :, None]
    return grads


def share_of_rows(inputs: HeadInputs, count: int) -> list[Tensor]:
    """For the rows (B, H, N) of a loss that is their sum over ``count``, in fp64."""
    like = inputs.leaves[0]
    return [torch.full(like.shape[:3], 1 / count, dtype=torch.float64, device=like.device)]


@dataclass
class Result:
    """``status``: ok, wrong, failed or unavailable; only ok has figures. ``ratio``: over bertops' time."""

    provider: str
    dtype: str
    status: str
    reason: str | None = None
    seconds: list[float] = field(default_factory=list)
    ratio: Spread | None = None
    work: Work | None = None
    extra_bytes: int | None = None

    @property
    def time(self) -> Spread:
        return Spread.of(self.seconds)

    def as_dict(self, limits: Limits) -> dict[str, Any]:
        """With what follows from the times: spread, rates, and the share of the limits known by now."""
        figures: dict[str, Any] = {"time": None, "share_of_limit": None}
        if self.work is not None:
            figures["time"] = asdict(self.time)
            for name, amount in asdict(self.work).items():
                figures[f"{name}_per_s"] = amount / self.time.median
            figures["share_of_limit"] = limits.least_seconds(self.work, self.dtype) / self.time.median
        return {**asdict(self), **figures}


class Comparison:
    """All modes of one op on one case; the truth is computed once."""

    def __init__(self, op: Op, case: Case, inputs: Inputs, sampled: bool = False) -> None:
        """``sampled``: results are checked on some samples and heads, not on all."""
        self.op, self.case, self.inputs = op, case, inputs
        self.sampled = sampled or inputs.too_large
        self.device = inputs.leaves[0].device
        self.upstream = op.upstream(inputs)
        self.grads = [torch.ones((), device=self.device)] if op.is_loss else self.upstream
        torch._dynamo.reset()  # one compiled entry a mode, far from the recompile limit
        self.truths: dict[tuple[bool, bool], correctness.Truth] = {}

    def run(
        self,
        mode: Mode,
        budget_s: float,
        min_rounds: int = 5,
        step: Callable[[str], None] = lambda text: None,
    ) -> list[Result]:
        results = []
        contestants: list[Contestant] = []
        with torch.set_grad_enabled(mode != "forward"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for provider in self.op.providers:
                if provider.applies(self.case):
                    step(f"{provider.name}: check")
                    result, contestant = self.admit(provider, mode)
                    results.append(result)
                    if contestant is not None:
                        contestants.append(contestant)
                        if contestant.known_s is None:
                            step(f"{provider.name}: memory")
                            result.extra_bytes = self.memory(contestant)
            step("timing")
            seconds = self.time(contestants, budget_s, min_rounds)
        for result in results:
            if result.status == "ok":
                self.fill(result, seconds, self.works(mode)[result.provider])
        return results

    def time(self, contestants: list[Contestant], budget_s: float, min_rounds: int) -> dict[str, list[float]]:
        endless = {c.name: [c.known_s] for c in contestants if c.known_s and c.known_s >= ENDLESS_S}
        others = [contestant for contestant in contestants if contestant.name not in endless]
        if not others:
            return endless
        timed = paired.run_rounds(others, self.clock(), budget_s=budget_s, min_rounds=min_rounds)
        return endless | timed

    def clock(self) -> paired.Clock:
        if self.device.type == "cuda" and not self.case.overhead:
            return paired.EventClock(self.device)
        return paired.WallClock(self.device)

    def admit(self, provider: Provider, mode: Mode) -> tuple[Result, Contestant | None]:
        """Builds the provider and checks its result: a wrong one is not timed."""
        dtype = DTYPE_NAMES[self.inputs.leaves[0].dtype]
        reason = provider.unavailable(self.inputs, mode)
        if reason is not None:
            return Result(provider.name, dtype, "unavailable", reason), None
        results: list[Tensor] = []
        try:
            call = provider.make(self.inputs)
            if provider.compiles or self.device.type == "cuda":  # Triton compiles too
                self.results(provider, call, mode)
            start = time.perf_counter()
            extra_bytes = peak_extra_bytes(
                self.device, lambda: results.extend(self.results(provider, call, mode))
            )
            seconds = time.perf_counter() - start
        except RuntimeError as error:  # a peer that cannot take the shape, or a compiler that gives up
            return Result(provider.name, dtype, "failed", str(error).strip().splitlines()[0]), None
        results = [x if x.dim() == 0 else self.part(x) for x in results]
        inputs = self.seen_by(provider).pick(self.part)
        reason = correctness.wrong(results, self.truth(provider, mode), inputs)
        if reason is not None:
            return Result(provider.name, dtype, "wrong", reason), None
        contestant = self.contestant(provider.name, call, mode)
        if seconds < LONG_S or mode == "backward":
            return Result(provider.name, dtype, "ok"), contestant
        result = Result(provider.name, dtype, "ok", extra_bytes=extra_bytes)
        return result, replace(contestant, known_s=seconds)

    def part(self, x: Tensor) -> Tensor:
        """What is checked of a result."""
        return self.inputs.part(x) if self.sampled else x

    @property
    def checked(self) -> str:
        """What the check of every result covered."""
        whole = self.inputs.leaves[0]
        heads, of = self.part(whole).shape[:2].numel(), whole.shape[:2].numel()
        part = "everything" if heads == of else f"{heads} of {of} heads"
        if self.op.is_loss and self.truths:
            known = all(truth.oracle[0] is not None for truth in self.truths.values())
            return f"{'loss' if known else 'not the loss'}; of the gradients {part}"
        return part

    def leaves(self, mode: Mode) -> list[Tensor]:
        return [x.detach().requires_grad_(mode != "forward") for x in self.inputs.leaves]

    def results(self, provider: Provider, call: Call, mode: Mode) -> list[Tensor]:
        leaves = self.leaves(mode)
        outputs = provider.compared(call(*leaves, *self.inputs.constants))
        gradients = () if mode == "forward" else torch.autograd.grad(outputs, leaves, self.grads)
        return [*outputs, *gradients]

    def contestant(self, name: str, call: Call, mode: Mode) -> Contestant:
        leaves, constants, grads = self.leaves(mode), self.inputs.constants, self.grads
        if mode == "forward":
            return Contestant(name, lambda _: call(*leaves, *constants))
        if mode == "backward":
            return Contestant(
                name,
                lambda outputs: torch.autograd.grad(outputs, leaves, grads),
                prepare=lambda: call(*leaves, *constants),
            )
        return Contestant(name, lambda _: torch.autograd.grad(call(*leaves, *constants), leaves, grads))

    def seen_by(self, provider: Provider) -> Inputs:
        if not provider.ignores_mask:
            return self.inputs
        assert isinstance(self.inputs, HeadInputs)
        return replace(self.inputs, mask=None)

    def truth(self, provider: Provider, mode: Mode) -> correctness.Truth:
        gradients = mode != "forward" or self.case.modes != ("forward",)
        key = (provider.ignores_mask, gradients)
        if key not in self.truths:
            op, inputs = self.op, self.seen_by(provider)
            names = [*op.outputs, *(f"grad {name}" for name in op.takes.leaf_names)]
            if op.is_loss:
                self.truths[key] = correctness.loss_truth(
                    op.reference, names, inputs, self.part, self.upstream[0], gradients
                )
            else:
                upstream = [self.part(g) for g in self.upstream]
                self.truths[key] = correctness.truth(
                    op.reference, names, inputs.pick(self.part), upstream, gradients
                )
        return self.truths[key]

    def works(self, mode: Mode) -> dict[str, Work]:
        return {provider.name: self.op.work(self.seen_by(provider), mode) for provider in self.op.providers}

    def fill(self, result: Result, seconds: dict[str, list[float]], work: Work) -> None:
        result.seconds = seconds[result.provider]
        if BASE in seconds:
            result.ratio = paired.paired_ratio(seconds, result.provider, BASE)
        result.work = work

    def memory(self, contestant: Contestant) -> int | None:
        state = contestant.prepare()
        return peak_extra_bytes(self.device, lambda: contestant.run(state))
