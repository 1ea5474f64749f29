"""Thin modules over the ops."""

from typing import Any

from torch import Tensor, nn

from bertops.ops.attention import attention
from bertops.ops.attention_with_scores import attention_with_scores


class Attention(nn.Module):
    """Multi-head self-attention from one packed projection: (B, N, H * D) in, (B, N, H * D) out.

    Args:
        hidden_size: width of the input, a multiple of ``num_heads``.
        num_heads: attention heads.
        dropout_p: dropout on the probabilities while training.

    The projections are ``qkv`` (hidden_size to 3 * hidden_size, in the order q, k, v) and ``proj``.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout_p: float = 0.0) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout_p = dropout_p
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        window: int | None = None,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the output, with ``return_scores`` also the score map (B, H, N, N)."""
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        options: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "window": window,
            "dropout_p": self.dropout_p if self.training else 0.0,
            "return_lse": True,
        }
        scores = None
        if return_scores:
            out, scores, lse = attention_with_scores(q, k, v, mask, **options)
        else:
            out, lse = attention(q, k, v, mask, **options)
        for tap in getattr(self, "bertops_taps", ()):  # of bertops.capture
            tap.record(q, k, v, lse, mask, cu_seqlens, window, None)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out if scores is None else (out, scores)
