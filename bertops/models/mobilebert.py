"""MobileBERT, its smaller variant and its teacher: narrow layers between wide ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertops.models.config import ACTIVATIONS, MobileBertConfig
from bertops.models.encoder import Encoder, EncoderOutput, initialize
from bertops.models.heads import HeadOutput, MaskedLM, WithHead
from bertops.models.rows import first_tokens
from bertops.nn import attend
from bertops.ops import _checks
from bertops.reference import sequence_positions


class NoNorm(nn.Module):
    """:math:`\\gamma \\circ x + \\beta`: what stands in LayerNorm's place, without its mean and variance.

    Source: Sun et al. 2020 (MobileBERT), section 3.3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)


def norm_of(config: MobileBertConfig, width: int) -> nn.Module:
    if config.normalization_type == "no_norm":
        return NoNorm(width)
    return nn.LayerNorm(width, eps=config.layer_norm_eps)


class TrigramEmbeddings(nn.Module):
    """Words in threes, projected, + position + token type, norm, dropout: (B, N) ids to (B, N, hidden_size).

    Source: Sun et al. 2020 (MobileBERT), section 3.2 (embedding factorization).
    """

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, width)
        self.token_type = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.projection = nn.Linear(3 * config.embedding_size, width)
        self.norm = norm_of(config, width)
        self.dropout = nn.Dropout(config.hidden_dropout_p)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        length, positions = input_ids.shape[1], self.position.num_embeddings
        if position_ids is None and cu_seqlens is not None:
            position_ids = sequence_positions(length, cu_seqlens)[1][None]
        elif position_ids is None:
            if length > positions:
                raise ValueError(f"input_ids must have at most {positions} columns, got {length}")
            position_ids = torch.arange(length, device=input_ids.device)[None]
        _checks.check_in_table("input_ids", input_ids, "word", self.word.weight)
        _checks.check_in_table("position_ids", position_ids, "position", self.position.weight)
        hidden = self.projection(trigrams(self.word(input_ids), cu_seqlens)) + self.position(position_ids)
        if self.token_type is not None:
            if token_type_ids is None:
                hidden = hidden + self.token_type.weight[0]
            else:
                _checks.check_in_table("token_type_ids", token_type_ids, "token_type", self.token_type.weight)
                hidden = hidden + self.token_type(token_type_ids)
        return self.dropout(self.norm(hidden))


def trigrams(words: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """(B, N, E) to (B, N, 3 E): [next, current, previous], 0 where a sequence has no such word."""
    padded = F.pad(words, (0, 0, 1, 1))
    following, previous = padded[:, 2:], padded[:, :-2]
    if cu_seqlens is not None:
        begins = sequence_positions(words.shape[1], cu_seqlens)[1] == 0
        ends = F.pad(begins[1:], (0, 1), value=True)[: words.shape[1]]
        following = following.masked_fill(ends[:, None], 0)
        previous = previous.masked_fill(begins[:, None], 0)
    return torch.cat([following, words, previous], dim=2)


class Bottleneck(nn.Module):
    """Linear from the width between layers to that inside one, and norm."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intra_bottleneck_size)
        self.norm = norm_of(config, config.intra_bottleneck_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.dense(hidden))


class BottleneckAttention(nn.Module):
    """Multi-head attention whose values may come from elsewhere than its queries and keys.

    Args:
        qk_size, value_size: widths of the two inputs.
        width: H * D, that of the output.
        num_heads: H.
        dropout_p: dropout on the probabilities while training.

    The projections are ``qk`` (in the order q, k), ``value`` and ``proj``.
    """

    def __init__(self, qk_size: int, value_size: int, width: int, num_heads: int, dropout_p: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout_p = dropout_p
        self.qk = nn.Linear(qk_size, 2 * width)
        self.value = nn.Linear(value_size, width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, qk_input: Tensor, value_input: Tensor, mask: Tensor | None = None, **rows: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, qk_size) and (B, N, value_size) to (B, N, width), and the scores or None."""
        parts = self.qk(qk_input).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        q, k = (part.transpose(1, 2) for part in parts)
        v = self.value(value_input).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        dropout_p = self.dropout_p if self.training else 0.0
        out, scores = attend(self, q, k, v, mask, **rows, dropout_p=dropout_p)
        return self.proj(out), scores


class FeedForward(nn.Module):
    """Linear up, activation, linear down, added to the input, norm."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.intra_bottleneck_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.intra_bottleneck_size)
        self.norm = norm_of(config, config.intra_bottleneck_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + self.down(self.activation(self.up(hidden))))


class MobileBertLayer(nn.Module):
    """One block: into the bottleneck, attention, feed-forward networks, out of it, added to the input.

    Source: Sun et al. 2020 (MobileBERT), figure 1: (c) MobileBERT, (b) its teacher.
    """

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        outer, inner = config.hidden_size, config.intra_bottleneck_size
        self.use_bottleneck_attention = config.use_bottleneck_attention
        self.bottleneck = Bottleneck(config)
        self.qk_bottleneck = Bottleneck(config) if config.key_query_shared_bottleneck else None
        narrow = config.use_bottleneck_attention
        self.attention = BottleneckAttention(
            qk_size=inner if narrow or config.key_query_shared_bottleneck else outer,
            value_size=inner if narrow else outer,
            width=inner,
            num_heads=config.num_attention_heads,
            dropout_p=config.attention_dropout_p,
        )
        self.attention_norm = norm_of(config, inner)
        # apart, as in checkpoints
        self.ffn = nn.ModuleList(FeedForward(config) for _ in range(config.num_feedforward_networks - 1))
        self.last_ffn = FeedForward(config)
        self.output = nn.Linear(inner, outer)
        self.output_dropout = nn.Dropout(config.hidden_dropout_p)
        self.output_norm = norm_of(config, outer)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, return_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        inner = self.bottleneck(hidden)
        value_input = inner if self.use_bottleneck_attention else hidden
        qk_input = value_input if self.qk_bottleneck is None else self.qk_bottleneck(hidden)
        attended, scores = self.attention(
            qk_input, value_input, mask, cu_seqlens=cu_seqlens, return_scores=return_scores
        )
        inner = self.attention_norm(inner + attended)
        for ffn in (*self.ffn, self.last_ffn):
            inner = ffn(inner)
        return self.output_norm(hidden + self.output_dropout(self.output(inner))), scores


class MobileBertModel(Encoder):
    """The encoder of MobileBERT.

    The trigram at a real token also takes the words in the columns beside it that ``mask`` leaves out, as
    transformers' model and MobileBERT's code do: [PAD] after a sequence changes its last token, unless the
    table's row of it is 0, as in a new model. In the released one it is not. Packed rows and ``unpad=True``
    have 0 at the ends of a sequence, and so equal the sequence alone; to have padded batches equal them::

        with torch.no_grad():
            model.embeddings.word.weight[model.config.pad_token_id] = 0

    Masked keys take no part in attention, as everywhere in this package and in transformers; MobileBERT's
    TensorFlow code multiplies scores by the mask and adds -6 where it is 0, so that they keep a small part.

    Without LayerNorm activations grow past the range of fp16: run it in bf16 or fp32.

    transformers' model computes the same; of layouts that MobileBERT was not released in it lacks queries and
    keys from the layer's input (the teacher), whose files it refuses for their shapes, and in place of
    ``layer_norm_eps`` it has 1e-5 in two of the places where the normalization is ``layer_norm``.

    Args:
        config: sizes; ``config.pooler`` adds BERT's pooler, tanh of a linear layer over the first token.

    Source: Sun et al. 2020 (MobileBERT).
    """

    config_class = MobileBertConfig

    def __init__(self, config: MobileBertConfig) -> None:
        layers = (MobileBertLayer(config) for _ in range(config.num_hidden_layers))
        super().__init__(config, TrigramEmbeddings(config), layers)


class MobileBertForMaskedLM(MaskedLM):
    """An encoder and a masked language model's head: linear, activation, LayerNorm, decoder.

    The decoder is the word table (vocab_size, E) beside further columns (vocab_size, hidden_size - E) of its
    own; ``logits`` are (B, N, vocab_size).

    Where only some rows are wanted, run ``model.encoder`` and
    ``model.head(hidden[rows], model.decoder_weight())``.
    """

    config_class = MobileBertConfig
    encoder_class = MobileBertModel

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__(config, decoder_size=config.hidden_size)
        self.config = config
        # the columns, transposed as in checkpoints: (hidden_size - E, vocab_size)
        self.extra = nn.Linear(config.vocab_size, config.hidden_size - config.embedding_size, bias=False)
        initialize(self.extra, config)

    def decoder_weight(self) -> Tensor:
        """(vocab_size, hidden_size): the word table beside the head's own columns."""
        return torch.cat([super().decoder_weight(), self.extra.weight.T], dim=1)


class _OverTheFirstToken(WithHead):
    """An encoder and one linear layer over the first token, pooled where ``config.pooler`` says so."""

    config_class = MobileBertConfig
    encoder_class = MobileBertModel

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__(config)
        self.config = config
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if config.pooler else None
        if self.dense is not None:
            initialize(self.dense, config)

    def pool(self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """(number of sequences, hidden_size): the first token, through linear and tanh with a pooler."""
        first = first_tokens(hidden, mask, cu_seqlens)
        return first if self.dense is None else self.dense(first).tanh()


class MobileBertForSequenceClassification(_OverTheFirstToken):
    """An encoder and a classifier over the first token: dropout, linear.

    ``pooler_output`` is what the dropout takes: the first token as it is, in the released model, or through
    linear and tanh where ``config.pooler`` says so. ``logits`` are (number of sequences, num_labels).
    """

    hf_name = "ForSequenceClassification"

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout_p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        initialize(self.classifier, config)

    def predict(self, encoded: EncoderOutput, mask: Tensor | None, cu_seqlens: Tensor | None) -> HeadOutput:
        pooled = self.pool(encoded.last_hidden_state, mask, cu_seqlens)
        logits = self.classifier(self.dropout(pooled))
        return HeadOutput(**{**vars(encoded), "pooler_output": pooled}, logits=logits)


class MobileBertForNextSentencePrediction(_OverTheFirstToken):
    """An encoder and BERT's next sentence head: linear over the first token, pooled as in classification.

    ``logits`` are (number of sequences, 2), of which 1 says that the second segment is a random one.
    """

    hf_name = "ForNextSentencePrediction"

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        initialize(self.next_sentence, config)

    def predict(self, encoded: EncoderOutput, mask: Tensor | None, cu_seqlens: Tensor | None) -> HeadOutput:
        pooled = self.pool(encoded.last_hidden_state, mask, cu_seqlens)
        return HeadOutput(**{**vars(encoded), "pooler_output": pooled}, logits=self.next_sentence(pooled))


@dataclass(kw_only=True)
class MobileBertPreTrainingOutput(HeadOutput):
    """``logits`` (B, N, vocab_size) of the masked language model, and those of the next sentence."""

    next_sentence_logits: Tensor  # (number of sequences, 2): the next one, a random one


class MobileBertForPreTraining(MobileBertForMaskedLM, _OverTheFirstToken):
    """An encoder with both heads of pretraining: masked language model and next sentence.

    Source: Sun et al. 2020 (MobileBERT), section 3.4.
    """

    hf_name = "ForPreTraining"

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        initialize(self.next_sentence, config)

    def predict(
        self, encoded: EncoderOutput, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> MobileBertPreTrainingOutput:
        pooled = self.pool(encoded.last_hidden_state, mask, cu_seqlens)
        output = {**vars(super().predict(encoded, mask, cu_seqlens)), "pooler_output": pooled}
        return MobileBertPreTrainingOutput(**output, next_sentence_logits=self.next_sentence(pooled))

    def answer(self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """(number of sequences, 2): the logits of the next sentence from the last hidden states."""
        return self.next_sentence(self.pool(hidden, mask, cu_seqlens))
