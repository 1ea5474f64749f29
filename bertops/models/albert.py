"""ALBERT: narrow tables with a projection, and layers that share parameters."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bertops.models.config import AlbertConfig
from bertops.models.encoder import Encoder, EncoderOutput, Layer, initialize
from bertops.models.heads import HeadOutput, MaskedLM, SequenceClassifier
from bertops.models.rows import first_tokens
from bertops.nn import FactorizedEmbedding


class AlbertModel(Encoder):
    """The encoder of ALBERT.

    ``layers`` holds every layer as often as it runs: modules that layers share are the same modules, whose
    parameters ``parameters()`` gives once and ``state_dict()`` under each of their names. Dropout follows the
    paper's code: after the feed-forward too, where transformers' ALBERT has none.

    Args:
        config: sizes and sharing; ``config.pooler`` adds the pooler, tanh of a linear layer over the first
            token.

    Source: Lan et al. 2020 (ALBERT), section 3.1.
    """

    config_class = AlbertConfig

    def __init__(self, config: AlbertConfig) -> None:
        embeddings = FactorizedEmbedding(
            config.vocab_size,
            config.embedding_size,
            config.hidden_size if config.projects else None,
            num_positions=config.max_position_embeddings,
            num_token_types=config.type_vocab_size,
            padding_idx=config.pad_token_id,
            eps=config.layer_norm_eps,
            dropout_p=config.hidden_dropout_p,
        )
        super().__init__(config, embeddings, shared_layers(config))


def shared_layers(config: AlbertConfig) -> list[Layer]:
    """Every layer in the order in which they run, the same object where all of it is shared."""
    layers: list[Layer] = []
    attentions: dict[object, Layer] = {}  # by what is the same for all layers that share one
    feed_forwards: dict[object, Layer] = {}
    whole: dict[object, Layer] = {}
    for i, place in enumerate(config.places()):
        attention = place if config.share in ("all", "attention") else i
        feed_forward = place if config.share in ("all", "ffn") else i
        if (attention, feed_forward) not in whole:
            layer = Layer(
                config,
                attention_of=attentions.get(attention),
                feed_forward_of=feed_forwards.get(feed_forward),
            )
            attentions.setdefault(attention, layer)
            feed_forwards.setdefault(feed_forward, layer)
            whole[attention, feed_forward] = layer
        layers.append(whole[attention, feed_forward])
    return layers


class AlbertForSequenceClassification(SequenceClassifier):
    __doc__ = SequenceClassifier.__doc__
    config_class = AlbertConfig
    encoder_class = AlbertModel


class AlbertForMaskedLM(MaskedLM):
    __doc__ = MaskedLM.__doc__
    config_class = AlbertConfig
    encoder_class = AlbertModel


@dataclass(kw_only=True)
class PreTrainingOutput(HeadOutput):
    """``logits`` (B, N, vocab_size) of the masked language model, and those of sentence order."""

    sop_logits: Tensor  # (number of sequences, 2): in order, swapped


class AlbertForPreTraining(AlbertForMaskedLM):
    """An encoder with ALBERT's two heads: masked language model and sentence order.

    Sentence order: linear, tanh, dropout, linear to two classes over the first token, of which 1 says that
    the two segments are swapped. ``pooler_output`` is what comes out of the tanh.

    Source: Lan et al. 2020 (ALBERT), section 3.1.
    """

    hf_name = "ForPreTraining"

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(replace(config, num_labels=2))
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout_p)
        self.sentence_order = nn.Linear(config.hidden_size, 2)
        initialize(self.dense, config)
        initialize(self.sentence_order, config)

    def predict(
        self, encoded: EncoderOutput, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> PreTrainingOutput:
        output = super().predict(encoded, mask, cu_seqlens)
        pooled = self.pool(encoded.last_hidden_state, mask, cu_seqlens)
        sop_logits = self.order(pooled)
        return PreTrainingOutput(**{**vars(output), "pooler_output": pooled}, sop_logits=sop_logits)

    def pool(self, hidden: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """(number of sequences, hidden_size): what sentence order is told from."""
        return torch.tanh(self.dense(first_tokens(hidden, mask, cu_seqlens)))

    def order(self, pooled: Tensor) -> Tensor:
        """(number of sequences, 2): the logits of sentence order."""
        return self.sentence_order(self.dropout(pooled))
