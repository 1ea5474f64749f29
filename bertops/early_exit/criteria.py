"""When a sample has been through enough layers: FastBERT's, DeeBERT's and PABEE's criterion."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bertops.ops.exit_decision import ExitDecision, exit_decision

CERTAIN = 1e4  # a logit that leaves all other classes a probability of 0


class Criterion(ABC):
    """Decides after every layer who exits; what it remembers of a sample travels with the sample.

    ``never`` says that nobody exits before the last layer, so that no other classifier need run.
    """

    never = False
    state_size = 0

    def start(self, rows: int, device: torch.device) -> Tensor:
        """What is remembered of new samples: (rows, state_size) int64."""
        return torch.zeros(rows, self.state_size, dtype=torch.int64, device=device)

    @abstractmethod
    def decide(
        self, logits: Tensor, state: Tensor, alive: Tensor | None = None
    ) -> tuple[ExitDecision, Tensor]:
        """The decision on ``logits`` (B, C) and the new state; rows that are not ``alive`` (B,) exit.

        Reads nothing back from the device.
        """


class NormalizedEntropy(Criterion):
    """FastBERT: exit where entropy / ln C <= ``speed``, in [0, 1]; at 0 nobody exits early."""

    normalize = True

    def __init__(self, speed: float) -> None:
        if not 0 <= speed <= 1:
            raise ValueError(f"speed must be in [0, 1], got {speed!r}")
        self.threshold = float(speed)
        self.never = speed == 0

    def decide(
        self, logits: Tensor, state: Tensor, alive: Tensor | None = None
    ) -> tuple[ExitDecision, Tensor]:
        if alive is not None:
            certain = torch.zeros_like(logits)
            certain[:, 0] = CERTAIN
            logits = torch.where(alive[:, None], logits, certain)
        return exit_decision(logits, self.threshold, normalize=self.normalize), state


class Entropy(NormalizedEntropy):
    """DeeBERT: exit where the entropy in nats is at most ``nats``; at 0 nobody exits early."""

    normalize = False

    def __init__(self, nats: float) -> None:
        if not 0 <= nats < math.inf:
            raise ValueError(f"nats must be a finite number >= 0, got {nats!r}")
        self.threshold = float(nats)
        self.never = nats == 0


class Patience(Criterion):
    """PABEE: exit where ``patience`` classifiers in a row agree with the one before them.

    A sample whose logits have a NaN agrees with none.
    """

    state_size = 2  # the last prediction, and how many agreed with the one before

    def __init__(self, patience: int) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be an integer >= 1, got {patience!r}")
        self.patience = patience

    def start(self, rows: int, device: torch.device) -> Tensor:
        state = super().start(rows, device)
        state[:, 0] = -1
        return state

    def decide(
        self, logits: Tensor, state: Tensor, alive: Tensor | None = None
    ) -> tuple[ExitDecision, Tensor]:
        entropy = exit_decision(logits, 0.0)
        agrees = (entropy.prediction == state[:, 0]) & ~entropy.uncertainty.isnan()
        count = torch.where(agrees, state[:, 1] + 1, 0)
        exited = count >= self.patience
        if alive is not None:
            exited = exited | ~alive
        order = exited.to(torch.uint8).argsort(stable=True)
        decision = ExitDecision(entropy.prediction, entropy.uncertainty, exited, order, (~exited).sum())
        return decision, torch.stack([entropy.prediction, count], 1)


def criterion_of(speed: float | None, criterion: Criterion | None) -> Criterion:
    """The criterion itself, or FastBERT's at ``speed``; exactly one of the two is given."""
    if (speed is None) == (criterion is None):
        raise ValueError(f"give either speed or criterion, got speed={speed!r} and criterion={criterion!r}")
    if criterion is None:
        assert speed is not None
        return NormalizedEntropy(speed)
    if not isinstance(criterion, Criterion):
        raise TypeError(f"criterion must be a bertops.early_exit.Criterion, got {type(criterion).__name__}")
    return criterion
