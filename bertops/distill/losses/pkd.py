"""BERT-PKD: soft targets, and the first token of several layers."""

from collections.abc import Sequence

from torch import Tensor, nn

from bertops.distill.losses.bilstm import check_logits
from bertops.distill.losses.terms import Term, cross_entropy, joined
from bertops.ops.kl_div_logits import kl_div_logits
from bertops.ops.projected_mse import projected_mse
from bertops.ops.row_pair_losses import normalized_mse


class PKDLoss(nn.Module):
    r"""Labels, the teacher's softened answer, and the patient term over the first tokens of mapped layers.

    .. math::
        L = (1 - \alpha)\, \mathrm{CE}(z^s, y) + \alpha\, T^2\, \mathrm{KL}(p^t_T \,\|\, p^s_T)
        + \beta\, L_{PT}, \qquad
        L_{PT} = \frac{1}{B M' H} \sum_{b, m} \left\lVert \frac{h^s_{bm}}{\lVert h^s_{bm} \rVert}
        - \frac{h^t_{bm}}{\lVert h^t_{bm} \rVert} \right\rVert_2^2

    over the M' mapped layers (:func:`~bertops.distill.layer_map.skip`,
    :func:`~bertops.distill.layer_map.last`).

    Args:
        alpha: weight of the teacher's answer; the paper searches 0.2, 0.5, 0.7.
        beta: weight of the patient term; 10, 100, 500, 1000.
        temperature: T; 5, 10, 20.
        normalize: False compares the vectors as they are. The paper always normalises; among the results that
            come with the official code, MNLI, QNLI and QQP are best without.

    The paper writes the patient term as a sum and soft cross entropy, whose gradient is the KL's. Its
    values of beta belong to the official code, which takes the mean over samples, layers and width as here;
    as a sum over layers and width that is ``beta / (M' * H)``. The official code divides the KL by B * C
    instead of B: ``alpha`` here is C times as strong.

    Source: Sun et al. 2019 (Patient Knowledge Distillation), section 3, equations 4 to 7.
    """

    def __init__(
        self, alpha: float = 0.5, beta: float = 100.0, temperature: float = 10.0, *, normalize: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
        self.alpha, self.beta, self.temperature, self.normalize = alpha, beta, temperature, normalize

    def forward(
        self,
        logits_s: Tensor,
        logits_t: Tensor,
        labels: Tensor,
        first_s: Sequence[Tensor],
        first_t: Sequence[Tensor],
    ) -> dict[str, Term]:
        """The terms are ``labels``, ``logits`` and ``hidden``.

        Args:
            logits_s, logits_t: (B, C).
            labels: (B,).
            first_s, first_t: the first token (B, H) of each mapped layer, student's and teacher's in one
            order.
        """
        check_logits(logits_s, logits_t)
        if len(first_s) != len(first_t) or not first_s:
            raise ValueError(
                "first_s and first_t must have one tensor a mapped layer, "
                f"got {len(first_s)} and {len(first_t)}"
            )
        soft = kl_div_logits(logits_s, logits_t, temperature=self.temperature, reduction="sum")
        batch, width = first_s[0].shape
        compare = normalized_mse if self.normalize else projected_mse
        count = batch * len(first_s) * width
        layers = [
            Term(compare(s, t, reduction="sum"), count, self.beta)
            for s, t in zip(first_s, first_t, strict=True)
        ]
        return {
            "labels": cross_entropy(logits_s, labels, 1 - self.alpha),
            "logits": Term(soft, batch, self.alpha),
            "hidden": joined(layers),
        }
