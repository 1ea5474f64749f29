"""The shape of a BERT, RoBERTa or DistilBERT encoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

# model_type of a Hugging Face config.json -> the family whose embeddings, heads and names it uses
FAMILIES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "distilbert": "distilbert",
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes, rates and conventions of an encoder; the defaults are BERT-base's.

    Args:
        family: ``bert``, ``roberta`` or ``distilbert``: which heads and which checkpoint names.
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: as in BERT.
        hidden_act: ``gelu`` (erf), ``gelu_new`` or ``gelu_pytorch_tanh`` (both tanh), ``relu``, ``silu``.
        layer_norm_eps: added to the variance.
        max_position_embeddings: rows of the position table, RoBERTa's unused first ones included.
        type_vocab_size: rows of the token type table, 0 for none (DistilBERT).
        pad_token_id: id whose embedding gets no gradient; RoBERTa does not count it as a position.
        position_offset: position of the first token. 0: positions are columns. Above 0 (RoBERTa:
            ``pad_token_id + 1``): positions count the tokens other than ``pad_token_id``, which stand at
            ``position_offset - 1``.
        hidden_dropout_p: dropout of the embeddings and of the feed-forward output.
        attention_dropout_p: dropout of the attention probabilities.
        attention_output_dropout_p: dropout of the attention block's output (DistilBERT: 0).
        classifier_dropout_p: dropout inside the classification head.
        num_labels: outputs of the classification head.
        initializer_range: standard deviation of new weights.
        tie_word_embeddings: the masked language model's decoder is the word embedding.
        pooler: :class:`bertops.models.BertModel` has a pooler (DistilBERT never has).

    Raises:
        ValueError: ``family`` or ``hidden_act`` is unknown, or ``position_offset`` lacks ``pad_token_id``.
    """

    family: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int | None = 0
    position_offset: int = 0
    hidden_dropout_p: float = 0.1
    attention_dropout_p: float = 0.1
    attention_output_dropout_p: float = 0.1
    classifier_dropout_p: float = 0.1
    num_labels: int = 2
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pooler: bool = True

    def __post_init__(self) -> None:
        families = sorted(set(FAMILIES.values()))
        if self.family not in families:
            raise ValueError(f"family must be one of {', '.join(families)}, got {self.family!r}")
        if self.position_offset and self.pad_token_id is None:
            raise ValueError("pad_token_id must be set where position_offset is: positions skip it")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
        """The same encoder as a Hugging Face ``config.json`` describes.

        Args:
            config: the file's content; ``model_type`` is bert, roberta, xlm-roberta, camembert or distilbert.

        Raises:
            ValueError: another model type, a size that is missing, or a feature that this encoder lacks
                (decoders, relative positions); names the key.
        """
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise ValueError("is_decoder and add_cross_attention must be false: this is an encoder")
        positions = config.get("position_embedding_type") or "absolute"
        if positions != "absolute":
            raise ValueError(f"position_embedding_type must be 'absolute', got {positions!r}")
        family = FAMILIES[model_type]
        values = _distilbert(config) if family == "distilbert" else _bert(config)
        if family == "roberta":
            if values["pad_token_id"] is None:
                raise ValueError("pad_token_id must be set for RoBERTa: positions are counted from it")
            values["position_offset"] = values["pad_token_id"] + 1
        labels = config.get("id2label")
        return cls(
            family=family,
            vocab_size=_size(config, "vocab_size"),
            max_position_embeddings=_size(config, "max_position_embeddings"),
            num_labels=len(labels) if labels is not None else config.get("num_labels", 2),
            initializer_range=config.get("initializer_range", 0.02),
            tie_word_embeddings=config.get("tie_word_embeddings", True),
            **values,
        )


def _bert(config: Mapping[str, Any]) -> dict[str, Any]:
    dropout = config.get("hidden_dropout_prob", 0.1)
    classifier_dropout = config.get("classifier_dropout")
    return {
        "hidden_size": _size(config, "hidden_size"),
        "num_hidden_layers": _size(config, "num_hidden_layers"),
        "num_attention_heads": _size(config, "num_attention_heads"),
        "intermediate_size": _size(config, "intermediate_size"),
        "hidden_act": config.get("hidden_act", "gelu"),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        "type_vocab_size": config.get("type_vocab_size", 2),
        "pad_token_id": config.get("pad_token_id", 0 if config["model_type"] == "bert" else 1),
        "hidden_dropout_p": dropout,
        "attention_dropout_p": config.get("attention_probs_dropout_prob", 0.1),
        "attention_output_dropout_p": dropout,
        "classifier_dropout_p": dropout if classifier_dropout is None else classifier_dropout,
    }


def _distilbert(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": _size(config, "dim"),
        "num_hidden_layers": _size(config, "n_layers"),
        "num_attention_heads": _size(config, "n_heads"),
        "intermediate_size": _size(config, "hidden_dim"),
        "hidden_act": config.get("activation", "gelu"),
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 0,
        "pad_token_id": config.get("pad_token_id", 0),
        "hidden_dropout_p": config.get("dropout", 0.1),
        "attention_dropout_p": config.get("attention_dropout", 0.1),
        "attention_output_dropout_p": 0.0,
        "classifier_dropout_p": config.get("seq_classif_dropout", 0.2),
        "pooler": False,
    }


def _size(config: Mapping[str, Any], key: str) -> int:
    if key not in config:
        raise ValueError(f"config has no {key!r}; its keys are {', '.join(sorted(config))}")
    return int(config[key])
