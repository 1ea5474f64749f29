"""MiniLM and MiniLMv2: self-attention relations of a single layer."""

from collections.abc import Sequence

from torch import nn

from bertops.distill.capture import Tap
from bertops.distill.losses.terms import Term, attention_distributions, count_tokens
from bertops.ops.relation_kl import relation_kl

RELATIONS = ("q", "k", "v")


class MiniLMLoss(nn.Module):
    r"""Attention distributions and value relations of the last layers, with equal weight.

    .. math::
        L = \frac{1}{A |x|} \sum_{a, i} \mathrm{KL}(A^t_{ai} \,\|\, A^s_{ai})
        + \frac{1}{A |x|} \sum_{a, i} \mathrm{KL}(VR^t_{ai} \,\|\, VR^s_{ai})

    over A heads and the :math:`|x|` real tokens; scales are those of either model. Teacher and student have
    one number of heads. The official training code was never published.

    Source: Wang et al. 2020 (MiniLM), section 3, equations 4 to 10.
    """

    def forward(self, tap_s: Tap, tap_t: Tap) -> dict[str, Term]:
        """Taps of :func:`bertops.capture`, of the last layers; the terms are ``attention`` and ``value``."""
        value = relation_kl(tap_s.v, tap_t.v, tap_s.mask, cu_seqlens=tap_s.cu_seqlens, reduction="sum")
        attention = attention_distributions(tap_s, tap_t)
        return {"attention": attention, "value": Term(value, attention.count)}


class MiniLMv2Loss(nn.Module):
    r"""Relations of queries, of keys and of values, over relation heads split anew.

    .. math::
        L = \sum_{X \in \{Q, K, V\}} \frac{\alpha_X}{A_r |x|}
        \sum_{a, i} \mathrm{KL}(R^t_{X a i} \,\|\, R^s_{X a i})

    Args:
        num_relation_heads: A_r; 48 for a teacher of width 768, 64 for one of 1024. Divides either width.
        relations: which of ``q``, ``k``, ``v`` take part.
        weights: one a relation; 1 each in the paper.

    Heads and widths of the two models may differ. The paper's layer is the teacher's last for base sizes,
    and 21 of 24 (BERT-large) or 19 of 24 (RoBERTa-large) for large ones; of the student the last. The
    official training code was never published.

    Source: Wang et al. 2021 (MiniLMv2), section 3.1, equations 4 to 6.
    """

    def __init__(
        self,
        num_relation_heads: int = 48,
        relations: Sequence[str] = RELATIONS,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        unknown = [name for name in relations if name not in RELATIONS]
        if unknown or not relations:
            raise ValueError(f"relations must be some of {', '.join(RELATIONS)}, got {list(relations)}")
        weights = [1.0] * len(relations) if weights is None else list(weights)
        if len(weights) != len(relations):
            raise ValueError(f"weights must have one a relation, got {weights} for {list(relations)}")
        self.num_relation_heads = num_relation_heads
        self.weights = dict(zip(relations, weights, strict=True))

    def forward(self, tap_s: Tap, tap_t: Tap) -> dict[str, Term]:
        """Taps of :func:`bertops.capture`; a term for each of ``relations``."""
        rows = count_tokens(tap_s.q[:, 0], tap_s.mask)
        terms = {}
        for name, weight in self.weights.items():
            total = relation_kl(
                getattr(tap_s, name),
                getattr(tap_t, name),
                tap_s.mask,
                num_relation_heads=self.num_relation_heads,
                cu_seqlens=tap_s.cu_seqlens,
                reduction="sum",
            )
            terms[name] = Term(total, rows * self.num_relation_heads, weight)
        return terms
