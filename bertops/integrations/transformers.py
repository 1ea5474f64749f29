"""``attn_implementation="bertops"`` for the encoders of Hugging Face transformers.

Importing this module registers the name; nothing in transformers is patched::

    import bertops.integrations.transformers
    model = AutoModel.from_pretrained(folder, attn_implementation="bertops")
    out = model(**batch, output_attentions=True)

Covered: BERT, RoBERTa, ALBERT, DistilBERT, MobileBERT, ModernBERT (local layers through ``window``; it needs
transformers 5.1, as 5.0 dispatches it by a table of its own), and any other encoder that calls transformers'
attention interface with a (B, N) padding mask and nothing more. Causal attention, cross-attention, KV caches,
biases, softcaps, sinks and 4-D masks raise NotImplementedError.

Where the result differs from ``attn_implementation="eager"``:

* Padded query rows get attention output 0 and probabilities 0; eager lets them attend to the real tokens.
* ``output_attentions=True`` gives the probabilities before dropout, which is what a student is distilled
  from; eager gives them after dropout. Pass it to the forward call: transformers' config accepts it for eager
  alone, so ``from_pretrained(..., output_attentions=True)`` raises there, unless the model is loaded as eager
  and switched with ``model.set_attn_implementation("bertops")``.
* Packed rows (B = 1) are kept apart with ``cu_seq_lens_q``, and ``cu_seq_lens_k`` equal to it where given, as
  for FlashAttention; eager ignores both. Restarting ``position_ids`` of B = 1 without them raise. The check
  reads the positions (a host sync per layer on a GPU) and is left out where an ``attention_mask`` is given,
  under ``torch.compile``, and for DistilBERT, MobileBERT and ModernBERT, which do not hand positions down.
  MobileBERT's trigram embedding reads across the border of packed sequences, before any attention.

:func:`bertops.capture` records q, k, v and lse of chosen layers, for losses that need no map.

``torch.compile(model, fullgraph=True)`` works; with ``output_attentions=True`` after one uncompiled call with
it, in which transformers installs the hooks that collect the maps.
"""

from typing import Any

import torch
from torch import Tensor

from bertops._library import accumulator_dtype
from bertops.ops.attention import attention
from bertops.ops.attention_with_scores import attention_with_scores
from bertops.reference import valid_pairs

INSTALL = "bertops.integrations.transformers needs transformers >= 5.0: pip install 'bertops[hf]'"
try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(f"{INSTALL} ({error})") from error
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"{INSTALL} (found {transformers.__version__})")

NAME = "bertops"

# Keyword arguments of transformers' attention functions that change the result and have no counterpart here.
UNSUPPORTED = (
    "position_bias",
    "softcap",
    "s_aux",
    "sinks",
    "head_mask",
    "cache",
    "past_key_values",
    "indices",
    "block_indices",
)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls in every layer.

    Args:
        module: the attention module; read are ``training``, ``is_causal`` and ``config.output_attentions``.
        query, key, value: (B, H, N, D), any strides.
        attention_mask: (B, N) bool from :func:`padding_mask`, or None.
        scaling: factor of the scores, default ``1 / sqrt(D)``.
        dropout: probability of dropping an attention probability while ``module.training``.
        is_causal: overrides ``module.is_causal``; where neither is there, transformers' default, causal.
        sliding_window: keys with ``|i - j| >= sliding_window`` take no part, transformers' rule for
            FlashAttention: ModernBERT passes its half window plus one.
        position_ids: (1 or B, N); only looked at to refuse packed rows that came without ``cu_seq_lens_q``.
        cu_seq_lens_q, cu_seq_lens_k: int (number of sequences + 1), equal, for rows packed into B = 1.
        output_attentions: also return the probabilities; default ``module.config.output_attentions``.

    Returns:
        The output (B, N, H, D), and the probabilities (B, H, N, N) in its dtype before dropout, or None.

    Raises:
        NotImplementedError: the call asks for something that bertops cannot do; says what.
        ValueError, TypeError, RuntimeError: as in :func:`bertops.attention`.
    """
    _refuse_unsupported(module, query, key, value, attention_mask, is_causal, kwargs)
    # rows are packed into B = 1; positions of a larger batch say nothing, and reading them would cost a sync
    packed_positions = position_ids if query.shape[0] == 1 else None
    cu_seqlens = _packed_rows(attention_mask, packed_positions, cu_seq_lens_q, cu_seq_lens_k)
    window = None if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {
        "cu_seqlens": cu_seqlens,
        "window": window,
        "scale": scaling,
        "dropout_p": dropout if module.training else 0.0,
        "return_lse": True,
    }
    if output_attentions is None:
        output_attentions = getattr(getattr(module, "config", None), "output_attentions", False)
    scores = None
    if output_attentions:
        out, scores, lse = attention_with_scores(
            query, key, value, attention_mask, **options, scores_dtype=accumulator_dtype(query.dtype)
        )
    else:
        out, lse = attention(query, key, value, attention_mask, **options)
    for tap in getattr(module, "bertops_taps", ()):  # of bertops.capture
        tap.record(query, key, value, lse, attention_mask, cu_seqlens, window, scaling)
    if scores is None:
        return out.transpose(1, 2), None
    pairs = valid_pairs(query, attention_mask, cu_seqlens, -1 if window is None else window)
    return out.transpose(1, 2), probabilities(scores, lse, pairs).to(out.dtype)


def probabilities(scores: Tensor, lse: Tensor, pairs: Tensor) -> Tensor:
    """exp(scores - lse) at ``pairs`` (B, 1, N, N) and 0 elsewhere, also in rows without a pair (lse -inf)."""
    logits = scores.masked_fill(~pairs, -torch.inf)
    return torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def padding_mask(
    batch_size: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    *,
    q_length: int | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs: object,
) -> Tensor | None:
    """The mask function that transformers calls once a forward: passes the (B, N) padding mask on as it is.

    The local window is no part of it; it reaches :func:`attention_forward` as ``sliding_window``.

    Args:
        attention_mask: (B, N), true for a real token, or None.
        allow_is_bidirectional_skip: set by transformers where padding and a local window are all that masks.
        use_vmap: set by transformers where the model adds a mask pattern of its own.

    Raises:
        NotImplementedError: a causal, chunked, custom or cross-attention mask is asked for.
    """
    if use_vmap:
        _refuse("a custom mask function (or_mask_function or and_mask_function)")
    if not allow_is_bidirectional_skip:
        _refuse("a causal or other mask that is more than padding and a local window (is it a decoder?)")
    if q_length is not None and q_length != kv_length:
        _refuse(f"a mask of {q_length} queries by {kv_length} keys (cross-attention or a KV cache)")
    if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, kv_length):
        _refuse(
            f"an attention_mask of shape {tuple(attention_mask.shape)} where only a padding mask of shape "
            f"(B, N) = {(batch_size, kv_length)} fits"
        )
    return attention_mask


def _refuse(what: str) -> None:
    raise NotImplementedError(
        f"attn_implementation='{NAME}' cannot run {what}; load the model with attn_implementation='sdpa' "
        "or 'eager', or call model.set_attn_implementation('sdpa')"
    )


def _refuse_unsupported(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    kwargs: dict[str, object],
) -> None:
    name = type(module).__name__
    if is_causal or (is_causal is None and getattr(module, "is_causal", True)):
        _refuse(f"causal attention ({name}.is_causal; is it a decoder?)")
    # Keys of equal length do not give it away, and their mask would blank the query rows.
    if "Cross" in name or getattr(module, "is_cross_attention", False):
        _refuse(f"cross-attention ({name})")
    if not query.shape == key.shape == value.shape:
        _refuse(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} of different "
            f"shapes in {name} (cross-attention, a KV cache or grouped heads)"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        _refuse(
            f"an attention_mask of shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype} "
            f"in {name}: only a padding mask of shape (B, N) fits"
        )
    for argument in UNSUPPORTED:
        if kwargs.get(argument) is not None:
            _refuse(f"{argument} ({name} passed {type(kwargs[argument]).__name__})")


def _packed_rows(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> Tensor | None:
    """``cu_seqlens`` as :func:`bertops.attention` takes it."""
    if cu_seq_lens_q is None:
        if cu_seq_lens_k is not None:
            _refuse("cu_seq_lens_k without cu_seq_lens_q")
        if attention_mask is None and position_ids is not None and not torch.compiler.is_compiling():
            _refuse_restarts(position_ids)
        return None
    if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q:
        same_shape = cu_seq_lens_k.shape == cu_seq_lens_q.shape
        on_host = cu_seq_lens_k.device.type == "cpu" and not torch.compiler.is_compiling()
        if not same_shape or (on_host and not torch.equal(cu_seq_lens_k, cu_seq_lens_q)):
            _refuse(f"cu_seq_lens_k {tuple(cu_seq_lens_k.shape)} that differs from cu_seq_lens_q")
    return cu_seq_lens_q.to(torch.int32)


def _refuse_restarts(position_ids: Tensor) -> None:
    if (position_ids.diff(dim=-1) != 1).any():
        _refuse(
            "position_ids that do not count up by one and no attention_mask: packed rows need cu_seq_lens_q, "
            "and a single sequence with such positions an attention_mask of ones"
        )


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
