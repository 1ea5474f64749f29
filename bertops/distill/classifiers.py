"""Classifiers in folders: read with their labels and tokenizer, cut to students, written for transformers."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bertops._files import write_whole
from bertops.distill.initialize import init_student_from_teacher
from bertops.distill.settings import StudentSettings
from bertops.models import (
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BiLSTMClassifier,
    FastBert,
    MobileBertForMaskedLM,
    MobileBertForSequenceClassification,
    bilstm,
    fastbert,
    sizes,
)
from bertops.models.checkpoint import CONFIG, Checkpoint, read_json, resolve_folder, weight_files
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

LayerMap = Callable[[int, int], Sequence[int]]


def load_encoder(model: str | Path, labels: Sequence[str], seed: int) -> Any:
    """A pretrained encoder with a new head for ``labels``."""
    folder = resolve_folder(model)
    torch.manual_seed(seed)
    return classifier_class(encoder_config(folder)).from_pretrained(
        folder, new_head=True, num_labels=len(labels)
    )


def load_classifier(model: str | Path, labels: Sequence[str]) -> Any:
    """A model that knows the task: a transformer with its head, a BiLSTM, or a FastBERT with its exits.

    Raises:
        ValueError: the folder has no classifier, or one of other labels; says which.
    """
    folder = resolve_folder(model)
    config = read_json(folder / CONFIG)
    check_labels(folder, config, labels)
    if config.get("model_type") == bilstm.MODEL_TYPE:
        return BiLSTMClassifier.from_pretrained(folder)
    if (folder / fastbert.EXITS).exists():
        return FastBert.from_pretrained(folder)
    with Checkpoint(folder, EncoderConfig) as checkpoint:
        if not any(name.startswith("classifier.") for name in checkpoint.names()):
            raise ValueError(
                f"{folder} has no classifier, only an encoder: fine-tune it first, with "
                f"python -m bertops finetune --model {model} --data ..."
            )
    return classifier_class(encoder_config(folder)).from_pretrained(folder)


def load_masked_lm(folder: Path) -> Any:
    """A masked language model in evaluation mode.

    Raises:
        ValueError: the folder holds none; names what is missing.
    """
    config = encoder_config(folder)
    return next(cls for cls in MASKED_LMS if isinstance(config, cls.config_class)).from_pretrained(folder)


def classifier_class(config: EncoderConfig) -> Any:
    return next(cls for cls in CLASSIFIERS if isinstance(config, cls.config_class))


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


def new_student(teacher: Any, settings: StudentSettings, labels: Sequence[str], start: LayerMap) -> Any:
    """The student of ``settings``, in training mode; see :func:`cut` and :func:`sized`.

    Args:
        teacher: what it learns from.
        settings: also the seed of what starts at random, the head at least.
        labels: of the task.
        start: the recipe's choice of teacher layers, from the numbers of layers of student and teacher.

    Raises:
        ValueError: no such size, or the student does not fit the teacher; says what.
    """
    torch.manual_seed(settings.seed)
    if settings.student:
        return load_classifier(settings.student, labels).train()
    if settings.size:
        return sized(settings.size, teacher.config, labels)
    return cut(teacher, settings.layers, settings.start, labels, start)


def cut(model: Any, count: int, chosen: str, labels: Sequence[str], start: LayerMap) -> Any:
    """A model with a new head on ``count`` layers of ``model``: the ``chosen``, or those that ``start`` maps.

    Args:
        chosen: layers counted from 1, such as ``2,4,6``, or nothing.
    """
    if count < 1:
        raise ValueError(f"layers must be at least 1, got {count}")
    try:
        layers = [int(number) for number in chosen.split(",")] if chosen else None
    except ValueError:
        raise ValueError(f"start must be layers such as 2,4,6, got {chosen!r}") from None
    config = replace(model.config, num_hidden_layers=count, num_labels=len(labels))
    student = classifier_class(config)(config)
    init_student_from_teacher(student, model, layers or start(count, len(model.encoder.layers)))
    return student.train()


def sized(name: str, teacher: EncoderConfig, labels: Sequence[str]) -> Any:
    """A model of a published size with random weights that reads the teacher's tokens."""
    known = {key: value for key, value in vars(sizes).items() if isinstance(value, EncoderConfig)}
    if name not in known:
        raise ValueError(f"size must be one of {', '.join(known)}, got {name!r}")
    config = replace(
        known[name],
        vocab_size=teacher.vocab_size,
        pad_token_id=teacher.pad_token_id,
        num_labels=len(labels),
    )
    return classifier_class(config)(config).train()


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
    longest = getattr(config, "max_position_embeddings", max_length) - getattr(config, "position_offset", 0)
    if max_length > longest:
        raise ValueError(f"max_length must be at most the model's {longest} positions, got {max_length}")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


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
    for name in (TOKENIZER, *BESIDE_IT):
        if (tokenizer_of / name).exists():
            shutil.copyfile(tokenizer_of / name, folder / name)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the tensors' files: what decides whether a run may go on."""
    digest = sha256()
    for path in weight_files(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()
