"""The masked language model's loss, over the masked rows alone."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bertops.data.masking import IGNORED
from bertops.models.heads import MaskedLM


def masked_lm_sums(model: MaskedLM, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sums over the masked tokens: ``mlm`` of -ln p(token) in nats, ``mlm_accuracy`` of right answers.

    The head runs on the masked rows only, about one in seven: with a vocabulary it is the model's largest
    product.

    Args:
        model: with ``head`` and the word table that is its decoder.
        hidden: (B, N, hidden_size), what the encoder returned.
        labels: (B, N), -100 where nothing is predicted.
    """
    rows = (labels.flatten() != IGNORED).nonzero().squeeze(1)
    target = labels.flatten()[rows]
    logits = model.head(hidden.flatten(0, 1)[rows], model.decoder_weight()).float()
    return {
        "mlm": F.cross_entropy(logits, target, reduction="sum"),
        "mlm_accuracy": (logits.detach().argmax(1) == target).sum(),
    }


def count_masked(labels: Tensor) -> int:
    return int(torch.count_nonzero(labels != IGNORED))
