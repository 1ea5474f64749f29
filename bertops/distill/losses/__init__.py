"""What each method of the BERT family minimises, one file a paper, over the ops of :mod:`bertops`.

Every loss returns its :class:`Term` by name: sums, what they are divided by, and weights. :func:`combine`
makes the scalar of one batch. Terms of several batches or processes join by adding totals and counts first,
so that a token weighs the same wherever it stands.

Weights and reductions default to the paper. Where the official code differs, the docstring says by what.
"""

from bertops.distill.losses.bilstm import DistilledBiLSTMLoss
from bertops.distill.losses.distilbert import DistilBertLoss
from bertops.distill.losses.fastbert import self_distillation_loss
from bertops.distill.losses.minilm import MiniLMLoss, MiniLMv2Loss
from bertops.distill.losses.mobilebert import (
    MobileBertLayerLoss,
    MobileBertPretrainingLoss,
    ProgressiveTransfer,
)
from bertops.distill.losses.pkd import PKDLoss
from bertops.distill.losses.terms import Term, combine
from bertops.distill.losses.tinybert import TinyBertLoss, TinyBertPredictionLoss

__all__ = [
    "DistilBertLoss",
    "DistilledBiLSTMLoss",
    "MiniLMLoss",
    "MiniLMv2Loss",
    "MobileBertLayerLoss",
    "MobileBertPretrainingLoss",
    "PKDLoss",
    "ProgressiveTransfer",
    "Term",
    "TinyBertLoss",
    "TinyBertPredictionLoss",
    "combine",
    "self_distillation_loss",
]
