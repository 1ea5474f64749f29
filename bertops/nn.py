"""Thin modules over the ops."""

from typing import Any

from torch import Tensor, nn

from bertops.ops.attention import attention
from bertops.ops.attention_kl import attention_kl
from bertops.ops.attention_score_mse import attention_score_mse
from bertops.ops.attention_with_scores import attention_with_scores
from bertops.ops.linear_kl_div import linear_kl_div
from bertops.ops.projected_mse import projected_mse
from bertops.ops.relation_kl import relation_kl


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


class AttentionKL(nn.Module):
    """:func:`bertops.attention_kl` with its scales and reduction fixed."""

    def __init__(
        self, *, scale_s: float | None = None, scale_t: float | None = None, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"scale_s": scale_s, "scale_t": scale_t, "reduction": reduction}

    def forward(
        self,
        q_s: Tensor,
        k_s: Tensor,
        q_t: Tensor,
        k_t: Tensor,
        mask: Tensor | None = None,
        *,
        lse_s: Tensor | None = None,
        lse_t: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        rows: dict[str, Any] = {"cu_seqlens": cu_seqlens, "lse_s": lse_s, "lse_t": lse_t}
        return attention_kl(q_s, k_s, q_t, k_t, mask, **rows, **self.options)


class RelationKL(nn.Module):
    """:func:`bertops.relation_kl` with its relation heads, scales and reduction fixed."""

    def __init__(
        self,
        num_relation_heads: int | None = None,
        *,
        scale_s: float | None = None,
        scale_t: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "num_relation_heads": num_relation_heads,
            "scale_s": scale_s,
            "scale_t": scale_t,
            "reduction": reduction,
        }

    def forward(
        self, x_s: Tensor, x_t: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        return relation_kl(x_s, x_t, mask, cu_seqlens=cu_seqlens, **self.options)


class AttentionScoreMSE(nn.Module):
    """:func:`bertops.attention_score_mse` with its form, scales and reduction fixed."""

    def __init__(
        self,
        *,
        form: str = "auto",
        scale_s: float | None = None,
        scale_t: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "form": form,
            "scale_s": scale_s,
            "scale_t": scale_t,
            "reduction": reduction,
        }

    def forward(
        self,
        q_s: Tensor,
        k_s: Tensor,
        q_t: Tensor,
        k_t: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        return attention_score_mse(q_s, k_s, q_t, k_t, mask, cu_seqlens=cu_seqlens, **self.options)


class LinearKLDiv(nn.Module):
    """:func:`bertops.linear_kl_div` with its temperature and reduction fixed."""

    def __init__(self, *, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.options: dict[str, Any] = {"temperature": temperature, "reduction": reduction}

    def forward(
        self,
        hidden_s: Tensor,
        weight_s: Tensor,
        hidden_t: Tensor,
        weight_t: Tensor,
        *,
        bias_s: Tensor | None = None,
        bias_t: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        inputs: dict[str, Any] = {"bias_s": bias_s, "bias_t": bias_t, "mask": mask}
        return linear_kl_div(hidden_s, weight_s, hidden_t, weight_t, **inputs, **self.options)


class ProjectedMSE(nn.Module):
    """:func:`bertops.projected_mse` with a projection of its own, which training fits along.

    Args:
        width_s: of the student's hidden states.
        width_t: of the teacher's.
        bias: whether the projection has one.
        reduction: as of the function.
    """

    def __init__(self, width_s: int, width_t: int, *, bias: bool = True, reduction: str = "mean") -> None:
        super().__init__()
        self.proj = nn.Linear(width_s, width_t, bias=bias)
        self.reduction = reduction

    def forward(self, hidden_s: Tensor, hidden_t: Tensor, mask: Tensor | None = None) -> Tensor:
        weight, bias = self.proj.weight, self.proj.bias
        return projected_mse(hidden_s, hidden_t, weight, bias, mask, reduction=self.reduction)
