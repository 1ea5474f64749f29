"""Terms of a loss before the division, and what the losses of several papers share."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bertops.distill.capture import Tap
from bertops.ops import _pairs
from bertops.ops.attention_kl import attention_kl

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Term:
    """One term of a loss: ``weight * total / count``."""

    total: Tensor  # scalar: the sum over what is counted
    count: Tensor | int  # rows, pairs or samples in it
    weight: float = 1.0

    def divisor(self) -> Tensor | int:
        """``count``, or 1 where nothing was counted."""
        return self.count.clamp_min(1) if isinstance(self.count, Tensor) else max(1, self.count)

    def mean(self) -> Tensor:
        """``total / count``, without the weight; 0 where nothing was counted."""
        return self.total / self.divisor()


def combine(terms: Mapping[str, Term]) -> Tensor:
    """The weighted sum of the means: what a single batch in a single process minimises."""
    if not terms:
        raise ValueError("terms must not be empty")
    return torch.stack([term.weight * term.mean() for term in terms.values()]).sum()


def joined(terms: Iterable[Term]) -> Term:
    """The sum over layers of terms that count the same things with the same weight: totals add."""
    terms = list(terms)
    return Term(torch.stack([term.total for term in terms]).sum(), terms[0].count, terms[0].weight)


def cross_entropy(logits: Tensor, labels: Tensor, weight: float) -> Term:
    """Of hard labels (B,) over logits (B, C), in fp32 or better; -100 is not counted."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
    return Term(total, (labels != IGNORED_LABEL).sum(), weight)


def masked_lm(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, share: float) -> Term:
    """Cross entropy of a decoder's labels: ``hidden`` (B, N, H), ``weight`` (V, H), ``labels`` (B, N).

    Only rows with a label other than -100 meet the decoder; reads their number back from the device.
    """
    rows = labels != IGNORED_LABEL
    return cross_entropy(F.linear(hidden[rows], weight, bias), labels[rows], share)


def attention_distributions(tap_s: Tap, tap_t: Tap, weight: float = 1.0) -> Term:
    """KL of the attention of two layers, over heads and real rows; takes the lse that both layers found."""
    given = tap_s.window is None and tap_t.window is None
    total = attention_kl(
        tap_s.q,
        tap_s.k,
        tap_t.q,
        tap_t.k,
        tap_s.mask,
        cu_seqlens=tap_s.cu_seqlens,
        scale_s=tap_s.scale,
        scale_t=tap_t.scale,
        lse_s=tap_s.lse if given else None,
        lse_t=tap_t.lse if given else None,
        reduction="sum",
    )
    return Term(total, count_head_rows(tap_s), weight)


def count_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor | int:
    """Real tokens of ``hidden`` (B, N, H)."""
    if mask is None:
        return hidden.shape[0] * hidden.shape[1]
    return (mask != 0).sum()


def count_head_rows(tap: Tap) -> Tensor | int:
    """Real rows of all heads: what ``mean`` of the KL losses divides by."""
    return _pairs.count_rows(tap.q, None if tap.mask is None else tap.mask != 0)


def count_head_pairs(tap: Tap) -> Tensor | int:
    """Real query-key pairs of all heads: what ``mean`` of the score loss divides by."""
    return _pairs.count_pairs(tap.q, None if tap.mask is None else tap.mask != 0, tap.cu_seqlens)
