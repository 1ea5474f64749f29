"""MobileBERT: feature maps and attention of layer after layer, then pretraining with a teacher."""

from typing import NamedTuple

from torch import Tensor, nn

from bertops.distill.capture import Tap
from bertops.distill.losses.distilbert import Decoder
from bertops.distill.losses.terms import (
    IGNORED_LABEL,
    Term,
    attention_distributions,
    count_tokens,
    cross_entropy,
    masked_lm,
)
from bertops.ops.linear_kl_div import linear_kl_div
from bertops.ops.row_pair_losses import feature_map_transfer


class MobileBertLayerLoss(nn.Module):
    r"""Knowledge transfer of one layer: its feature map, taken apart, and its attention.

    .. math::
        L = w_f\, \mathrm{MSE}(\mathrm{LN}(h^s), \mathrm{LN}(h^t)) + w_\mu\, (\mu^s - \mu^t)^2
        + w_\sigma\, \lvert \sigma^{2,s} - \sigma^{2,t} \rvert + w_a\, \mathrm{KL}(A^t \,\|\, A^s)

    means over real tokens (the first also over the width) and over heads and real rows; LN is without
    weights. Student and teacher have one width and one number of heads.

    Args:
        feature_map, mean, variance, attention: the weights. The paper gives none; the official code has 100,
            5000, 5 and 1.

    The official code takes cross entropy instead of KL, whose gradient is the same, and its means over padded
    tokens too. Its mean and variance terms compare every student layer with all teacher layers at once, which
    is a slip; here a layer meets its own.

    Source: Sun et al. 2020 (MobileBERT), section 3.4, equations 2 to 4, and its code, ``run_pretraining.py``.
    """

    def __init__(
        self, *, feature_map: float = 1.0, mean: float = 1.0, variance: float = 1.0, attention: float = 1.0
    ) -> None:
        super().__init__()
        self.weights = {"feature_map": feature_map, "mean": mean, "variance": variance}
        self.attention = attention

    def forward(
        self, hidden_s: Tensor, hidden_t: Tensor, tap_s: Tap, tap_t: Tap, mask: Tensor | None = None
    ) -> dict[str, Term]:
        """The terms are ``feature_map``, ``mean``, ``variance`` and ``attention``.

        Args:
            hidden_s, hidden_t: (B, N, H), the outputs of the layer.
            tap_s, tap_t: its :func:`bertops.capture`.
            mask: (B, N), true for a real token.
        """
        tokens = count_tokens(hidden_s, mask)
        totals = feature_map_transfer(hidden_s, hidden_t, mask, reduction="sum")
        terms = {
            name: Term(total, tokens, weight)
            for (name, weight), total in zip(self.weights.items(), totals, strict=True)
        }
        return {**terms, "attention": attention_distributions(tap_s, tap_t, self.attention)}


class MobileBertPretrainingLoss(nn.Module):
    r"""Pretraining distillation: masked words, the teacher's distribution over them, next sentence.

    .. math:: L = \alpha\, L_{MLM} + (1 - \alpha)\, L_{KD} + L_{NSP}

    both of the first at masked tokens alone, :math:`L_{KD}` the KL divergence of the teacher's words.

    Args:
        alpha: 0.5 in the paper and in the official code.

    The official code writes the first two as one cross entropy with the mixed target, whose gradient is the
    same. Its ``distill_temperature`` multiplies the teacher's hidden states before the head and stays 1.

    Source: Sun et al. 2020 (MobileBERT), section 3.4, equation 5.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
        self.alpha = alpha

    def forward(
        self,
        student: Decoder,
        teacher: Decoder,
        labels: Tensor,
        next_logits: Tensor | None = None,
        next_labels: Tensor | None = None,
    ) -> dict[str, Term]:
        """The terms are ``mlm``, ``kd`` and, where there are pairs, ``nsp``.

        Args:
            student, teacher: what goes into either decoder, over one vocabulary.
            labels: (B, N), -100 where nothing was masked.
            next_logits, next_labels: (B, 2) and (B,), both or neither.
        """
        masked = labels != IGNORED_LABEL
        kd = linear_kl_div(
            student.hidden[masked],
            student.weight,
            teacher.hidden[masked],
            teacher.weight,
            bias_s=student.bias,
            bias_t=teacher.bias,
            reduction="sum",
        )
        terms = {
            "mlm": masked_lm(*student, labels, self.alpha),
            "kd": Term(kd, masked.sum(), 1 - self.alpha),
        }
        if (next_logits is None) != (next_labels is None):
            raise ValueError("next_logits and next_labels must be given both or neither")
        if next_logits is not None and next_labels is not None:
            terms["nsp"] = cross_entropy(next_logits, next_labels, 1.0)
        return terms


class Stage(NamedTuple):
    """What a step trains."""

    layer: int | None  # counted from 1; None once the layers are done
    factors: list[float]  # of the learning rate, one a layer; 0 leaves a layer as it is
    rest: float  # of the embeddings and heads


class ProgressiveTransfer:
    """Progressive knowledge transfer: layer after layer, then everything.

    While layer l learns, only its :class:`MobileBertLayerLoss` counts; the layers before it move slowly,
    those behind it, the embeddings and the heads, which start as the teacher's, not at all.

    Args:
        num_layers: L.
        steps_per_layer: 10 000 in the paper.
        current, earlier: factors of the learning rate; 3 and 0.3 in the official code. With 0 the earlier
            layers are frozen, as the paper describes first.

    Source: Sun et al. 2020 (MobileBERT), section 3.5; its code, ``run_pretraining.py``.
    """

    def __init__(
        self, num_layers: int, steps_per_layer: int = 10_000, *, current: float = 3.0, earlier: float = 0.3
    ) -> None:
        if num_layers < 1 or steps_per_layer < 1:
            raise ValueError(
                f"num_layers and steps_per_layer must be at least 1, got {num_layers} and {steps_per_layer}"
            )
        self.num_layers, self.steps_per_layer = num_layers, steps_per_layer
        self.current, self.earlier = current, earlier

    @property
    def num_steps(self) -> int:
        """Steps until the last layer is done."""
        return self.num_layers * self.steps_per_layer

    def at(self, step: int) -> Stage:
        """The stage of ``step``, counted from 0."""
        if step < 0:
            raise ValueError(f"step must be from 0 on, got {step}")
        if step >= self.num_steps:
            return Stage(None, [1.0] * self.num_layers, 1.0)
        layer = step // self.steps_per_layer + 1
        behind = self.num_layers - layer
        return Stage(layer, [self.earlier] * (layer - 1) + [self.current] + [0.0] * behind, 0.0)
