"""One comparison: every provider on the same inputs, checked, timed round by round, its memory taken."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench import correctness, paired
from bench.limits import Limits, Work
from bench.memory import peak_extra_bytes
from bench.paired import Contestant, Spread
from bench.providers import Call, Provider
from bench.shapes import DTYPE_NAMES, Case, Inputs, Mode

BASE = "bertops"


@dataclass(frozen=True)
class Op:
    """What the bench must know of an op: its outputs, what it costs at least, and who else can do it."""

    name: str
    providers: list[Provider]
    reference: correctness.Reference  # q, k, v, mask to the outputs
    output_shapes: Callable[[Tensor], list[tuple[int, ...]]]
    work: Callable[[Inputs, Mode], Work]


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
        """With what follows from the times: spread, FLOP/s, and the share of the limits known by now."""
        figures: dict[str, Any] = {"time": None, "flops_per_s": None, "share_of_limit": None}
        if self.work is not None:
            figures["time"] = asdict(self.time)
            figures["flops_per_s"] = self.work.flops / self.time.median
            figures["share_of_limit"] = limits.least_seconds(self.work, self.dtype) / self.time.median
        return {**asdict(self), **figures}


class Comparison:
    """All modes of one op on one case; the truth is computed once."""

    def __init__(self, op: Op, case: Case, inputs: Inputs, sampled: bool = False) -> None:
        """``sampled``: results are checked on some samples and heads, not on all."""
        self.op, self.case, self.inputs = op, case, inputs
        self.checked = correctness.sample if sampled else lambda x: x
        self.device = inputs.q.device
        generator = torch.Generator().manual_seed(1)
        shapes = op.output_shapes(inputs.q)
        self.grads = [torch.randn(s, generator=generator).to(self.device, inputs.q.dtype) for s in shapes]
        if inputs.mask is not None:
            self.grads[0] *= inputs.mask[:, None, :, None]  # no loss looks at padding
        torch._dynamo.reset()  # one compiled entry a mode, far from the recompile limit
        self.truths: dict[tuple[bool, bool], correctness.Truth] = {}

    def run(
        self, mode: Mode, budget_s: float, step: Callable[[str], None] = lambda text: None
    ) -> list[Result]:
        results = []
        contestants: dict[str, Contestant] = {}
        with torch.set_grad_enabled(mode != "forward"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for provider in self.op.providers:
                if provider.applies(self.case):
                    step(f"{provider.name}: check")
                    result, contestant = self.admit(provider, mode)
                    results.append(result)
                    if contestant is not None:
                        contestants[provider.name] = contestant
            step("timing")
            clock = self.clock()
            seconds = (
                paired.run_rounds(list(contestants.values()), clock, budget_s=budget_s) if contestants else {}
            )
            for result in results:
                if result.status == "ok":
                    step(f"{result.provider}: memory")
                    self.fill(result, seconds, self.works(mode)[result.provider])
                    result.extra_bytes = self.memory(contestants[result.provider])
        return results

    def clock(self) -> paired.Clock:
        if self.device.type == "cuda" and not self.case.overhead:
            return paired.EventClock(self.device)
        return paired.WallClock(self.device)

    def admit(self, provider: Provider, mode: Mode) -> tuple[Result, Contestant | None]:
        """Builds the provider and checks its result: a wrong one is not timed."""
        dtype = DTYPE_NAMES[self.inputs.q.dtype]
        reason = provider.unavailable(mode, self.device)
        if reason is not None:
            return Result(provider.name, dtype, "unavailable", reason), None
        try:
            call = provider.make(self.inputs)
            contestant = self.contestant(provider.name, call, mode)
            results = self.results(call, mode)
        except RuntimeError as error:  # a peer that cannot take the shape, or a compiler that gives up
            return Result(provider.name, dtype, "failed", str(error).strip().splitlines()[0]), None
        results = [self.checked(x) for x in results]
        reason = correctness.wrong(results, self.truth(provider.ignores_mask, mode), self.mask_of(provider))
        if reason is not None:
            return Result(provider.name, dtype, "wrong", reason), None
        return Result(provider.name, dtype, "ok"), contestant

    def leaves(self, mode: Mode) -> list[Tensor]:
        inputs = self.inputs
        return [x.detach().requires_grad_(mode != "forward") for x in (inputs.q, inputs.k, inputs.v)]

    def results(self, call: Call, mode: Mode) -> list[Tensor]:
        leaves = self.leaves(mode)
        outputs = call(*leaves)
        gradients = () if mode == "forward" else torch.autograd.grad(outputs, leaves, self.grads)
        return [*outputs, *gradients]

    def contestant(self, name: str, call: Call, mode: Mode) -> Contestant:
        leaves, grads = self.leaves(mode), self.grads
        if mode == "forward":
            return Contestant(name, lambda _: call(*leaves))
        if mode == "backward":
            return Contestant(
                name,
                lambda outputs: torch.autograd.grad(outputs, leaves, grads),
                prepare=lambda: call(*leaves),
            )
        return Contestant(name, lambda _: torch.autograd.grad(call(*leaves), leaves, grads))

    def truth(self, ignores_mask: bool, mode: Mode) -> correctness.Truth:
        gradients = mode != "forward" or self.case.modes != ("forward",)
        if (ignores_mask, gradients) not in self.truths:
            q, k, v, *grads = (
                self.checked(x) for x in (self.inputs.q, self.inputs.k, self.inputs.v, *self.grads)
            )
            mask = None if ignores_mask else self.checked_mask()
            with torch.set_grad_enabled(gradients):
                self.truths[ignores_mask, gradients] = correctness.truth(
                    self.op.reference, q, k, v, mask, grads, gradients
                )
        return self.truths[ignores_mask, gradients]

    def mask_of(self, provider: Provider) -> Tensor | None:
        return None if provider.ignores_mask else self.checked_mask()

    def checked_mask(self) -> Tensor | None:
        mask = self.inputs.mask
        return None if mask is None else self.checked(mask[:, None])[:, 0]

    def works(self, mode: Mode) -> dict[str, Work]:
        unmasked = replace(self.inputs, mask=None)
        return {
            provider.name: self.op.work(unmasked if provider.ignores_mask else self.inputs, mode)
            for provider in self.op.providers
        }

    def fill(self, result: Result, seconds: dict[str, list[float]], work: Work) -> None:
        result.seconds = seconds[result.provider]
        if BASE in seconds:
            result.ratio = paired.paired_ratio(seconds, result.provider, BASE)
        result.work = work

    def memory(self, contestant: Contestant) -> int | None:
        state = contestant.prepare()
        return peak_extra_bytes(self.device, lambda: contestant.run(state))
