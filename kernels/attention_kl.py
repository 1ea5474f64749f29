"""KL between a teacher's and a student's attention in Triton: the launchers; the kernels are in pairs.py."""

from torch import Tensor

from bertops.kernels.pairs import is_exact, kl_scales, pair_fwd
from bertops.kernels.pairs_bwd import pair_bwd


def attention_kl_fwd(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: float,
    scale_t: float,
    lse_s: Tensor | None,
    lse_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns KL, lse_s and lse_t (B, H, N); see :func:`bertops.attention_kl`.

    In fp32, where products take the time, a given lse is not used: its rounding would be the largest error.
    """
    exact = is_exact(q_s, q_t)
    given = (None, None) if exact else (lse_s, lse_t)
    loss = "kl" if given[0] is None else "kl_given"
    scales = kl_scales(scale_s, scale_t, exact)
    rows, lse_s, lse_t = pair_fwd(loss, (q_s, k_s, q_t, k_t), given, mask, cu_seqlens, scales)
    return rows, lse_s, lse_t


def attention_kl_bwd(
    grad_rows: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: float,
    scale_t: float,
    lse_s: Tensor,
    lse_t: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns dq_s and dk_s (B, H, N, D_s)."""
    scales = kl_scales(scale_s, scale_t, is_exact(q_s, q_t))._replace(gain=scale_s)
    return pair_bwd("kl", grad_rows, (q_s, k_s, q_t, k_t), (lse_s, lse_t), mask, cu_seqlens, scales)
