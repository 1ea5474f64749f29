"""BERT, RoBERTa and DistilBERT."""

from bertops.models.config import BertConfig
from bertops.models.encoder import Encoder, Layer
from bertops.models.heads import MaskedLM, SequenceClassifier
from bertops.nn import FactorizedEmbedding


class BertModel(Encoder):
    """The encoder of BERT, RoBERTa and DistilBERT.

    Args:
        config: sizes and conventions; ``config.pooler`` adds BERT's pooler, tanh of a linear layer over the
            first token.
    """

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        embeddings = FactorizedEmbedding(
            config.vocab_size,
            config.hidden_size,
            num_positions=config.max_position_embeddings,
            num_token_types=config.type_vocab_size,
            padding_idx=config.pad_token_id,
            position_padding_idx=config.position_offset - 1 if config.position_offset else None,
            eps=config.layer_norm_eps,
            dropout_p=config.hidden_dropout_p,
        )
        super().__init__(config, embeddings, (Layer(config) for _ in range(config.num_hidden_layers)))


class BertForSequenceClassification(SequenceClassifier):
    __doc__ = SequenceClassifier.__doc__
    config_class = BertConfig
    encoder_class = BertModel


class BertForMaskedLM(MaskedLM):
    __doc__ = MaskedLM.__doc__
    config_class = BertConfig
    encoder_class = BertModel
