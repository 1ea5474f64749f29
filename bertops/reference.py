"""The eager oracle of every op: a few lines of PyTorch each, differentiable by autograd.

Tests run these in float64 to get the truth and in the input's dtype to get the error of plain PyTorch.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bertops._library import accumulator_dtype


def attention(q, k, v, mask=None, cu_seqlens=None, window=-1, scale=None, dropout_p=0.0, seed=None):
    """Returns out (B, H, N, D) and lse (B, H, N); see :func:`bertops.attention`."""
    return attention_with_scores(q, k, v, mask, cu_seqlens, window, scale, dropout_p, seed)[:2]


def attention_with_scores(
    q, k, v, mask=None, cu_seqlens=None, window=-1, scale=None, dropout_p=0.0, seed=None, scores_dtype=None
):
    """Returns out (B, H, N, D), lse (B, H, N) and scores (B, H, N, N); see the public op."""
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    rows = valid_rows(q, mask)[..., None]  # (B, 1, N, 1)
    q, k, v = (torch.where(rows, x, 0.0) for x in (q, k, v))
    pairs = valid_pairs(q, mask, cu_seqlens, window)  # (B, 1, N, N)
    scores = q @ k.transpose(-1, -2) * scale
    logits = scores.masked_fill(~pairs, -math.inf)
    lse = torch.logsumexp(logits.to(accumulator_dtype(q.dtype)), -1)
    # a row without a key would be softmax of -inf alone: NaN, also in the gradient of the branch not taken
    probs = logits.masked_fill(~rows, 0.0).softmax(-1)
    if dropout_p > 0:
        keep = dropout_keep(q, cu_seqlens, dropout_p, seed)
        probs = torch.where(keep, probs / (1 - dropout_p), 0.0)
    out = torch.where(rows, probs @ v, 0.0)
    return out, lse, torch.where(pairs, scores, 0.0).to(scores_dtype or q.dtype)


def attention_kl(q_s, k_s, q_t, k_t, mask=None, cu_seqlens=None, scale_s=None, scale_t=None):
    """Returns KL (B, H, N) of every row, and the lse of both models; see :func:`bertops.attention_kl`."""
    pairs = valid_pairs(q_s, mask, cu_seqlens, -1)
    log_probs_s, lse_s = _log_probs(q_s, k_s, mask, pairs, scale_s)
    log_probs_t, lse_t = _log_probs(q_t, k_t, mask, pairs, scale_t)
    divergence = log_probs_t.exp() * (log_probs_t - log_probs_s)
    return torch.where(pairs, divergence, 0.0).sum(-1), lse_s, lse_t


def relation_kl(x_s, x_t, mask=None, cu_seqlens=None, scale_s=None, scale_t=None):
    """Returns KL (B, H, N) of every row, and the lse of both models; see :func:`bertops.relation_kl`."""
    return attention_kl(x_s, x_s, x_t, x_t, mask, cu_seqlens, scale_s, scale_t)


def attention_score_mse(q_s, k_s, q_t, k_t, mask=None, cu_seqlens=None, scale_s=None, scale_t=None):
    """Returns the squared differences (B, H, N) of every row, summed over its keys; see the public op."""
    pairs = valid_pairs(q_s, mask, cu_seqlens, -1)
    scores_s, scores_t = _scores(q_s, k_s, mask, scale_s), _scores(q_t, k_t, mask, scale_t)
    return torch.where(pairs, scores_s - scores_t, 0.0).square().sum(-1)


def entropy(logits, normalize=False):
    """Returns the entropy (B,) of softmax(logits) (B, C), in nats or as a share of ln C; see the op."""
    log_probs = logits.to(accumulator_dtype(logits.dtype)).log_softmax(-1)
    probs = log_probs.exp()
    # a class of probability 0 adds 0; its logarithm would make that NaN, also in the gradient
    nats = -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)
    return nats / entropy_unit(logits.shape[1]) if normalize else nats


def entropy_unit(classes: int) -> float:
    """The largest entropy, ln C; 1 for a single class, whose entropy is 0 in any unit."""
    return math.log(classes) if classes > 1 else 1.0


def exit_decision(logits, threshold, normalize=True):
    """Returns prediction, uncertainty, exited, order (B,) and num_kept (); see the public op."""
    largest = 1.0 if normalize else math.log(logits.shape[1])
    uncertainty = entropy(logits, normalize).clamp(0.0, largest)
    exited = uncertainty <= threshold
    return (
        logits.argmax(-1),
        uncertainty,
        exited,
        exited.to(torch.uint8).argsort(stable=True),
        (~exited).sum(),
    )


def compact(hidden, order, num_kept=None):
    """Returns hidden[order], 0 from row num_kept on; see the public op."""
    rows = hidden.index_select(0, order)
    if num_kept is None:
        return rows
    left = torch.arange(len(order), device=order.device) >= num_kept
    return rows.masked_fill(left.view(-1, *(1,) * (hidden.dim() - 1)), 0)


def compact_packed(hidden, cu_seqlens, order, num_tokens):
    """Returns the sequences in that order end to end (1, T', ...) and their offsets; see the public op."""
    lengths = cu_seqlens.diff()[order]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    sequence, position = sequence_positions(num_tokens, offsets)
    return hidden[:, cu_seqlens[order][sequence] + position], offsets


def factorized_embedding(
    input_ids,
    position_ids,
    token_type_ids,
    cu_seqlens,
    word,
    position,
    token_type,
    norm_weight,
    norm_bias,
    projection,
    projection_bias,
    eps,
    dropout_p=0.0,
    seed=None,
    padding_idx=None,
    position_padding_idx=None,
):
    """Returns (B, N, H), (B, N, E) without a projection; see the public op."""
    shape = input_ids.shape
    if position_ids is None:
        position_ids = default_positions(input_ids, cu_seqlens)
    rows = F.embedding(input_ids, word, padding_idx)
    if position is not None:
        rows = rows + F.embedding(position_ids.expand(shape), position, position_padding_idx)
    if token_type is not None:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids.expand(shape)
        rows = rows + F.embedding(types, token_type)
    hidden = F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps)
    if dropout_p > 0:
        keep = embedding_dropout_keep(hidden, cu_seqlens, dropout_p, seed)
        hidden = torch.where(keep, hidden / (1 - dropout_p), 0.0)
    if projection is None:
        return hidden
    return F.linear(hidden.to(projection.dtype), projection, projection_bias)


def cosine_loss(hidden_s, hidden_t, mask=None, eps=1e-12):
    """Returns 1 - cos of every row, 0 where it is not real; see :func:`bertops.cosine_loss`."""
    s, t = (_unit(x, eps) for x in _real_rows(hidden_s, hidden_t, mask))
    return _of_real_rows(1 - (s * t).sum(-1), mask)


def normalized_mse(hidden_s, hidden_t, mask=None, eps=1e-12):
    """Returns the squared distance of the rows' unit vectors, summed over H; see the public op."""
    s, t = (_unit(x, eps) for x in _real_rows(hidden_s, hidden_t, mask))
    return _of_real_rows((s - t).square().sum(-1), mask)


def feature_map_transfer(hidden_s, hidden_t, mask=None, eps=1e-12):
    """Returns (3, ...): of the normalised rows, of the means and of the variances; see the public op."""
    s, t = _real_rows(hidden_s, hidden_t, mask)
    normed_s, normed_t = (F.layer_norm(x, x.shape[-1:], eps=eps) for x in (s, t))
    rows = (
        (normed_s - normed_t).square().mean(-1),
        (s.mean(-1) - t.mean(-1)).square(),
        (s.var(-1, correction=0) - t.var(-1, correction=0)).abs(),
    )
    return torch.stack([_of_real_rows(x, mask) for x in rows])


def kl_div_logits(logits_s, logits_t, mask=None, temperature=1.0):
    """Returns T^2 KL(teacher || student) of every row; see :func:`bertops.kl_div_logits`."""
    s, t = _real_rows(logits_s, logits_t, mask)
    log_probs_s, log_probs_t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    probs = log_probs_t.exp()
    # a class without probability adds 0; the difference of its logarithms may be NaN, also in the gradient
    differences = torch.where(probs == 0, 0.0, log_probs_t) - log_probs_s.masked_fill(probs == 0, 0.0)
    return _of_real_rows(temperature**2 * (probs * differences).sum(-1), mask)


def _real_rows(x_s, x_t, mask):
    """Both in the dtype of losses, rows that are not real as 0."""
    dtype = accumulator_dtype(x_s.dtype)
    pair = x_s.to(dtype), x_t.to(dtype)
    return pair if mask is None else tuple(torch.where(mask[..., None], x, 0.0) for x in pair)


def _of_real_rows(rows, mask):
    return rows if mask is None else torch.where(mask, rows, 0.0)


def _unit(x, eps):
    """x / |x|, and 0 with gradient 0 for a vector shorter than ``eps``."""
    long = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) >= eps
    return torch.where(long, F.normalize(torch.where(long, x, 1.0), dim=-1, eps=eps), 0.0)


def linear_kl_div(hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t, mask=None, temperature=1.0):
    """Returns T^2 KL (M,) of every row of the hidden states (M, H); see :func:`bertops.linear_kl_div`."""
    log_probs_s = _linear(hidden_s, weight_s, bias_s, mask).div(temperature).log_softmax(-1)
    log_probs_t = _linear(hidden_t, weight_t, bias_t, mask).div(temperature).log_softmax(-1).to(log_probs_s)
    rows = temperature**2 * (log_probs_t.exp() * (log_probs_t - log_probs_s)).sum(-1)
    return rows if mask is None else torch.where(mask, rows, 0.0)


def projected_mse(hidden_s, weight, bias, hidden_t, mask=None):
    """Returns the squared differences (M,) of every row, summed over its width; see the public op."""
    projected = _linear(hidden_s, weight, bias, mask)
    rows = (projected - _linear(hidden_t, None, None, mask).to(projected)).square().sum(-1)
    return rows if mask is None else torch.where(mask, rows, 0.0)


def _linear(hidden, weight, bias, mask):
    """(M, rows of the weight) in the dtype of losses; hidden states that are not real count as 0."""
    if mask is not None:
        hidden = torch.where(mask[:, None], hidden, 0.0)
    out = hidden if weight is None else F.linear(hidden, weight, bias)
    return out.to(accumulator_dtype(hidden.dtype))


def default_positions(input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(1, N): columns, counted from the start of every packed sequence."""
    length = input_ids.shape[1]
    if cu_seqlens is not None:
        return sequence_positions(length, cu_seqlens)[1][None]
    return torch.arange(length, device=input_ids.device)[None]


def _scores(q, k, mask, scale):
    """(B, H, N, N), before softmax, in the dtype of losses."""
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    rows = valid_rows(q, mask)[..., None]
    q, k = (torch.where(rows, x, 0.0) for x in (q, k))
    return (q @ k.transpose(-1, -2) * scale).to(accumulator_dtype(q.dtype))


def _log_probs(q, k, mask, pairs, scale):
    """(B, H, N, N) log-probabilities, 0 off the valid pairs, and lse (B, H, N)."""
    logits = _scores(q, k, mask, scale).masked_fill(~pairs, -math.inf)
    lse = torch.logsumexp(logits, -1)
    # a row without a key would be -inf - -inf: NaN, also in the gradient of the branch not taken
    log_probs = logits.masked_fill(~valid_rows(q, mask)[..., None], 0.0).log_softmax(-1)
    return log_probs.masked_fill(~pairs, 0.0), lse


def valid_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1, N) bool: the real tokens of ``x`` (B, H, N, D)."""
    batch, _, length, _ = x.shape
    if mask is None:
        return torch.ones(batch, 1, length, dtype=torch.bool, device=x.device)
    return mask[:, None, :]


def valid_pairs(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, window: int) -> Tensor:
    """(B, 1, N, N) bool: query i and key j are real, of one sequence, and within ``window`` if it is >= 0."""
    rows = valid_rows(x, mask)
    pairs = rows[..., :, None] & rows[..., None, :]
    position = torch.arange(x.shape[2], device=x.device)
    if cu_seqlens is not None:
        sequence, position = sequence_positions(x.shape[2], cu_seqlens)
        pairs = pairs & (sequence[:, None] == sequence)
    if window >= 0:
        pairs = pairs & ((position[:, None] - position).abs() <= window)
    return pairs


def sequence_positions(length: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each of ``length`` packed rows, and the position inside it."""
    row = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    return sequence, row - cu_seqlens[sequence]


def dropout_keep(x: Tensor, cu_seqlens: Tensor | None, dropout_p: float, seed: Tensor) -> Tensor:
    """(B, H, N, N) bool: which probabilities survive.

    Word j % 4 of Philox4x32-10 with the counter (j // 4, i, head, sequence) and the 64-bit ``seed`` as key,
    kept where it is at least dropout_p * 2**32. Rows of packed input count from their sequence's start.
    """
    batch, heads, length, _ = x.shape
    position = torch.arange(length, device=x.device)
    sequence = torch.arange(batch, device=x.device)[:, None].expand(batch, length)
    if cu_seqlens is not None:
        row_sequence, position = sequence_positions(length, cu_seqlens)
        sequence = row_sequence[None]
    head = torch.arange(heads, device=x.device)
    shape = (batch, heads, length, length)
    counter = (
        (position // 4)[None, None, None, :].expand(shape),
        position[None, None, :, None].expand(shape),
        head[None, :, None, None].expand(shape),
        sequence[:, None, :, None].expand(shape),
    )
    words = torch.stack(philox(counter, seed), -1)
    word = words.gather(-1, (position % 4).expand(shape)[..., None]).squeeze(-1)
    return word >= dropout_threshold(dropout_p)


def embedding_dropout_keep(
    hidden: Tensor, cu_seqlens: Tensor | None, dropout_p: float, seed: Tensor
) -> Tensor:
    """(B, N, E) bool: which elements survive.

    Word e % 4 of Philox4x32-10 with the counter (e // 4, i, 0, sequence) and the 64-bit ``seed`` as key, kept
    where it is at least dropout_p * 2**32. Rows of packed input count from their sequence's start.
    """
    batch, length, width = hidden.shape
    element = torch.arange(width, device=hidden.device)
    position = torch.arange(length, device=hidden.device)
    sequence = torch.arange(batch, device=hidden.device)[:, None].expand(batch, length)
    if cu_seqlens is not None:
        row_sequence, position = sequence_positions(length, cu_seqlens)
        sequence = row_sequence[None]
    counter = (
        (element // 4).expand(hidden.shape),
        position[None, :, None].expand(hidden.shape),
        torch.zeros((), dtype=torch.int64, device=hidden.device).expand(hidden.shape),
        sequence[:, :, None].expand(hidden.shape),
    )
    words = torch.stack(philox(counter, seed), -1)
    word = words.gather(-1, (element % 4).expand(hidden.shape)[..., None]).squeeze(-1)
    return word >= dropout_threshold(dropout_p)


def dropout_threshold(dropout_p: float) -> int:
    """The 32-bit word from which on a probability is kept."""
    return min(int(dropout_p * 2**32), 2**32 - 1)


def philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four int64 tensors of 32-bit words in, four out."""
    low = 0xFFFFFFFF
    key0, key1 = seed & low, (seed >> 32) & low
    c0, c1, c2, c3 = counter
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((second >> 32) & low) ^ c1 ^ key0,
            second & low,
            ((first >> 32) & low) ^ c3 ^ key1,
            first & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
