"""What a recipe gives to :func:`bertops.training.train`: an objective, a stream of batches, a plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from bertops.training.optimizer import AdamW

Batch = Any  # CPU tensors in dicts, tuples or lists: what accelerate's send_to_device moves


class Objective(nn.Module):
    """The modules of a recipe, and its losses as ``forward``.

    ``forward(batch)`` returns the SUM of each loss by name, 0-dimensional in fp32, and ``weights`` says how
    the means add up to what is minimised. Names that ``weights`` lacks, such as a number of right answers,
    are measured and not minimised. Modules frozen from the start, such as a teacher, stay out of the
    checkpoints: the recipe builds them anew.
    """

    weights: Mapping[str, float]  # by the names of the losses

    def counts(self, batch: Batch) -> dict[str, int]:
        """What each sum of ``forward`` is over, by the same names, and ``tokens``, the batch's real ones.

        Called before ``forward``, with the batch on the CPU.
        """
        raise NotImplementedError


class Stream(Protocol):
    """Micro-batches without end, from where ``state`` says.

    Every process draws all of them in the same order and runs its share, so the state is one for all.
    """

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors in dicts and lists."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how a run trains.

    Args:
        steps: updates of the parameters.
        optimizer: with the peak of the learning rate.
        warmup: steps over which the rate rises; it then falls linearly.
        accumulation: micro-batches of a step in each process.
        max_grad_norm: longer gradients are scaled down to this norm; None leaves all as they are.
        bf16: run the objective under bfloat16 autocast.
        log_every, evaluate_every, checkpoint_every: steps; the last step does all three.
        keep: number of checkpoints that stay.
        seed: of dropout; each process adds its index.

    Raises:
        ValueError: a number is out of range; names it.
    """

    steps: int
    optimizer: AdamW
    warmup: int = 0
    accumulation: int = 1
    max_grad_norm: float | None = 1.0
    bf16: bool = False
    log_every: int = 10
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "evaluate_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must be from 0 to below steps = {self.steps}, got {self.warmup}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")


@dataclass(frozen=True)
class Outcome:
    """Where a run stands: ``finished``, or stopped by a signal with its state in a checkpoint.

    ``stopped``: a signal came, perhaps too late to end a run in its last step; nothing that would follow the
    run should begin.
    """

    step: int
    finished: bool
    stopped: bool
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl

    @property
    def evaluation(self) -> dict[str, float]:
        """The numbers of the last evaluation."""
        return next((line["evaluation"] for line in reversed(self.metrics) if "evaluation" in line), {})
