"""Models in folders: read with their labels and tokenizer, and written for transformers."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bertops._files import write_whole
from bertops.models import (
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    AlbertModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BiLSTMClassifier,
    FastBert,
    MobileBertConfig,
    MobileBertForMaskedLM,
    MobileBertForPreTraining,
    MobileBertForSequenceClassification,
    MobileBertModel,
    bilstm,
    fastbert,
)
from bertops.models.checkpoint import (
    CONFIG,
    Checkpoint,
    read_json,
    resolve_folder,
    source_names,
    weight_files,
)
from bertops.models.config import EncoderConfig, config_from_hf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
BESIDE_IT = ("tokenizer_config.json", "special_tokens_map.json")
CLASSIFIERS: tuple[Any, ...] = (
    BertForSequenceClassification,
    AlbertForSequenceClassification,
    MobileBertForSequenceClassification,
)
MASKED_LMS: tuple[Any, ...] = (BertForMaskedLM, AlbertForMaskedLM, MobileBertForMaskedLM)
ENCODERS: tuple[Any, ...] = (BertModel, AlbertModel, MobileBertModel)


def load_encoder(model: str | Path, labels: Sequence[str], seed: int) -> Any:
    """A pretrained encoder with a new head for ``labels``."""
    folder = resolve_folder(model)
    torch.manual_seed(seed)
    return class_of(encoder_config(folder), CLASSIFIERS).from_pretrained(
        folder, new_head=True, num_labels=len(labels)
    )


def load_student(model: str | Path, labels: Sequence[str], seed: int) -> Any:
    """A classifier, or an encoder that was distilled before the task, with a new head."""
    known = has_classifier(resolve_folder(model))
    return load_classifier(model, labels) if known else load_encoder(model, labels, seed)


def new_classifier(config: EncoderConfig, labels: Sequence[str]) -> Any:
    config = replace(config, num_labels=len(labels))
    return class_of(config, CLASSIFIERS)(config)


def load_classifier(model: str | Path, labels: Sequence[str]) -> Any:
    """A model that knows the task: a transformer with its head, a BiLSTM, or a FastBERT with its exits.

    Raises:
        ValueError: the folder has no classifier, or one of other labels; says which.
    """
    folder = resolve_folder(model)
    config = read_json(folder / CONFIG)
    check_labels(folder, config, labels)
    if not has_classifier(folder):
        raise ValueError(
            f"{folder} has no classifier, only an encoder: fine-tune it first, with "
            f"python -m bertops finetune --model {model} --data ..."
        )
    if config.get("model_type") == bilstm.MODEL_TYPE:
        return BiLSTMClassifier.from_pretrained(folder)
    if (folder / fastbert.EXITS).exists():
        return FastBert.from_pretrained(folder)
    return class_of(encoder_config(folder), CLASSIFIERS).from_pretrained(folder)


def has_classifier(folder: Path) -> bool:
    if (
        read_json(folder / CONFIG).get("model_type") == bilstm.MODEL_TYPE
        or (folder / fastbert.EXITS).exists()
    ):
        return True
    with Checkpoint(folder, EncoderConfig) as checkpoint:
        return any(name.startswith("classifier.") for name in checkpoint.names())


def load_masked_lm(folder: Path) -> Any:
    """A masked language model in evaluation mode.

    Raises:
        ValueError: the folder holds none.
    """
    with Checkpoint(folder, EncoderConfig) as checkpoint:
        config = checkpoint.config
        (head,) = source_names("head.dense.weight", config)
        if head not in checkpoint:
            raise ValueError(f"{folder} has no masked language model's head: it lacks {head}")
    return class_of(config, MASKED_LMS).from_pretrained(folder)


def load_pretrained(folder: Path) -> Any:
    """The same, with a head for the next sentence too where the folder holds a MobileBERT's.

    Raises:
        ValueError: there is no masked language model's head.
    """
    config = encoder_config(folder)
    if isinstance(config, MobileBertConfig):
        (head,) = source_names("next_sentence.weight", config)
        with Checkpoint(folder, EncoderConfig) as checkpoint:
            if head in checkpoint:
                return MobileBertForPreTraining.from_pretrained(folder)
    return load_masked_lm(folder)


def new_masked_lm(config: EncoderConfig) -> Any:
    return class_of(config, MASKED_LMS)(config)


def load_bare_encoder(folder: Path) -> Any:
    """The encoder of any model, without a pooler, in evaluation mode."""
    return class_of(encoder_config(folder), ENCODERS).from_pretrained(folder, pooler=False)


def new_encoder(config: EncoderConfig) -> Any:
    return class_of(config, ENCODERS)(replace(config, pooler=False))


def class_of(config: EncoderConfig, classes: Sequence[Any]) -> Any:
    return next(cls for cls in classes if isinstance(config, cls.config_class))


def encoder_config(folder: Path) -> EncoderConfig:
    return config_from_hf(read_json(folder / CONFIG))


def check_labels(folder: Path, config: dict[str, Any], labels: Sequence[str]) -> None:
    """The classes of a model and of a task: as many, and of the same names in the same order.

    transformers' LABEL_0, LABEL_1, ... on either side stand for any names.
    """
    known = label_names(config)
    if len(known) == len(labels):
        pairs = [(a, b) for a, b in zip(known, labels, strict=True) if a.lower() != b.lower()]
        if not pairs or _nameless(known) or _nameless(labels):
            return
    raise ValueError(
        f"{folder} knows the {len(known)} classes {', '.join(known)}, and the task has the {len(labels)} "
        f"classes {', '.join(labels)}: they must be the same, in the same order"
    )


def label_names(config: dict[str, Any]) -> list[str]:
    names = config.get("id2label") or {}
    if not names:
        return [f"LABEL_{i}" for i in range(config.get("num_labels", 2))]
    return [names[key] for key in sorted(names, key=int)]


def _nameless(labels: Sequence[str]) -> bool:
    return all(label == f"LABEL_{i}" for i, label in enumerate(labels))


def read_tokenizer(folder: Path, config: Any, max_length: int) -> "Tokenizer":
    """The folder's tokenizer, which cuts at ``max_length`` and pads nothing.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has more tokens than the model, or texts may be longer than the model's positions.
    """
    from tokenizers import Tokenizer

    if not (folder / TOKENIZER).exists():
        raise FileNotFoundError(f"{folder} has no {TOKENIZER}")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        raise ValueError(f"{folder / TOKENIZER} has {size} tokens, the model {config.vocab_size}")
    check_length(config, max_length)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def check_length(config: Any, max_length: int) -> None:
    longest = getattr(config, "max_position_embeddings", max_length) - getattr(config, "position_offset", 0)
    if max_length > longest:
        raise ValueError(f"max_length must be at most the model's {longest} positions, got {max_length}")


def same_tokens(folder: Path, other: Path) -> None:
    """Raises ValueError where the tokenizers of two folders give a text other ids."""
    vocabularies = [read_json(path / TOKENIZER)["model"]["vocab"] for path in (folder, other)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"the vocabularies of {folder} and {other} differ: teacher and student must read the same tokens"
        )


def save_classifier(model: Any, folder: Path, labels: Sequence[str], tokenizer_of: Path) -> None:
    """Writes model, labels and tokenizer; transformers loads it where it has the architecture."""
    model.save_pretrained(folder)
    config = read_json(folder / CONFIG)
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    config["label2id"] = {label: i for i, label in enumerate(labels)}
    write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    copy_tokenizer(tokenizer_of, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in (TOKENIZER, *BESIDE_IT):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the tensors' files: what decides whether a run may go on."""
    digest = sha256()
    for path in weight_files(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()
