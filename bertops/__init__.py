"""Fused PyTorch kernels for distilling and early-exiting BERT-like encoders."""

from bertops import nn
from bertops._backend import use_impl
from bertops.distill.capture import capture
from bertops.ops.attention import attention
from bertops.ops.attention_kl import attention_kl
from bertops.ops.attention_score_mse import attention_score_mse
from bertops.ops.attention_with_scores import attention_with_scores
from bertops.ops.compact import compact, compact_packed
from bertops.ops.entropy import entropy
from bertops.ops.exit_decision import ExitDecision, exit_decision
from bertops.ops.factorized_embedding import factorized_embedding
from bertops.ops.kl_div_logits import kl_div_logits
from bertops.ops.linear_kl_div import linear_kl_div
from bertops.ops.projected_mse import projected_mse
from bertops.ops.relation_kl import relation_kl
from bertops.ops.row_pair_losses import cosine_loss, feature_map_transfer, normalized_mse

__version__ = "0.1.0"

__all__ = [
    "ExitDecision",
    "attention",
    "attention_kl",
    "attention_score_mse",
    "attention_with_scores",
    "capture",
    "compact",
    "compact_packed",
    "cosine_loss",
    "entropy",
    "exit_decision",
    "factorized_embedding",
    "feature_map_transfer",
    "kl_div_logits",
    "linear_kl_div",
    "nn",
    "normalized_mse",
    "projected_mse",
    "relation_kl",
    "use_impl",
]
