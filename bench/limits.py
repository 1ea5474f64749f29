"""What this machine can do at most, measured in the run whose figures are given as a share of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

import bertops  # noqa: F401  (loads the ops)
from bench.paired import Contestant, WallClock
from bench.shapes import DTYPE_NAMES

COPY_BYTES = 256 * 2**20
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
FMA_STEPS = 100_000
EXP_STEPS = {"cpu": 10_000, "cuda": 20_000}
CALLS = 1000
BUDGET_S = 0.1  # a limit and time; measured again throughout the run, the best counts


@dataclass(frozen=True)
class Work:
    """The least that a call must do, for an implementation that stores no N x N map it is not asked for.

    ``flops`` counts a multiply-add as two, over pairs of real tokens; ``exps`` one per such pair; ``bytes``
    every input read once and every output written once.
    """

    flops: float
    exps: float
    bytes: float


@dataclass
class Limits:
    """``flops`` per dtype name; ``exps`` is None where there is no loop to measure it."""

    device: str
    copy_bytes_per_s: float
    flops_per_s: dict[str, float] = field(default_factory=dict)
    exps_per_s: float | None = None
    call_s: float | None = None
    how: dict[str, str] = field(default_factory=dict)

    def least_seconds(self, work: Work, dtype: str) -> float:
        """No call can be faster: bytes, arithmetic and the call itself at best overlap entirely.

        Exponentials are arithmetic on a CPU, and have units of their own on a GPU.
        """
        compute = work.flops / self.flops_per_s[dtype]
        exps = work.exps / self.exps_per_s if self.exps_per_s else 0.0
        arithmetic = compute + exps if self.device == "cpu" else max(compute, exps)
        return max(work.bytes / self.copy_bytes_per_s, arithmetic, self.call_s or 0.0)

    def improve(self, other: "Limits") -> None:
        """Keeps the better of two measurements: a limit is what the machine reaches undisturbed."""
        self.copy_bytes_per_s = max(self.copy_bytes_per_s, other.copy_bytes_per_s)
        for name, rate in other.flops_per_s.items():
            if rate > self.flops_per_s[name]:
                self.flops_per_s[name], self.how[name] = rate, other.how[name]
        if self.exps_per_s and other.exps_per_s:
            self.exps_per_s = max(self.exps_per_s, other.exps_per_s)
        if self.call_s and other.call_s:
            self.call_s = min(self.call_s, other.call_s)

    def as_dict(self) -> dict:
        return asdict(self)


def measure(device: torch.device, dtypes: Sequence[torch.dtype]) -> Limits:
    like = torch.zeros(1, device=device)
    limits = Limits(device.type, copy_rate(device))
    limits.how["copy"] = f"torch copy of {COPY_BYTES >> 20} MiB, read and written"
    for dtype in dtypes:
        name = DTYPE_NAMES[dtype]
        limits.flops_per_s[name] = matmul_rate(device, dtype)
        limits.how[name] = f"torch matmul of {MATMUL_SIZE[device.type]}²"
    if has_kernel("_limits_fma", device):
        rate = counted_rate(torch.ops.bertops._limits_fma, like, FMA_STEPS)
        for name, other in limits.flops_per_s.items():
            if rate > other:
                limits.flops_per_s[name] = rate
                limits.how[name] = "fp32 multiply-adds in registers"
    if has_kernel("_limits_exp", device):
        limits.exps_per_s = counted_rate(torch.ops.bertops._limits_exp, like, EXP_STEPS[device.type])
        limits.how["exp"] = "exp2 in registers"
    if has_kernel("_limits_launch", device):
        limits.call_s = call_seconds(like)
        limits.how["call"] = "an op that does nothing" + (", launched" if device.type == "cuda" else "")
    return limits


def has_kernel(op: str, device: torch.device) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bertops::{op}", device.type.upper())


def copy_rate(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_seconds(device, lambda: target.copy_(source))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(device, lambda: a @ b)


def counted_rate(op: Callable, like: torch.Tensor, steps: int) -> float:
    """Operations per second of an op that returns how many it did."""
    _, operations = op(like, steps)
    return operations / best_seconds(like.device, lambda: op(like, steps))


def call_seconds(like: torch.Tensor) -> float:
    launch = torch.ops.bertops._limits_launch.default

    def calls() -> None:
        for _ in range(CALLS):
            launch(like)

    return best_seconds(like.device, calls) / CALLS


def best_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """The fastest of the runs within the budget."""
    clock, contestant = WallClock(device), Contestant("limit", lambda _: call())
    clock.sample(contestant, 1)
    deadline = time.perf_counter() + BUDGET_S
    best = clock.sample(contestant, 1)
    while time.perf_counter() < deadline:
        best = min(best, clock.sample(contestant, 1))
    return best
