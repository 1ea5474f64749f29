"""The peers of the ops over rows, each as users write it today."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import bertops
from bench.providers import Call, Provider, compiled, is_compiled
from bench.row_shapes import THRESHOLD, HiddenInputs
from bench.shapes import Inputs
from bertops import reference


def entropy_providers(impl: str) -> list[Provider]:
    return [
        Provider("bertops", lambda inputs: lambda logits: (bertops.entropy(logits, impl=impl),)),
        Provider("eager", lambda inputs: eager_entropy),
        Provider("compiled eager", lambda inputs: compiled(eager_entropy), is_compiled, compiles=True),
        Provider("torch.distributions", lambda inputs: distribution_entropy),
    ]


def eager_entropy(logits: Tensor) -> tuple[Tensor]:
    log_probs = logits.log_softmax(-1, dtype=torch.float32)
    return (-(log_probs.exp() * log_probs).sum(-1),)


def distribution_entropy(logits: Tensor) -> tuple[Tensor]:
    return (torch.distributions.Categorical(logits=logits.float(), validate_args=False).entropy(),)


def entropy_upstream(inputs: Inputs) -> list[Tensor]:
    (logits,) = inputs.leaves
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(logits.shape[0], generator=generator).to(logits.device)]


def exit_decision_providers(impl: str) -> list[Provider]:
    """All return uncertainty, exited and the rows that stay; the prediction too, but for ``eager``."""
    return [
        Provider(
            "bertops",
            lambda inputs: lambda logits: bertops.exit_decision(logits, THRESHOLD, impl=impl),
            compared=kept_and_prediction,
        ),
        Provider("eager", lambda inputs: eager_exit),
        Provider("eager + argmax", lambda inputs: eager_exit_and_prediction),
        Provider(
            "compiled eager", lambda inputs: compiled(eager_exit_and_prediction), is_compiled, compiles=True
        ),
    ]


def kept_and_prediction(decision: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    prediction, uncertainty, exited, order, num_kept = decision
    return uncertainty, exited, order[:num_kept], prediction


def eager_exit(logits: Tensor) -> tuple[Tensor, ...]:
    """The chain of FastBERT's own code, line by line."""
    probs = logits.softmax(-1, dtype=torch.float32)
    uncertainty = -(probs * probs.log()).sum(-1) / math.log(logits.shape[-1])
    exited = uncertainty <= THRESHOLD
    return uncertainty, exited, (~exited).nonzero().squeeze(1)


def eager_exit_and_prediction(logits: Tensor) -> tuple[Tensor, ...]:
    return *eager_exit(logits), logits.argmax(-1)


def exit_decision_reference(logits: Tensor) -> Sequence[Tensor]:
    return kept_and_prediction(reference.exit_decision(logits, THRESHOLD))


def compact_providers(impl: str) -> list[Provider]:
    """``order`` comes out of the exit decision; peers start from the mask of who stays."""
    return [
        Provider("bertops", lambda inputs: bertops_compact(inputs, impl)),
        Provider("index_select", index_select),
        Provider("boolean index", boolean_index),
    ]


def order_of(stay: Tensor) -> tuple[Tensor, int]:
    return (~stay).to(torch.uint8).argsort(stable=True), int(stay.sum())


def bertops_compact(inputs: HiddenInputs, impl: str) -> Call:
    order, num_kept = order_of(inputs.stay)
    cu_seqlens = inputs.cu_seqlens
    if cu_seqlens is None:
        return lambda hidden: (bertops.compact(hidden, order, num_kept, impl=impl),)
    return lambda hidden: bertops.compact_packed(hidden, cu_seqlens, order, num_kept, impl=impl)


def index_select(inputs: HiddenInputs) -> Call:
    stay, cu_seqlens = inputs.stay, inputs.cu_seqlens
    if cu_seqlens is None:
        return lambda hidden: (hidden.index_select(0, stay.nonzero().squeeze(1)),)

    def packed(hidden: Tensor) -> tuple[Tensor, ...]:
        tokens, offsets = kept_tokens(stay, cu_seqlens)
        return hidden.index_select(1, tokens.nonzero().squeeze(1)), offsets

    return packed


def boolean_index(inputs: HiddenInputs) -> Call:
    stay, cu_seqlens = inputs.stay, inputs.cu_seqlens
    if cu_seqlens is None:
        return lambda hidden: (hidden[stay],)

    def packed(hidden: Tensor) -> tuple[Tensor, ...]:
        tokens, offsets = kept_tokens(stay, cu_seqlens)
        return hidden[:, tokens], offsets

    return packed


def kept_tokens(stay: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) bool: the tokens of the sequences that stay; and the offsets of these end to end."""
    lengths = cu_seqlens.diff()
    kept = lengths[stay]
    offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0, dtype=torch.int32)])
    return stay.repeat_interleave(lengths), offsets


def compact_reference(hidden: Tensor, stay: Tensor, cu_seqlens: Tensor | None) -> Sequence[Tensor]:
    order, num_kept = order_of(stay)
    if cu_seqlens is None:
        return [reference.compact(hidden, order[:num_kept])]
    num_tokens = int(cu_seqlens.diff()[stay].sum())
    return reference.compact_packed(hidden, cu_seqlens, order[:num_kept], num_tokens)


def no_upstream(inputs: Inputs) -> list[Tensor]:
    return []
