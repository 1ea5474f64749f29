"""Heads over an encoder, and how a model with one runs, loads and starts: for every family alike."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertops.models.checkpoint import Checkpoint, load_weights, source_names
from bertops.models.config import ACTIVATIONS, EncoderConfig
from bertops.models.encoder import Encoder, EncoderOutput, Pretrained, initialize, refuse_packed
from bertops.models.rows import first_tokens, run_unpadded

Model = TypeVar("Model", bound="WithHead")


@dataclass(kw_only=True)
class HeadOutput(EncoderOutput):
    """An encoder's output and the head's ``logits``.

    (number of sequences, num_labels) for classification, (B, N, vocab_size) for masked language modelling.
    """

    logits: Tensor


class WithHead(Pretrained):
    """An encoder, ``self.encoder``, and a head in whatever other modules there are."""

    encoder_class: ClassVar[type[Encoder]]

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = replace(config, pooler=False)  # where there is one, it is part of the head
        self.encoder = self.encoder_class(self.config)  # type: ignore[call-arg, arg-type]

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
            new_head: start the head from random values, as fine-tuning does; the classifiers of BERT and
                ALBERT still take the checkpoint's pooler where there is one.
            dtype: of the parameters.
            changes: fields of the config to replace, such as ``num_labels=3``.

        Raises:
            FileNotFoundError, ImportError: the files, or a package to read them, are missing; says which.
            ValueError: the model is of another kind, or its tensors do not fit; names them.
        """
        with Checkpoint(folder_or_hub_id, cls.config_class) as checkpoint:
            config = checkpoint.replace(**changes)

            def is_new(name: str) -> bool:
                if not new_head or name.startswith("encoder."):
                    return False
                source = source_names(name, config)[0]
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
    ) -> Any:
        """Takes what :meth:`Encoder.forward` takes; returns a :class:`HeadOutput`, which adds ``logits``."""
        if unpad:
            refuse_packed(cu_seqlens)
            return run_unpadded(self, self.config, input_ids, mask, token_type_ids, position_ids, **outputs)
        encoded = self.encoder(
            input_ids, mask, token_type_ids, position_ids, cu_seqlens=cu_seqlens, **outputs
        )
        return self.predict(encoded, mask, cu_seqlens)

    def predict(self, encoded: EncoderOutput, mask: Tensor | None, cu_seqlens: Tensor | None) -> HeadOutput:
        raise NotImplementedError


class SequenceClassifier(WithHead):
    """An encoder and a classifier over the first token.

    BERT and ALBERT: linear, tanh, dropout, linear. RoBERTa: the same after one more dropout. DistilBERT:
    linear, ReLU, dropout, linear. ``pooler_output`` is what comes out of the activation; ``logits`` are
    (number of sequences, num_labels).
    """

    hf_name = "ForSequenceClassification"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
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
    """Linear to the decoder's width, activation, LayerNorm, decoder: (..., hidden_size) to (..., vocab_size).

    The decoder is the word table, whose width is E, and which the caller gives.
    """

    def __init__(self, config: EncoderConfig, decoder_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, decoder_size)
        self.norm = nn.LayerNorm(decoder_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.activation = ACTIVATIONS["gelu" if config.family == "roberta" else config.hidden_act]

    def transform(self, hidden: Tensor) -> Tensor:
        """(..., width of the decoder): what the decoder takes."""
        return self.norm(self.activation(self.dense(hidden)))

    def forward(self, hidden: Tensor, decoder: Tensor) -> Tensor:
        return F.linear(self.transform(hidden), decoder, self.bias)


class MaskedLM(WithHead):
    """An encoder and a masked language model's head, whose decoder is the word embedding.

    ``logits`` are (B, N, vocab_size).

    Where only some rows are wanted, run ``model.encoder`` and
    ``model.head(hidden[rows], model.decoder_weight())``.
    """

    hf_name = "ForMaskedLM"

    def __init__(self, config: EncoderConfig, decoder_size: int | None = None) -> None:
        if not config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be true: a decoder of its own is not supported")
        super().__init__(config)
        width = self.encoder.embeddings.word.embedding_dim if decoder_size is None else decoder_size
        self.head = MaskedLMHead(config, width)
        initialize(self.head, config)

    def decoder_weight(self) -> Tensor:
        """(vocab_size, width of the head): what turns the head's rows into logits."""
        return self.encoder.embeddings.word.weight

    def predict(self, encoded: EncoderOutput, mask: Tensor | None, cu_seqlens: Tensor | None) -> HeadOutput:
        logits = self.head(encoded.last_hidden_state, self.decoder_weight())
        return HeadOutput(**vars(encoded), logits=logits)
