"""TinyBERT's attention loss in Triton: the direct form's launchers; its kernels are in pairs.py.

The Gram form is in attention_score_mse_gram.py.
"""

from torch import Tensor

from bertops.kernels.attention_score_mse_gram import (
    attention_score_mse_gram_bwd,
    attention_score_mse_gram_fwd,
)
from bertops.kernels.pairs import mse_scales, pair_fwd
from bertops.kernels.pairs_bwd import pair_bwd

__all__ = [
    "attention_score_mse_bwd",
    "attention_score_mse_fwd",
    "attention_score_mse_gram_bwd",
    "attention_score_mse_gram_fwd",
]


def attention_score_mse_fwd(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> Tensor:
    """Returns the rows' sums (B, H, N) of squared differences; see :func:`bertops.attention_score_mse`."""
    scales = mse_scales(scale_s, scale_t)
    scales = scales._replace(gain=scales.gain**2)
    (rows,) = pair_fwd("mse", (q_s, k_s, q_t, k_t), (None, None), mask, cu_seqlens, scales)
    return rows


def attention_score_mse_bwd(
    grad_rows: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: float,
    scale_t: float,
) -> tuple[Tensor, Tensor]:
    """Returns dq_s and dk_s (B, H, N, D_s)."""
    scales = mse_scales(scale_s, scale_t)
    scales = scales._replace(gain=2 * scale_s * scales.gain)
    return pair_bwd("mse", grad_rows, (q_s, k_s, q_t, k_t), (None, None), mask, cu_seqlens, scales)
