"""What a Hugging Face config.json calls the fields of ours, family by family."""

from collections.abc import Mapping
from typing import Any

# model_type of a Hugging Face config.json -> the family whose embeddings, heads and names it uses
FAMILIES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "distilbert": "distilbert",
    "albert": "albert",
    "mobilebert": "mobilebert",
}

REQUIRED = object()

# Ours -> the file's key and what it means where the key is missing.
_COMMON_KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", REQUIRED),
    "max_position_embeddings": ("max_position_embeddings", REQUIRED),
    "pad_token_id": ("pad_token_id", 0),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_word_embeddings", True),
}
_BERT_KEYS = _COMMON_KEYS | {
    "hidden_size": ("hidden_size", REQUIRED),
    "num_hidden_layers": ("num_hidden_layers", REQUIRED),
    "num_attention_heads": ("num_attention_heads", REQUIRED),
    "intermediate_size": ("intermediate_size", REQUIRED),
    "hidden_act": ("hidden_act", "gelu"),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "type_vocab_size": ("type_vocab_size", 2),
    "hidden_dropout_p": ("hidden_dropout_prob", 0.1),
    "attention_dropout_p": ("attention_probs_dropout_prob", 0.1),
    "classifier_dropout_p": ("classifier_dropout", None),  # None: hidden_dropout_prob
}
KEYS = {
    "bert": _BERT_KEYS,
    "roberta": _BERT_KEYS | {"pad_token_id": ("pad_token_id", 1)},
    "distilbert": _COMMON_KEYS
    | {
        "hidden_size": ("dim", REQUIRED),
        "num_hidden_layers": ("n_layers", REQUIRED),
        "num_attention_heads": ("n_heads", REQUIRED),
        "intermediate_size": ("hidden_dim", REQUIRED),
        "hidden_act": ("activation", "gelu"),
        "hidden_dropout_p": ("dropout", 0.1),
        "attention_dropout_p": ("attention_dropout", 0.1),
        "classifier_dropout_p": ("seq_classif_dropout", 0.2),
    },
    "albert": _BERT_KEYS
    | {
        "embedding_size": ("embedding_size", 128),
        "num_hidden_groups": ("num_hidden_groups", 1),
        "inner_group_num": ("inner_group_num", 1),
        "hidden_act": ("hidden_act", "gelu_new"),
        "hidden_dropout_p": ("hidden_dropout_prob", 0.0),
        "attention_dropout_p": ("attention_probs_dropout_prob", 0.0),
        "classifier_dropout_p": ("classifier_dropout_prob", 0.1),
    },
    "mobilebert": _BERT_KEYS
    | {
        "embedding_size": ("embedding_size", 128),
        "intra_bottleneck_size": ("intra_bottleneck_size", 128),
        "use_bottleneck_attention": ("use_bottleneck_attention", False),
        "key_query_shared_bottleneck": ("key_query_shared_bottleneck", True),
        "num_feedforward_networks": ("num_feedforward_networks", 4),
        "normalization_type": ("normalization_type", "no_norm"),
        "hidden_act": ("hidden_act", "relu"),
        "hidden_dropout_p": ("hidden_dropout_prob", 0.0),
        "pooler": ("classifier_activation", True),
    },
}

OURS = "bertops"  # key of the fields for which the file has no other place


def read_fields(config: Mapping[str, Any], model_types: tuple[str, ...]) -> dict[str, Any]:
    """The fields of one of our configs that a ``config.json`` gives, ``family`` among them.

    Raises:
        ValueError: ``model_type`` is none of ``model_types``, a size is missing, or the model has a feature
            that our encoders lack (decoders, relative positions); names the key.
    """
    model_type = config.get("model_type")
    if model_type not in model_types:
        raise ValueError(f"model_type must be one of {', '.join(model_types)}, got {model_type!r}")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise ValueError("is_decoder and add_cross_attention must be false: this is an encoder")
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise ValueError(f"position_embedding_type must be 'absolute', got {positions!r}")
    family = FAMILIES[model_type]
    values = {name: _value(config, *key) for name, key in KEYS[family].items()}
    values |= {"family": family, "attention_output_dropout_p": values["hidden_dropout_p"]}
    if family == "distilbert":
        values |= {
            "layer_norm_eps": 1e-12,
            "type_vocab_size": 0,
            "attention_output_dropout_p": 0.0,
            "pooler": False,
        }
    if values["classifier_dropout_p"] is None:
        values["classifier_dropout_p"] = values["hidden_dropout_p"]
    if family == "roberta":
        if values["pad_token_id"] is None:
            raise ValueError("pad_token_id must be set for RoBERTa: positions are counted from it")
        values["position_offset"] = values["pad_token_id"] + 1
    if family == "albert":  # transformers projects between equal widths too
        values["always_project"] = values["embedding_size"] == values["hidden_size"]
    if family == "mobilebert":
        for key in ("use_bottleneck", "trigram_input"):
            if not config.get(key, True):
                raise ValueError(f"{key} must be true: a MobileBERT without it is not supported")
        values["attention_output_dropout_p"] = 0.0
    labels = config.get("id2label")
    values["num_labels"] = len(labels) if labels is not None else config.get("num_labels", 2)
    return values | config.get(OURS, {})


def write_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` of our config's fields."""
    family = values["family"]
    config = {key: values[name] for name, (key, _) in KEYS[family].items()}
    labels = [f"LABEL_{i}" for i in range(values["num_labels"])]
    return {
        "model_type": family,
        **config,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    if default is not REQUIRED:
        return config.get(key, default)
    if key not in config:
        raise ValueError(f"config has no {key!r}; its keys are {', '.join(sorted(config))}")
    return int(config[key])
