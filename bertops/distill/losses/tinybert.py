"""TinyBERT: embeddings, hidden states and attention scores of mapped layers, then the answers."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from bertops.distill.capture import Tap
from bertops.distill.losses.bilstm import check_logits
from bertops.distill.losses.terms import Term, count_head_pairs, count_tokens, joined
from bertops.ops.attention_score_mse import attention_score_mse
from bertops.ops.kl_div_logits import kl_div_logits
from bertops.ops.projected_mse import projected_mse


class TinyBertLoss(nn.Module):
    r"""The loss of general distillation and of the first stage of task distillation.

    .. math::
        L = \mathrm{MSE}(E^s W_e, E^t) + \sum_m \mathrm{MSE}(H^s_m W_h, H^t_{g(m)})
        + \sum_m \frac{1}{h} \sum_i \mathrm{MSE}(A^s_{mi}, A^t_{g(m) i})

    with A the scaled scores before softmax. Means are over real tokens and the teacher's width, and over
    heads and pairs of real tokens. The module holds the projections :math:`W_e` and :math:`W_h`; train them
    too.

    Args:
        student_size, teacher_size: widths of the hidden states.
        shared: one projection for the embedding and all layers, as the official code has it.
        bias: a bias in the projections; the paper has none, the official code one.

    The official code takes its means over padded tokens and pairs too: for n real tokens of N in every
    sample, its hidden loss weighs n / N of this one and its attention loss (n / N)², besides what the
    padding adds. It sets scores at or below -100 to 0, which also hits real ones.

    Source: Jiao et al. 2020 (TinyBERT), section 3.1, equations 7 to 9 and 11; its code, ``task_distill.py``.
    """

    def __init__(
        self, student_size: int, teacher_size: int, *, shared: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(student_size, teacher_size, bias=bias)
        self.hidden = self.embedding if shared else nn.Linear(student_size, teacher_size, bias=bias)

    def forward(
        self,
        hidden_s: Sequence[Tensor],
        hidden_t: Sequence[Tensor],
        taps_s: Iterable[Tap],
        taps_t: Iterable[Tap],
        mask: Tensor | None = None,
    ) -> dict[str, Term]:
        """The terms are ``embedding``, ``hidden`` and ``attention``.

        Args:
            hidden_s, hidden_t: (B, N, width): the embedding's output, then each mapped layer's, of the
            student
                and of the teacher in one order.
            taps_s, taps_t: :func:`bertops.capture` of the mapped layers.
            mask: (B, N), true for a real token.
        """
        if len(hidden_s) != len(hidden_t) or len(hidden_s) < 2:
            raise ValueError(
                "hidden_s and hidden_t must hold the embedding and every mapped layer, got "
                f"{len(hidden_s)} and {len(hidden_t)} tensors"
            )
        count = count_tokens(hidden_t[0], mask) * hidden_t[0].shape[-1]
        projections = [self.embedding, *[self.hidden] * (len(hidden_s) - 1)]
        embedding, *layers = (
            Term(projected_mse(s, t, p.weight, p.bias, mask, reduction="sum"), count)
            for s, t, p in zip(hidden_s, hidden_t, projections, strict=True)
        )
        return {
            "embedding": embedding,
            "hidden": joined(layers),
            "attention": attention_scores(taps_s, taps_t),
        }


def attention_scores(taps_s: Iterable[Tap], taps_t: Iterable[Tap]) -> Term:
    """The squared differences of scores, of all pairs of taps together."""
    return joined(
        Term(
            attention_score_mse(
                s.q,
                s.k,
                t.q,
                t.k,
                s.mask,
                cu_seqlens=s.cu_seqlens,
                scale_s=s.scale,
                scale_t=t.scale,
                reduction="sum",
            ),
            count_head_pairs(s),
        )
        for s, t in zip(taps_s, taps_t, strict=True)
    )


class TinyBertPredictionLoss(nn.Module):
    r"""The second stage of task distillation: the teacher's answers at temperature t.

    .. math:: L = t^2\, \mathrm{KL}(p^t_t \,\|\, p^s_t), \qquad p_t = \mathrm{softmax}(z / t)

    a mean over samples; no labels.

    Args:
        temperature: t; 1 in the paper.

    The paper writes soft cross entropy without :math:`t^2`: the same gradient at t = 1. The official code
    divides by B * C instead of B, and trains STS-B on gold scores.

    Source: Jiao et al. 2020 (TinyBERT), section 3.1, equation 10.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> dict[str, Term]:
        """``logits_s``, ``logits_t`` (B, C); the term is ``logits``."""
        check_logits(logits_s, logits_t)
        total = kl_div_logits(logits_s, logits_t, temperature=self.temperature, reduction="sum")
        return {"logits": Term(total, logits_s.shape[0])}
