"""BERT, RoBERTa and DistilBERT over :func:`bertops.attention`: the encoder and two heads."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertops.models.checkpoint import Checkpoint, load_weights, source_names
from bertops.models.config import ACTIVATIONS, BertConfig
from bertops.models.rows import check_ids, check_range, count_positions, first_tokens, run_unpadded
from bertops.nn import Attention
from bertops.ops import _checks

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class EncoderOutput:
    """What an encoder returns. Rows of masked tokens hold nothing of meaning; with ``unpad`` they are 0."""

    last_hidden_state: Tensor  # (B, N, hidden_size), packed (1, T, hidden_size)
    pooler_output: Tensor | None = None  # (number of sequences, hidden_size)
    hidden_states: tuple[Tensor, ...] | None = None  # the embeddings, then every layer
    scores: tuple[Tensor, ...] | None = None  # of every layer (B, H, N, N), packed (1, H, T, T)


@dataclass(kw_only=True)
class HeadOutput(EncoderOutput):
    """An encoder's output and the head's ``logits``.

    (number of sequences, num_labels) for classification, (B, N, vocab_size) for masked language modelling.
    """

    logits: Tensor


class Embeddings(nn.Module):
    """Word + position + token type rows, LayerNorm, dropout: (B, N) ids in, (B, N, hidden_size) out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, pad = config.hidden_size, config.pad_token_id
        self.word = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        pad_position = config.position_offset - 1 if config.position_offset else None
        self.position = nn.Embedding(config.max_position_embeddings, width, padding_idx=pad_position)
        self.token_type = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_p)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor) -> Tensor:
        hidden = self.word(input_ids) + self.position(position_ids)
        if self.token_type is not None:
            hidden = hidden + (
                self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids)
            )
        return self.dropout(self.norm(hidden))


class Layer(nn.Module):
    """One post-LayerNorm block: attention, then feed-forward, each added to its input and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = Attention(width, config.num_attention_heads, config.attention_dropout_p)
        self.attention_dropout = nn.Dropout(config.attention_output_dropout_p)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.output_dropout = nn.Dropout(config.hidden_dropout_p)
        self.output_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(
        self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, return_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        attended = self.attention(hidden, mask, cu_seqlens=cu_seqlens, return_scores=return_scores)
        attended, scores = attended if return_scores else (attended, None)
        hidden = self.attention_norm(hidden + self.attention_dropout(attended))
        output = self.down(self.activation(self.up(hidden)))
        return self.output_norm(hidden + self.output_dropout(output)), scores


class BertModel(nn.Module):
    """The encoder of BERT, RoBERTa and DistilBERT.

    Args:
        config: sizes and conventions; ``config.pooler`` adds BERT's pooler, tanh of a linear layer over the
            first token.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if config.pooler else None
        initialize(self, config)

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> "BertModel":
        """The encoder of a Hugging Face checkpoint, with or without a head, in evaluation mode.

        A head's tensors are left out, and a checkpoint without a pooler gives a model without one.

        Args:
            folder_or_hub_id: a folder with ``config.json`` and safetensors, or the id of a model on the hub.
            dtype: of the parameters.
            changes: fields of :class:`BertConfig` to replace, such as ``hidden_dropout_p=0.0``.

        Raises:
            FileNotFoundError, ImportError: the files, or a package to read them, are missing; says which.
            ValueError: the model is of another kind, or its tensors do not fit; names them.
        """
        with Checkpoint(folder_or_hub_id) as checkpoint:
            pooler = "pooler.dense.weight" in checkpoint
            config = replace(checkpoint.config, **{"pooler": pooler, **changes})
            with torch.device("meta"):
                model = cls(config)
            load_weights(model, checkpoint, dtype)
        return model.eval()

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        unpad: bool = False,
        output_hidden_states: bool = False,
        output_scores: bool = False,
    ) -> EncoderOutput:
        """Runs on a padded batch, on packed rows, or packs a padded batch itself.

        Args:
            input_ids: (B, N), int64 or int32.
            mask: (B, N), bool or integer, true for a real token, in any pattern; all are real without it.
            token_type_ids: (B, N) or (1, N), 0 by default.
            position_ids: (B, N) or (1, N); by default BERT and DistilBERT count columns, so left-padded rows
                want their own, and RoBERTa counts the tokens that are not padding.
            cu_seqlens: int32 (number of sequences + 1): the sequences stand end to end in B = 1, positions
                start anew in each. Excludes ``mask``.
            unpad: pack the real tokens of the padded batch, run on them alone and put the results back: the
                same numbers at real tokens, 0 elsewhere, at the cost of the real tokens only. Reads the
                number of tokens back from the device.
            output_hidden_states: also return the embeddings and the output of every layer.
            output_scores: also return every layer's score map before softmax, 0 at masked pairs.

        Raises:
            ValueError, TypeError: an argument does not fit, or a position passes the end of the position
                table (off the CPU: where the shapes tell). Names the argument.
        """
        outputs = {"output_hidden_states": output_hidden_states, "output_scores": output_scores}
        if unpad:
            refuse_packed(cu_seqlens)
            return run_unpadded(self, self.config, input_ids, mask, token_type_ids, position_ids, **outputs)
        hidden = self.embed(input_ids, mask, token_type_ids, position_ids, cu_seqlens)
        mask = None if mask is None else mask != 0
        states, scores = [hidden], []
        for layer in self.layers:
            hidden, layer_scores = layer(hidden, mask, cu_seqlens, output_scores)
            states.append(hidden)
            scores.append(layer_scores)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(first_tokens(hidden, mask, cu_seqlens)).tanh()
        return EncoderOutput(
            last_hidden_state=hidden,
            pooler_output=pooled,
            hidden_states=tuple(states) if output_hidden_states else None,
            scores=tuple(scores) if output_scores else None,
        )

    def embed(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Checks the arguments of :meth:`forward`; returns what the first layer takes (B, N, hidden_size)."""
        check_ids(input_ids, token_type_ids, position_ids)
        _checks.check_rows(mask, cu_seqlens, input_ids[:, None, :, None])
        position_ids = self._check_tables(input_ids, token_type_ids, position_ids, cu_seqlens)
        return self.embeddings(input_ids, token_type_ids, position_ids)

    def _check_tables(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """Every id has its row; returns the position ids."""
        config = self.config
        check_range("input_ids", input_ids, config.vocab_size, "vocab_size")
        if token_type_ids is not None:
            if config.type_vocab_size == 0:
                raise ValueError(f"token_type_ids must be None: {config.family} has no token types")
            check_range("token_type_ids", token_type_ids, config.type_vocab_size, "type_vocab_size")
        rows = config.max_position_embeddings
        unsettled = False
        if position_ids is None:
            position_ids = count_positions(input_ids, config, cu_seqlens)
            unsettled = cu_seqlens is None and input_ids.shape[1] + config.position_offset > rows
        check_range("position_ids", position_ids, rows, "max_position_embeddings", read=unsettled)
        return position_ids


class _WithHead(nn.Module):
    """An encoder, ``self.encoder``, and a head in whatever other modules there are."""

    config: BertConfig
    encoder: BertModel

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder_or_hub_id: str | Path,
        *,
        new_head: bool = False,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> Model:
        """The model of a Hugging Face checkpoint that has this head, in evaluation mode.

        Args:
            folder_or_hub_id: a folder with ``config.json`` and safetensors, or the id of a model on the hub.
            new_head: start the head from random values, as fine-tuning does; BERT's classifier still takes
                the checkpoint's pooler where there is one.
            dtype: of the parameters.
            changes: fields of :class:`BertConfig` to replace, such as ``num_labels=3``.

        Raises:
            FileNotFoundError, ImportError: the files, or a package to read them, are missing; says which.
            ValueError: the model is of another kind, or its tensors do not fit; names them.
        """
        with Checkpoint(folder_or_hub_id) as checkpoint:
            config = replace(checkpoint.config, **changes)

            def is_new(name: str) -> bool:
                if not new_head or name.startswith("encoder."):
                    return False
                source = source_names(name, config.family)[0]
                return not (source.startswith("pooler.") and source in checkpoint)

            with torch.device("meta"):
                model = cls(config)
            load_weights(model, checkpoint, dtype, is_new)
        for module in model.modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False).to(dtype)
                initialize(module, config)
        return model.eval()

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        unpad: bool = False,
        **outputs: bool,
    ) -> HeadOutput:
        """Takes what :meth:`BertModel.forward` takes, and adds ``logits``."""
        if unpad:
            refuse_packed(cu_seqlens)
            return run_unpadded(self, self.config, input_ids, mask, token_type_ids, position_ids, **outputs)
        encoded = self.encoder(
            input_ids, mask, token_type_ids, position_ids, cu_seqlens=cu_seqlens, **outputs
        )
        return self.predict(encoded, mask, cu_seqlens)

    def predict(self, encoded: EncoderOutput, mask: Tensor | None, cu_seqlens: Tensor | None) -> HeadOutput:
        raise NotImplementedError


class BertForSequenceClassification(_WithHead):
    """An encoder and a classifier over the first token.

    BERT: linear, tanh, dropout, linear. RoBERTa: the same after one more dropout. DistilBERT: linear, ReLU,
    dropout, linear. ``pooler_output`` is what comes out of the activation; ``logits`` are
    (number of sequences, num_labels).
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config = replace(config, pooler=False)
        self.encoder = BertModel(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout_p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.activation = torch.relu if config.family == "distilbert" else torch.tanh
        initialize(self.dense, config)
        initialize(self.classifier, config)

    def predict(self, encoded: EncoderOutput, mask: Tensor | None, cu_seqlens: Tensor | None) -> HeadOutput:
        first = first_tokens(encoded.last_hidden_state, mask, cu_seqlens)
        if self.config.family == "roberta":
            first = self.dropout(first)
        pooled = self.activation(self.dense(first))
        logits = self.classifier(self.dropout(pooled))
        return HeadOutput(**{**vars(encoded), "pooler_output": pooled}, logits=logits)


class MaskedLMHead(nn.Module):
    """Linear, activation, LayerNorm, then the word embedding as decoder: (..., hidden_size) to (..., V)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.activation = ACTIVATIONS["gelu" if config.family == "roberta" else config.hidden_act]

    def forward(self, hidden: Tensor, word: Tensor) -> Tensor:
        return F.linear(self.norm(self.activation(self.dense(hidden))), word, self.bias)


class BertForMaskedLM(_WithHead):
    """An encoder and a masked language model's head, whose decoder is the word embedding.

    ``logits`` are (B, N, vocab_size).

    Where only some rows are wanted, run ``model.encoder`` and
    ``model.head(hidden[rows], model.encoder.embeddings.word.weight)``.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        if not config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be true: a decoder of its own is not supported")
        self.config = config = replace(config, pooler=False)
        self.encoder = BertModel(config)
        self.head = MaskedLMHead(config)
        initialize(self.head, config)

    def predict(self, encoded: EncoderOutput, mask: Tensor | None, cu_seqlens: Tensor | None) -> HeadOutput:
        logits = self.head(encoded.last_hidden_state, self.encoder.embeddings.word.weight)
        return HeadOutput(**vars(encoded), logits=logits)


def refuse_packed(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens does not go with unpad: the rows are packed already")


@torch.no_grad()
def initialize(module: nn.Module, config: BertConfig) -> None:
    """BERT's start: weights from N(0, initializer_range), biases and padding rows 0, LayerNorms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0.0, config.initializer_range)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.weight[part.padding_idx].zero_()
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        if isinstance(part, nn.Linear | MaskedLMHead) and part.bias is not None:
            part.bias.zero_()
