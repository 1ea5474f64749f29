"""Logits (B, C) that the tests of ``entropy`` and ``exit_decision`` share."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

CLASSES = (1, 2, 3, 5, 16, 20, 63, 64, 65, 1000, 131072)
BATCHES = (1, 15, 16, 17, 4096)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF, torch.float64)

# The values of the argument, or some of them, at other strides.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "first token": lambda x: torch.stack([x, x + 1, x + 2], 1)[:, 0],
    "every other class": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "transposed": lambda x: x.t().contiguous().t(),
    "one row expanded": lambda x: x[:1].expand(x.shape),
    "one element in": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}

NAN, INF = float("nan"), float("inf")
# Rows without a softmax, as (B, C) of any C.
BAD_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "first is nan": lambda row: torch.cat([torch.full_like(row[:1], NAN), row[1:]]),
    "last is nan": lambda row: torch.cat([row[:-1], torch.full_like(row[:1], NAN)]),
    "nan after inf": lambda row: torch.cat([torch.full_like(row[:1], INF), torch.full_like(row[1:], NAN)]),
    "all nan": lambda row: torch.full_like(row, NAN),
    "last is inf": lambda row: torch.cat([row[:-1], torch.full_like(row[:1], INF)]),
    "inf beside -inf": lambda row: torch.cat([torch.full_like(row[:1], INF), torch.full_like(row[1:], -INF)]),
    "all inf": lambda row: torch.full_like(row, INF),
    "all -inf": lambda row: torch.full_like(row, -INF),
}

# Nearly certain rows, down to a probability of the others that fp32 cannot hold.
CERTAIN = [
    (30.0, 0.0, -5.0),
    (0.0, 12.0, 1.0),
    (-7.0, 4.5, 60.0),
    (16.5, 0.0, 0.0),
    (0.0, 80.0, 20.0),
    (1.0, -85.0, -84.5),
    (1e4, 1e4 - 25.0, 1e4 - 40.0),
]


def draw(batch: int, classes: int, dtype: torch.dtype, device: str = "cpu", spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(batch, classes)).to(dtype).to(device)


def rows_of(classes: int) -> int:
    """Enough for the rule of errors.py, which compares two rounding errors, and for a loop over rows."""
    return max(3, min(4096, 2**17 // classes))


def skip_fp64_off_the_cpu(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("fp64 runs on the CPU alone")


def exact_entropy(row: list[float]) -> float:
    """In nats, by the definition, in sixty digits: fp64 rounds 1 + 1e-13 too coarsely."""
    with localcontext() as context:
        context.prec = 60
        powers = [Decimal(z).exp() for z in row]
        total = sum(powers)
        return float(-sum(p / total * (p / total).ln() for p in powers))


def exact_entropy_grad(row: list[float]) -> list[float]:
    """-p_c (ln p_c + H)."""
    with localcontext() as context:
        context.prec = 60
        powers = [Decimal(z).exp() for z in row]
        total = sum(powers)
        probs = [p / total for p in powers]
        entropy = -sum(p * p.ln() for p in probs)
        return [float(-p * (p.ln() + entropy)) for p in probs]


def close_relatively(actual: Tensor, exact: list[float], digits: float) -> None:
    """Every element by itself, to ``digits`` times the rounding unit of its dtype."""
    expected = torch.tensor(exact, dtype=torch.float64)
    error = (actual.detach().cpu().double() - expected).abs() / expected.abs()
    worst = float(error.max()) / torch.finfo(actual.dtype).eps
    assert worst <= digits and not math.isnan(worst), f"{actual.tolist()} is {worst:.1f} units from {exact}"
