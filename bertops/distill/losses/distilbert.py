"""DistilBERT: the teacher's words, the masked words, and the direction of the hidden states."""

from typing import NamedTuple

from torch import Tensor, nn

from bertops.distill.losses.terms import Term, count_tokens, masked_lm
from bertops.ops.linear_kl_div import linear_kl_div
from bertops.ops.row_pair_losses import cosine_loss


class Decoder(NamedTuple):
    """The last step of a masked language model: logits are ``hidden @ weight.T + bias``."""

    hidden: Tensor  # (B, N, H) or some of its rows (M, H), behind the head's transform
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)


class DistilBertLoss(nn.Module):
    r"""Soft targets over the vocabulary, masked language modelling, and cosine of the last hidden states.

    .. math::
        L = \alpha_{kl}\, T^2\, \mathrm{KL}(p^t_T \,\|\, p^s_T) + \alpha_{mlm}\, \mathrm{CE}
        + \alpha_{cos}\, (1 - \cos(h^s, h^t))

    means over real tokens, CE over the masked ones. No (B, N, V) logits are made: of the student those of the
    masked rows alone, of the teacher none.

    Args:
        alpha_kl, alpha_mlm, alpha_cosine: weights. The paper gives none; 5, 2, 1 is what the official README
            trains with on one GPU, and 0.33 each on four.
        temperature: T.

    The official code compares the words at all real tokens, or at the masked ones alone
    (``restrict_ce_to_mask``): give the decoders those rows alone to do the same.

    Source: Sanh et al. 2019 (DistilBERT), section 3; its code, ``distiller.py``.
    """

    def __init__(
        self,
        alpha_kl: float = 5.0,
        alpha_mlm: float = 2.0,
        alpha_cosine: float = 1.0,
        *,
        temperature: float = 2.0,
    ) -> None:
        super().__init__()
        self.alpha_kl, self.alpha_mlm, self.alpha_cosine = alpha_kl, alpha_mlm, alpha_cosine
        self.temperature = temperature

    def forward(
        self,
        student: Decoder,
        teacher: Decoder,
        hidden_s: Tensor,
        hidden_t: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
    ) -> dict[str, Term]:
        """The terms are ``kl``, ``mlm`` and, unless its weight is 0, ``cosine``.

        Args:
            student, teacher: what goes into either decoder, over one vocabulary: (B, N, H), or the M rows
                (M, H) whose words are compared.
            hidden_s, hidden_t: (B, N, H), the last hidden states, of one width where they are compared.
            labels: (B, N) or (M,) as those rows, -100 where nothing was masked.
            mask: (B, N), true for a real token.
        """
        tokens, chosen = count_tokens(hidden_s, mask), student.hidden.dim() == 2
        kl = linear_kl_div(
            student.hidden,
            student.weight,
            teacher.hidden,
            teacher.weight,
            bias_s=student.bias,
            bias_t=teacher.bias,
            temperature=self.temperature,
            mask=None if chosen else mask,
            reduction="sum",
        )
        terms = {
            "kl": Term(kl, len(student.hidden) if chosen else tokens, self.alpha_kl),
            "mlm": masked_lm(*student, labels, self.alpha_mlm),
        }
        if self.alpha_cosine:
            cosine = cosine_loss(hidden_s, hidden_t, mask, reduction="sum")
            terms["cosine"] = Term(cosine, tokens, self.alpha_cosine)
        return terms
