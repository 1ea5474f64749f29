"""Every operator schema of the package, with the fake that gives its output shapes and strides.

``bertops._C`` registers the CPU kernels (csrc/cpu) and those written in CUDA C++ (csrc/cuda);
``bertops/ops/<op>.py`` those written in Triton (kernels). Autograd lives outside the dispatcher, in the
``autograd.Function`` of ``bertops/ops/<op>.py``.
"""

import torch

LIBRARY = torch.library.Library("bertops", "FRAGMENT")


def _define(schema: str) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def rows_first(like: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) over (B, N, H, D) memory: merging the heads of the result needs no copy."""
    batch, heads, length, head_dim = like.shape
    return like.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: the dtype of losses, lse and entropies."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_ATTENTION = "Tensor? mask, Tensor? cu_seqlens, SymInt window, float scale, float dropout_p, Tensor? seed"

_define(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_ATTENTION}) -> (Tensor, Tensor)")
_define(
    f"attention_with_scores_fwd(Tensor q, Tensor k, Tensor v, {_ATTENTION}, ScalarType scores_dtype)"
    " -> (Tensor, Tensor, Tensor)"
)
_define(
    "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor? grad_scores, Tensor q, Tensor k, Tensor v,"
    f" Tensor out, Tensor lse, {_ATTENTION}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("bertops::attention_fwd")
def _(q, k, v, mask, cu_seqlens, window, scale, dropout_p, seed):
    return rows_first(q), q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))


@torch.library.register_fake("bertops::attention_with_scores_fwd")
def _(q, k, v, mask, cu_seqlens, window, scale, dropout_p, seed, scores_dtype):
    batch, heads, length, _ = q.shape
    lse = q.new_empty((batch, heads, length), dtype=accumulator_dtype(q.dtype))
    return rows_first(q), lse, q.new_empty((batch, heads, length, length), dtype=scores_dtype)


@torch.library.register_fake("bertops::attention_bwd")
def _(
    grad_out,
    grad_lse,
    grad_scores,
    q,
    k,
    v,
    out,
    lse,
    mask,
    cu_seqlens,
    window,
    scale,
    dropout_p,
    seed,
):
    return rows_first(q), rows_first(k), rows_first(v)


# Teacher and student attention compared: rows are (B, H, N), lse_s and lse_t those of the scores.
_PAIR = (
    "Tensor q_s, Tensor k_s, Tensor q_t, Tensor k_t, Tensor? mask, Tensor? cu_seqlens,"
    " float scale_s, float scale_t"
)
_SELF_PAIR = "Tensor x_s, Tensor x_t, Tensor? mask, Tensor? cu_seqlens, float scale_s, float scale_t"

_define(f"attention_kl_fwd({_PAIR}, Tensor? lse_s, Tensor? lse_t) -> (Tensor, Tensor, Tensor)")
_define(f"attention_kl_bwd(Tensor grad_rows, {_PAIR}, Tensor lse_s, Tensor lse_t) -> (Tensor, Tensor)")
_define(f"attention_kl_with_grads({_PAIR}, Tensor? lse_s, Tensor? lse_t) -> (Tensor, Tensor, Tensor)")
_define(f"relation_kl_fwd({_SELF_PAIR}) -> (Tensor, Tensor, Tensor)")
_define(f"relation_kl_bwd(Tensor grad_rows, {_SELF_PAIR}, Tensor lse_s, Tensor lse_t) -> Tensor")
_define(f"relation_kl_with_grads({_SELF_PAIR}) -> (Tensor, Tensor)")
_define(f"attention_score_mse_fwd({_PAIR}) -> Tensor")
_define(f"attention_score_mse_bwd(Tensor grad_rows, {_PAIR}) -> (Tensor, Tensor)")
_define(f"attention_score_mse_with_grads({_PAIR}) -> (Tensor, Tensor, Tensor)")
_define(f"attention_score_mse_gram_fwd({_PAIR}) -> (Tensor, Tensor)")
_define(f"attention_score_mse_gram_bwd(Tensor grad, {_PAIR}, Tensor grams) -> (Tensor, Tensor)")
_define(f"attention_score_mse_gram_with_grads({_PAIR}) -> (Tensor, Tensor, Tensor)")

_define("_scale_grad(Tensor saved, Tensor factor, ScalarType dtype) -> Tensor")


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:3], dtype=accumulator_dtype(x.dtype))


def _head_sums(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """A number for every sequence and head."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty((sequences, x.shape[1]), dtype=accumulator_dtype(x.dtype))


def _unscaled_grad(x: torch.Tensor) -> torch.Tensor:
    """Like rows_first, in the dtype that holds a gradient until its factor is known."""
    return rows_first(x).to(accumulator_dtype(x.dtype))


@torch.library.register_fake("bertops::attention_kl_fwd")
def _(q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t, lse_s, lse_t):
    return _rows_of(q_s), _rows_of(q_s), _rows_of(q_s)


@torch.library.register_fake("bertops::attention_kl_bwd")
def _(grad_rows, q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t, lse_s, lse_t):
    return rows_first(q_s), rows_first(k_s)


@torch.library.register_fake("bertops::attention_kl_with_grads")
def _(q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t, lse_s, lse_t):
    return _rows_of(q_s), _unscaled_grad(q_s), _unscaled_grad(k_s)


@torch.library.register_fake("bertops::relation_kl_fwd")
def _(x_s, x_t, mask, cu_seqlens, scale_s, scale_t):
    return _rows_of(x_s), _rows_of(x_s), _rows_of(x_s)


@torch.library.register_fake("bertops::relation_kl_bwd")
def _(grad_rows, x_s, x_t, mask, cu_seqlens, scale_s, scale_t, lse_s, lse_t):
    return rows_first(x_s)


@torch.library.register_fake("bertops::relation_kl_with_grads")
def _(x_s, x_t, mask, cu_seqlens, scale_s, scale_t):
    return _rows_of(x_s), _unscaled_grad(x_s)


@torch.library.register_fake("bertops::attention_score_mse_fwd")
def _(q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t):
    return _rows_of(q_s)


@torch.library.register_fake("bertops::attention_score_mse_bwd")
def _(grad_rows, q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t):
    return rows_first(q_s), rows_first(k_s)


@torch.library.register_fake("bertops::attention_score_mse_with_grads")
def _(q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t):
    return _rows_of(q_s), _unscaled_grad(q_s), _unscaled_grad(k_s)


@torch.library.register_fake("bertops::attention_score_mse_gram_fwd")
def _(q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t):
    sums = _head_sums(q_s, cu_seqlens)
    width = q_s.shape[3] + q_t.shape[3]
    return sums, sums.new_empty((*sums.shape, 2, width, width))


@torch.library.register_fake("bertops::attention_score_mse_gram_bwd")
def _(grad, q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t, grams):
    return rows_first(q_s), rows_first(k_s)


@torch.library.register_fake("bertops::attention_score_mse_gram_with_grads")
def _(q_s, k_s, q_t, k_t, mask, cu_seqlens, scale_s, scale_t):
    return _head_sums(q_s, cu_seqlens), _unscaled_grad(q_s), _unscaled_grad(k_s)


@torch.library.register_fake("bertops::_scale_grad")
def _(saved, factor, dtype):
    return rows_first(saved).to(dtype)


# Early exit: logits are (B, C), what comes out has an entry for every row.
_define("entropy_fwd(Tensor logits, bool normalize) -> Tensor")
_define("entropy_bwd(Tensor grad, Tensor logits, bool normalize) -> Tensor")
_define(
    "exit_decision(Tensor logits, float threshold, bool normalize)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_define("compact(Tensor hidden, Tensor order, Tensor? num_kept) -> Tensor")
_define(
    "compact_packed(Tensor hidden, Tensor cu_seqlens, Tensor order, SymInt num_tokens) -> (Tensor, Tensor)"
)


@torch.library.register_fake("bertops::entropy_fwd")
def _(logits, normalize):
    return logits.new_empty(logits.shape[:1], dtype=accumulator_dtype(logits.dtype))


@torch.library.register_fake("bertops::entropy_bwd")
def _(grad, logits, normalize):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("bertops::exit_decision")
def _(logits, threshold, normalize):
    rows = logits.shape[:1]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=accumulator_dtype(logits.dtype)),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty((), dtype=torch.int64),
    )


@torch.library.register_fake("bertops::compact")
def _(hidden, order, num_kept):
    return hidden.new_empty((order.shape[0], *hidden.shape[1:]))


@torch.library.register_fake("bertops::compact_packed")
def _(hidden, cu_seqlens, order, num_tokens):
    return (
        hidden.new_empty((1, num_tokens, *hidden.shape[2:])),
        cu_seqlens.new_empty((order.shape[0] + 1,)),
    )


# ALBERT's and BERT's embedding: ids are (B, N), tables (rows, E), projection (H, E) as nn.Linear holds it.
_EMBEDDING = (
    "Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor? cu_seqlens,"
    " Tensor word, Tensor? position, Tensor? token_type, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor? projection, Tensor? projection_bias, float eps, float dropout_p, Tensor? seed"
)
# Gradients of word to projection_bias, in that order; one that is not wanted is empty.
_define(f"factorized_embedding_fwd({_EMBEDDING}) -> (Tensor, Tensor, Tensor)")
_define(
    f"factorized_embedding_bwd(Tensor grad_out, {_EMBEDDING}, Tensor mean, Tensor rstd,"
    " int? padding_idx, int? position_padding_idx, bool sparse, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("bertops::factorized_embedding_fwd")
def _(
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
    dropout_p,
    seed,
):
    last = word if projection is None else projection
    width = word.shape[1] if projection is None else projection.shape[0]
    moment = word.new_empty(input_ids.shape, dtype=accumulator_dtype(word.dtype))
    return last.new_empty((*input_ids.shape, width)), moment, moment.new_empty(moment.shape)


@torch.library.register_fake("bertops::factorized_embedding_bwd")
def _(
    grad_out,
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
    dropout_p,
    seed,
    mean,
    rstd,
    padding_idx,
    position_padding_idx,
    sparse,
    wanted,
):
    parameters = (word, position, token_type, norm_weight, norm_bias, projection, projection_bias)
    grads = [
        word.new_empty((0,)) if x is None or not want else x.new_empty(x.shape)
        for x, want in zip(parameters, wanted, strict=True)
    ]
    if sparse and wanted[0]:
        grads[0] = word.new_empty((input_ids.numel(), word.shape[1]))
    return tuple(grads)


# Sums of grad_rows (count, E) by ids (count,), which order (count,) sorts: the gradient of a table (rows, E).
_define(
    "_embedding_table_grad(Tensor grad_rows, Tensor ids, Tensor order, SymInt rows, int? padding_idx,"
    " ScalarType dtype) -> Tensor"
)


# Paired rows of student and teacher: x is (B, N, H), rows (losses, B, N), stats (B, N, what the backward
# needs of a row). The gradient is (B, N, H), contiguous, in the student's dtype.
ROW_PAIR_LOSSES = {"cosine_loss": (1, 3), "normalized_mse": (1, 3), "feature_map_transfer": (3, 7)}
_ROW_PAIR = "Tensor hidden_s, Tensor hidden_t, Tensor? mask, float eps"
_LOGIT_PAIR = "Tensor logits_s, Tensor logits_t, Tensor? mask, float temperature"
KL_DIV_STATS = 5

for _name in ROW_PAIR_LOSSES:
    _define(f"{_name}_fwd({_ROW_PAIR}) -> (Tensor, Tensor)")
    _define(f"{_name}_bwd(Tensor grad_rows, {_ROW_PAIR}, Tensor stats) -> Tensor")
_define(f"kl_div_logits_fwd({_LOGIT_PAIR}) -> (Tensor, Tensor)")
_define(f"kl_div_logits_bwd(Tensor grad_rows, {_LOGIT_PAIR}, Tensor stats) -> Tensor")


def _register_row_pair_fakes(name: str, losses: int, stats: int) -> None:
    def forward(x_s, x_t, mask, option):
        rows = x_s.new_empty((losses, *x_s.shape[:2]), dtype=accumulator_dtype(x_s.dtype))
        return rows, rows.new_empty((*x_s.shape[:2], stats))

    def backward(grad_rows, x_s, x_t, mask, option, stats):
        return x_s.new_empty(x_s.shape)

    torch.library.register_fake(f"bertops::{name}_fwd", forward)
    torch.library.register_fake(f"bertops::{name}_bwd", backward)


for _name, _sizes in (*ROW_PAIR_LOSSES.items(), ("kl_div_logits", (1, KL_DIV_STATS))):
    _register_row_pair_fakes(_name, *_sizes)


# Losses behind a linear layer: hidden states are (M, width), weights (rows, width) as nn.Linear holds them.
# Rows of the loss (M,), then the gradients of the student's three for the upstream gradient grad_rows, in the
# dtype of losses; one that is not wanted is empty.
_LINEAR_KL = (
    "Tensor hidden_s, Tensor weight_s, Tensor? bias_s, Tensor hidden_t, Tensor weight_t, Tensor? bias_t,"
    " Tensor? mask, float temperature"
)
_PROJECTED = "Tensor hidden_s, Tensor? weight, Tensor? bias, Tensor hidden_t, Tensor? mask"
_WANTED = "bool want_hidden, bool want_weight, bool want_bias"
_define(f"linear_kl_div_fwd({_LINEAR_KL}) -> Tensor")
_define(
    f"linear_kl_div_with_grads(Tensor grad_rows, {_LINEAR_KL}, {_WANTED}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_define(f"projected_mse_fwd({_PROJECTED}) -> Tensor")
_define(
    f"projected_mse_with_grads(Tensor grad_rows, {_PROJECTED}, {_WANTED}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _loss_of_rows(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=accumulator_dtype(hidden.dtype))


def _linear_grads(students, wanted):
    like = _loss_of_rows(students[0])
    return tuple(like.new_empty(x.shape if want else (0,)) for x, want in zip(students, wanted, strict=True))


@torch.library.register_fake("bertops::linear_kl_div_fwd")
def _(hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t, mask, temperature):
    return _loss_of_rows(hidden_s)


@torch.library.register_fake("bertops::linear_kl_div_with_grads")
def _(
    grad_rows,
    hidden_s,
    weight_s,
    bias_s,
    hidden_t,
    weight_t,
    bias_t,
    mask,
    temperature,
    want_hidden,
    want_weight,
    want_bias,
):
    wanted = want_hidden, want_weight, want_bias
    return _loss_of_rows(hidden_s), *_linear_grads((hidden_s, weight_s, bias_s), wanted)


@torch.library.register_fake("bertops::projected_mse_fwd")
def _(hidden_s, weight, bias, hidden_t, mask):
    return _loss_of_rows(hidden_s)


@torch.library.register_fake("bertops::projected_mse_with_grads")
def _(grad_rows, hidden_s, weight, bias, hidden_t, mask, want_hidden, want_weight, want_bias):
    wanted = want_hidden, want_weight, want_bias
    return _loss_of_rows(hidden_s), *_linear_grads((hidden_s, weight, bias), wanted)


# What the machine can do at most, for the bench: work on every thread of the device of ``like`` and count it.
_define("_limits_fma(Tensor like, int steps) -> (Tensor, int)")
_define("_limits_exp(Tensor like, int steps) -> (Tensor, int)")
_define("_limits_launch(Tensor like) -> ()")
