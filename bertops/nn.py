"""Thin modules over the ops."""

from typing import Any

from torch import Tensor, nn

from bertops.ops.attention import attention
from bertops.ops.attention_kl import attention_kl
from bertops.ops.attention_score_mse import attention_score_mse
from bertops.ops.attention_with_scores import attention_with_scores
from bertops.ops.factorized_embedding import factorized_embedding
from bertops.ops.kl_div_logits import kl_div_logits
from bertops.ops.linear_kl_div import linear_kl_div
from bertops.ops.projected_mse import projected_mse
from bertops.ops.relation_kl import relation_kl
from bertops.ops.row_pair_losses import cosine_loss, feature_map_transfer, normalized_mse


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
        # (B, N, H, D) parts first: their gradients then go into that of the projection's output in one copy
        parts = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        dropout_p = self.dropout_p if self.training else 0.0
        rows: dict[str, Any] = {"cu_seqlens": cu_seqlens, "window": window, "return_scores": return_scores}
        out, scores = attend(self, q, k, v, mask, **rows, dropout_p=dropout_p)
        out = self.proj(out)
        return out if scores is None else (out, scores)


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    return_scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What an attention module does between its projections, recorded by :func:`bertops.capture`.

    Args:
        module: the attention module itself, which capture may be listening to.
        q, k, v: (B, H, N, D).
        mask, cu_seqlens, window, dropout_p: as in :func:`bertops.attention`.

    Returns:
        The output (B, N, H * D), and with ``return_scores`` the score map (B, H, N, N), else None.
    """
    options: dict[str, Any] = {
        "cu_seqlens": cu_seqlens,
        "window": window,
        "dropout_p": dropout_p,
        "return_lse": True,
    }
    scores = None
    if return_scores:
        out, scores, lse = attention_with_scores(q, k, v, mask, **options)
    else:
        out, lse = attention(q, k, v, mask, **options)
    for tap in getattr(module, "bertops_taps", ()):  # of bertops.capture
        tap.record(q, k, v, lse, mask, cu_seqlens, window, None)
    return out.transpose(1, 2).flatten(2), scores


class FactorizedEmbedding(nn.Module):
    """:func:`bertops.factorized_embedding` with its tables: (B, N) ids in, (B, N, hidden_size) out.

    Args:
        num_words: rows of the word table.
        embedding_size: width E of the tables and of the LayerNorm.
        hidden_size: width of the projection's output; None for no projection, which is BERT's block.
        num_positions, num_token_types: rows of these tables, 0 for none.
        padding_idx, position_padding_idx: rows that get no gradient.
        eps: of the LayerNorm.
        dropout_p: dropout before the projection while training.

    The tables are ``word``, ``position`` and ``token_type``; then come ``norm`` and ``projection``.
    """

    def __init__(
        self,
        num_words: int,
        embedding_size: int,
        hidden_size: int | None = None,
        *,
        num_positions: int = 0,
        num_token_types: int = 0,
        padding_idx: int | None = None,
        position_padding_idx: int | None = None,
        eps: float = 1e-12,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()

        def table(rows: int, pad: int | None = None) -> nn.Embedding | None:
            return nn.Embedding(rows, embedding_size, padding_idx=pad) if rows else None

        self.word = nn.Embedding(num_words, embedding_size, padding_idx=padding_idx)
        self.position = table(num_positions, position_padding_idx)
        self.token_type = table(num_token_types)
        self.norm = nn.LayerNorm(embedding_size, eps=eps)
        self.projection = None if hidden_size is None else nn.Linear(embedding_size, hidden_size)
        self.dropout_p = dropout_p

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        position, token_type, projection = self.position, self.token_type, self.projection
        return factorized_embedding(
            input_ids,
            self.word.weight,
            None if projection is None else projection.weight,
            position=None if position is None else position.weight,
            token_type=None if token_type is None else token_type.weight,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            projection_bias=None if projection is None else projection.bias,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            cu_seqlens=cu_seqlens,
            padding_idx=self.word.padding_idx,
            position_padding_idx=None if position is None else position.padding_idx,
            eps=self.norm.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
        )


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


class CosineLoss(nn.Module):
    """:func:`bertops.cosine_loss` with its reduction fixed."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, hidden_s: Tensor, hidden_t: Tensor, mask: Tensor | None = None) -> Tensor:
        return cosine_loss(hidden_s, hidden_t, mask, reduction=self.reduction)


class NormalizedMSE(nn.Module):
    """:func:`bertops.normalized_mse` with its reduction fixed."""

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, hidden_s: Tensor, hidden_t: Tensor, mask: Tensor | None = None) -> Tensor:
        return normalized_mse(hidden_s, hidden_t, mask, reduction=self.reduction)


class FeatureMapTransfer(nn.Module):
    """:func:`bertops.feature_map_transfer` with its eps and reduction fixed."""

    def __init__(self, *, eps: float = 1e-12, reduction: str = "mean") -> None:
        super().__init__()
        self.options: dict[str, Any] = {"eps": eps, "reduction": reduction}

    def forward(
        self, hidden_s: Tensor, hidden_t: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return feature_map_transfer(hidden_s, hidden_t, mask, **self.options)


class KLDivLogits(nn.Module):
    """:func:`bertops.kl_div_logits` with its temperature and reduction fixed."""

    def __init__(self, *, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.options: dict[str, Any] = {"temperature": temperature, "reduction": reduction}

    def forward(self, logits_s: Tensor, logits_t: Tensor, mask: Tensor | None = None) -> Tensor:
        return kl_div_logits(logits_s, logits_t, mask=mask, **self.options)


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
