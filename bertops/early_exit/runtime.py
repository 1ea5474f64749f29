"""Runs a model layer by layer and lets every sample go where it is certain enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bertops.early_exit.criteria import Criterion
from bertops.ops.compact import compact, compact_packed
from bertops.ops.exit_decision import ExitDecision


class LayeredModel(Protocol):
    """What the runtime and the pool ask of a model; layers count from 1."""

    training: bool

    @property
    def num_layers(self) -> int: ...

    def run_layer(
        self, layer: int, hidden: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """The output of ``layer``."""

    def classify(
        self,
        layer: int,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Logits (number of sequences, C) after ``layer``; ``longest`` is that of the packed sequences."""


@dataclass
class ExitOutput:
    """Answers in the order of the input, on its device."""

    prediction: Tensor  # (B,) int64
    logits: Tensor  # (B, C), of the classifier that answered
    exit_layer: Tensor  # (B,) int64, from 1
    uncertainty: Tensor  # (B,): the criterion's entropy


class _Answers:
    """The latest answer of every sample; one more row takes the answers of rows that stand for nobody."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.tensors: tuple[Tensor, ...] | None = None

    def write(self, places: Tensor, decision: ExitDecision, logits: Tensor, layer: int) -> None:
        layers = torch.full_like(decision.prediction, layer)
        new = decision.prediction, logits, layers, decision.uncertainty
        if self.tensors is None:
            self.tensors = tuple(x.new_zeros(self.rows + 1, *x.shape[1:]) for x in new)
        for kept, x in zip(self.tensors, new, strict=True):
            kept.index_copy_(0, places, x)

    def output(self) -> ExitOutput:
        assert self.tensors is not None
        return ExitOutput(*(x[: self.rows] for x in self.tensors))


def check_evaluating(model: LayeredModel) -> None:
    if model.training:
        raise RuntimeError("the model is in training mode, where dropout would decide who exits: call eval()")


def run_packed(model: LayeredModel, hidden: Tensor, cu_seqlens: Tensor, criterion: Criterion) -> ExitOutput:
    """Sequences end to end (1, T, hidden_size); after every layer those that stay are moved together.

    What the host must know of them is read back from the device in one transfer a layer.
    """
    rows = cu_seqlens.shape[0] - 1
    places = torch.arange(rows, device=hidden.device)
    state = criterion.start(rows, hidden.device)
    answers = _Answers(rows)
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if rows else 0
    for layer in range(1, model.num_layers + 1):
        hidden = model.run_layer(layer, hidden, cu_seqlens=cu_seqlens)
        last = layer == model.num_layers
        if criterion.never and not last:
            continue
        logits = model.classify(layer, hidden, cu_seqlens=cu_seqlens, longest=longest)
        decision, state = criterion.decide(logits, state)
        if last:
            answers.write(places, decision, logits, layer)
            break
        num_kept, num_tokens, longest = what_stays(lengths, decision)
        if num_kept == len(places):
            continue
        answers.write(places, decision, logits, layer)
        if num_kept == 0:
            break
        kept = decision.order[:num_kept]
        places, state, lengths = places[kept], state[kept], lengths[kept]
        hidden, cu_seqlens = compact_packed(hidden, cu_seqlens, kept, num_kept, num_tokens=num_tokens)
    return answers.output()


def what_stays(lengths: Tensor, decision: ExitDecision) -> tuple[int, int, int]:
    """Sequences, their tokens, and the tokens of the longest, in one transfer."""
    staying = lengths.masked_fill(decision.exited, 0)
    if len(lengths) == 0:
        return 0, 0, 0
    counts = torch.stack([decision.num_kept, staying.sum(), staying.max().long()])
    num_kept, num_tokens, longest = counts.tolist()
    return num_kept, num_tokens, longest


def run_with_capacities(
    model: LayeredModel,
    hidden: Tensor,
    mask: Tensor,
    criterion: Criterion,
    capacities: Sequence[int],
) -> ExitOutput:
    """Padded (B, N, hidden_size) through layers of ``capacities`` rows each, the first of all B rows.

    Nothing is read back from the device and every shape is known beforehand, as CUDA graphs want it. Where
    more samples stay than the next layer holds, the last of them leave with the answer they have.
    """
    rows = hidden.shape[0]
    places = torch.arange(rows, device=hidden.device)
    state = criterion.start(rows, hidden.device)
    answers = _Answers(rows)
    for layer in range(1, model.num_layers + 1):
        hidden = model.run_layer(layer, hidden, mask=mask)
        last = layer == model.num_layers
        if not (criterion.never and not last):
            logits = model.classify(layer, hidden, mask=mask)
            decision, state = criterion.decide(logits, state, places < rows)
            answers.write(places, decision, logits, layer)
        if last or criterion.never:
            continue
        capacity = capacities[layer]
        if capacity == 0:
            break
        order, num_kept = decision.order[:capacity], decision.num_kept
        hidden, mask = compact(hidden, order, num_kept), compact(mask, order, num_kept)
        state = state[order]
        real = torch.arange(capacity, device=hidden.device) < num_kept
        places = torch.where(real, places[order], rows)
    return answers.output()


def check_capacities(capacities: int | Sequence[int], rows: int, num_layers: int) -> list[int]:
    """Rows of every layer: ``rows`` for the first, then never more than in the layer before."""
    given = [capacities] * (num_layers - 1) if isinstance(capacities, int) else list(capacities)
    if len(given) != num_layers - 1 or any(not isinstance(c, int) or c < 0 for c in given):
        raise ValueError(
            f"capacities must be an integer >= 0, or one for each of layers 2 to {num_layers}, "
            f"got {capacities!r}"
        )
    checked = [rows]
    for capacity in given:
        checked.append(min(capacity, checked[-1]))
    return checked
