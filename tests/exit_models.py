"""A model and a criterion that tell what was done to every request, for tests of the pool.

A request is ``[exit layer, layer that raises, *payload]``: it is certain from its exit layer on (0: its
logits are NaN), and a batch with it raises at the second (0: never).
"""

import threading
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bertops import ExitDecision
from bertops.early_exit.criteria import Criterion

IDS = 50
TOKEN_TYPES = 3


class Fault(Exception):
    pass


class TracingModel(nn.Module):
    """``hidden`` is (1, T, 3): the id, the layers run so far, the token type. Logits are (B, 3).

    Those are the layers since the exit layer, the position-weighted sum of ids and token types, the layers
    run. ``log`` is (layer, samples) of every call of ``run_layer``, which waits for ``gate`` and calls
    ``at_layer`` first.
    """

    def __init__(self, num_layers: int = 4, max_length: int = 8, type_vocab_size: int = TOKEN_TYPES) -> None:
        super().__init__()
        self.num_layers, self.max_length = num_layers, max_length
        self.encoder = nn.Linear(1, 1)
        self.encoder.config = SimpleNamespace(vocab_size=IDS, type_vocab_size=type_vocab_size)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()  # some layer has started
        self.at_layer = lambda layer: None
        self.log: list[tuple[int, int]] = []
        self.classified: list[int] = []
        self.eval()

    def embed(self, input_ids, mask=None, token_type_ids=None, position_ids=None, cu_seqlens=None) -> Tensor:
        token_types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return torch.stack((input_ids, torch.zeros_like(input_ids), token_types), dim=-1).float()

    def run_layer(self, layer, hidden, mask=None, cu_seqlens=None) -> Tensor:
        assert not torch.is_grad_enabled()
        self.entered.set()
        assert self.gate.wait(10)
        self.at_layer(layer)
        self.log.append((layer, len(cu_seqlens) - 1))
        assert (hidden[..., 1] == layer - 1).all(), "a sample missed a layer or ran it twice"
        if (hidden[0, cu_seqlens[:-1] + 1, 0] == layer).any():
            raise Fault(f"layer {layer}")
        return hidden + torch.tensor([0.0, 1.0, 0.0])

    def classify(self, layer, hidden, mask=None, cu_seqlens=None, longest=None) -> Tensor:
        assert longest == cu_seqlens.diff().max()
        self.classified.append(layer)
        rows = []
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            sample = hidden[0, start:end]
            exit_layer = sample[0, 0].item() or float("nan")
            total = checksum(sample[:, 0].tolist(), sample[:, 2].tolist())
            rows.append([layer - exit_layer, total, sample[0, 1].item()])
        logits = torch.tensor(rows)
        return logits.masked_fill(logits[:, :1].isnan(), float("nan"))


def checksum(ids, token_types) -> float:
    return sum(
        (i + 1) * (id_ + 100 * type_) for i, (id_, type_) in enumerate(zip(ids, token_types, strict=True))
    )


class TracingCriterion(Criterion):
    """Exits from the request's exit layer on; ``uncertainty`` is the checksum times the decisions so far."""

    state_size = 1

    def __init__(self, never: bool = False) -> None:
        self.never = never

    def decide(self, logits, state, alive=None) -> tuple[ExitDecision, Tensor]:
        state = state + logits[:, 1:2].nan_to_num().long()
        exited = (logits[:, 0] >= 0) & (not self.never)
        order = torch.cat(((~exited).nonzero()[:, 0], exited.nonzero()[:, 0]))
        prediction = logits[:, 2].nan_to_num().long()
        return ExitDecision(prediction, state[:, 0].float(), exited, order, (~exited).sum()), state


def check_answer(answer, ids, token_types=None, num_layers: int = 4) -> None:
    """``answer`` is the one of this request, which ran every layer up to its exit once."""
    exit_layer = ids[0] or num_layers
    total = checksum(ids, token_types or [0] * len(ids))
    assert answer.exit_layer == exit_layer
    assert answer.logits.shape == (3,)
    if ids[0] == 0:
        assert answer.logits.isnan().all() and answer.prediction == 0
        return
    assert answer.logits.tolist() == [0, total, exit_layer]
    assert answer.prediction == exit_layer
    assert answer.uncertainty == total * exit_layer
