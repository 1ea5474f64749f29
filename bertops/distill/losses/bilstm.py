"""Distilled BiLSTM: a small network learns the teacher's logits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertops.distill.losses.terms import Term, cross_entropy
from bertops.ops import _checks
from bertops.ops._pairs import check_teacher


class DistilledBiLSTMLoss(nn.Module):
    r"""Squared distance of raw logits, and cross entropy where there are labels.

    .. math:: L = \alpha\, \mathrm{CE}(z^s, y) + (1 - \alpha)\, \lVert z^t - z^s \rVert_2^2

    a mean over samples, the squares summed over classes.

    Args:
        alpha: weight of the labels; 0, the paper's best, needs none.

    The official code takes the mean over classes too and adds both terms with weight 1: ``(1 - alpha)``
    here is its distillation weight times ``1 / C``.

    Source: Tang et al. 2019 (Distilling Task-Specific Knowledge from BERT), section 3.2, equation 2.
    """

    def __init__(self, alpha: float = 0.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
        self.alpha = alpha

    def forward(self, logits_s: Tensor, logits_t: Tensor, labels: Tensor | None = None) -> dict[str, Term]:
        """``logits_s``, ``logits_t`` (B, C), ``labels`` (B,); the terms are ``logits`` and ``labels``."""
        check_logits(logits_s, logits_t)
        dtype = torch.promote_types(logits_s.dtype, torch.float32)
        distance = F.mse_loss(logits_s.to(dtype), logits_t.to(dtype), reduction="sum")
        terms = {"logits": Term(distance, logits_s.shape[0], 1 - self.alpha)}
        if self.alpha > 0:
            if labels is None:
                raise ValueError(f"labels must be given with alpha {self.alpha}, got None")
            terms["labels"] = cross_entropy(logits_s, labels, self.alpha)
        return terms


def check_logits(logits_s: Tensor, logits_t: Tensor) -> None:
    """Both (B, C) of one shape: teacher and student know the same classes."""
    check_teacher("logits_t", logits_t)
    if logits_s.dim() != 2 or logits_s.shape != logits_t.shape:
        raise ValueError(
            "logits_s and logits_t must have one shape (B, C), got "
            f"{_checks.describe(logits_s)} and {_checks.describe(logits_t)}"
        )
