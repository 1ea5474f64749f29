"""A classification task: labelled texts to train on and to measure on, from a folder or from the hub."""

import os
import re
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from bertops.data.tsv import read_tsv

TRAIN, DEV, LABELS = "train.tsv", "dev.tsv", "labels.txt"
DEV_SPLITS = ("validation", "validation_matched", "test")
NOT_TEXT = ("label", "idx")


@dataclass(frozen=True)
class TaskTexts:
    """Texts with their labels; ``pairs`` holds the second text of each where there are two."""

    texts: list[str]
    labels: list[int]
    pairs: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def all_texts(self) -> list[str]:
        return [*self.texts, *(self.pairs or ())]

    def first(self, count: int) -> "TaskTexts":
        pairs = None if self.pairs is None else self.pairs[:count]
        return TaskTexts(self.texts[:count], self.labels[:count], pairs)


@dataclass(frozen=True)
class Task:
    """What a model learns: names of the classes, examples to train on, and others that only measure."""

    name: str
    labels: list[str]
    train: TaskTexts
    dev: TaskTexts

    def fingerprint(self) -> dict[str, Any]:
        """Sizes and a hash of all of it: what decides whether a run may go on."""
        digest = sha256("\t".join(self.labels).encode())
        for part in (self.train, self.dev):
            for row in zip(part.texts, part.labels, part.pairs or part.texts, strict=True):
                digest.update(repr(row).encode())
        sizes = {"name": self.name, "train": len(self.train), "dev": len(self.dev)}
        return {**sizes, "labels": self.labels, "sha256": digest.hexdigest()}


def read_task(data: str | os.PathLike[str]) -> Task:
    """Reads a folder, or a data set of the Hugging Face hub where there is no such folder.

    Args:
        data: a folder with ``train.tsv`` and ``dev.tsv`` as :func:`bertops.data.read_tsv` takes them and,
            perhaps, ``labels.txt``, a name a line; without it classes are called as transformers does,
            ``LABEL_0`` and so on. Or the name of a data set, perhaps with its owner before it and, behind a
            slash, its configuration, such as ``glue/sst2``, which the package ``datasets`` fetches: its
            splits ``train`` and ``validation`` (``validation_matched``, or ``test`` where it has no other),
            its class labels and its one or two columns of text.

    Raises:
        FileNotFoundError: the folder, or one of its files, is missing.
        ImportError: not a folder, and ``datasets`` is not installed.
        ValueError: a file has a bad row or none, or a label without a name; names the file and the line.
    """
    folder = Path(data)
    if folder.is_dir():
        return read_folder(folder)
    if not isinstance(data, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", data):
        raise FileNotFoundError(f"no folder {data}, and it is not the name of a data set on the hub")
    return read_hub(data)


def read_folder(folder: Path) -> Task:
    parts = []
    for name in (TRAIN, DEV):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}")
        parts.append(TaskTexts(*read_tsv(folder / name)))
        if not len(parts[-1]):
            raise ValueError(f"{folder / name} holds no text")
    train, dev = parts
    if not (folder / LABELS).exists():
        count = max(chain(train.labels, dev.labels)) + 1
        return Task(folder.resolve().name, [f"LABEL_{i}" for i in range(max(2, count))], train, dev)
    labels = (folder / LABELS).read_text(encoding="utf-8").split("\n")
    labels = [label.strip() for label in labels if label.strip()]
    for name, part in zip((TRAIN, DEV), parts, strict=True):
        for line, label in enumerate(part.labels, start=2):
            if label >= len(labels):
                raise ValueError(
                    f"{folder / name}, line {line}: label {label} has no name, {LABELS} has {len(labels)}"
                )
    return Task(folder.resolve().name, labels, train, dev)


def read_hub(name: str) -> Task:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"no folder {name}; to read the data set of that name from the hub: pip install datasets"
        ) from error
    path, _, config = name.rpartition("/")
    try:
        splits = datasets.load_dataset(*((path, config) if path else (config,)))
    except FileNotFoundError:  # the hub has no such data set: the name may be owner/name
        splits = datasets.load_dataset(name)
    dev = next((split for split in DEV_SPLITS if split in splits), None)
    if "train" not in splits or dev is None:
        raise ValueError(
            f"{name} must have splits train and one of {', '.join(DEV_SPLITS)}, has {list(splits)}"
        )
    features = splits["train"].features
    names = getattr(features.get("label"), "names", None)
    if names is None:
        raise ValueError(f"{name} must have a column label of classes, has {list(features)}")
    columns = [key for key, kind in features.items() if key not in NOT_TEXT and _is_text(kind)]
    if len(columns) not in (1, 2):
        raise ValueError(f"{name} must have one or two columns of text, has {columns}")

    def examples(split: Any) -> TaskTexts:
        texts = [list(split[column]) for column in columns]
        return TaskTexts(texts[0], list(split["label"]), texts[1] if len(texts) == 2 else None)

    return Task(name, list(names), examples(splits["train"]), examples(splits[dev]))


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")
