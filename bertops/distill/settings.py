"""What fine-tuning and the recipes can be told; each field says what it is in its ``help``."""

import math
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from bertops._backend import CHOICES
from bertops.pretraining import settings as pretraining
from bertops.pretraining.settings import plan_of, setting

if TYPE_CHECKING:
    from bertops.training import Plan

PACKINGS = ("full", "doc")  # FULL-SENTENCES and DOC-SENTENCES of RoBERTa


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all stages of a run have in common, on a task and on plain text, and the steps of the last one.

    Raises:
        ValueError, TypeError: a number is out of range, or of another type than its default; names it.
    """

    steps: int = setting(0, "of the last stage; on a task in place of epochs")
    learning_rate: float = setting(5e-5, "of the last stage, its peak")
    batch_size: int = setting(32, "texts of a micro-batch in each process")
    accumulation: int = setting(1, "micro-batches of a step")
    warmup: float = setting(0.1, "share of the steps over which the rate rises; it then falls to 0")
    weight_decay: float = setting(0.01, "of matrices")
    max_length: int = setting(128, "most tokens of a text, special ones included")
    bf16: bool = setting(False, "run in bfloat16 where that is safe (autocast)")
    impl: str = setting("auto", f"of the ops of bertops: {', '.join(CHOICES)}")
    evaluate_every: int = setting(200, "steps between evaluations")
    checkpoint_every: int = setting(200, "steps between checkpoints")
    log_every: int = setting(20, "steps between lines of metrics.jsonl")
    seed: int = setting(0, "of the order, the start, the augmentation and dropout")

    def __post_init__(self) -> None:
        for entry in fields(self):
            default: Any = entry.default
            value, kind = getattr(self, entry.name), type(default)
            if kind is float and type(value) is int:
                object.__setattr__(self, entry.name, float(value))
            elif type(value) is not kind:
                raise TypeError(f"{entry.name} must be of type {kind.__name__}, got {value!r}")
            if kind in (int, float) and value < 0 <= default:
                raise ValueError(f"{entry.name} must be at least 0, got {value}")
        if self.impl not in CHOICES:
            raise ValueError(f"impl must be one of {', '.join(CHOICES)}, got {self.impl!r}")
        if self.warmup >= 1:
            raise ValueError(f"warmup must be below 1, got {self.warmup}")
        if self.batch_size < 1 or self.max_length < 3:
            raise ValueError(
                f"batch_size must be at least 1 and max_length at least 3, "
                f"got {self.batch_size} and {self.max_length}"
            )

    def plan(self, steps: int | None = None, learning_rate: float | None = None, **optimizer: Any) -> "Plan":
        """Of a stage; what is left out is the last stage's, ``optimizer`` goes to AdamW."""
        steps = self.steps if steps is None else steps
        rate = self.learning_rate if learning_rate is None else learning_rate
        return plan_of(self, steps, rate, **optimizer)


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """Those of a run on a task, whose stages may be counted in epochs."""

    epochs: float = setting(3.0, "of the task's texts, in the last stage")
    train_texts: int = setting(0, "only so many of the task's first training texts; 0 for all")

    def steps_of(self, texts: int, epochs: float | None = None, steps: int | None = None) -> int:
        """Of a stage over ``texts``; what is left out is the last stage's."""
        processes = int(os.environ.get("WORLD_SIZE", 1))
        steps = self.steps if steps is None else steps
        epochs = self.epochs if epochs is None else epochs
        return steps or math.ceil(epochs * texts / (self.batch_size * self.accumulation * processes))


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TaskSettings):
    """Of plain fine-tuning: the whole model by default."""

    layers: int = setting(0, "keep so many of the model's layers; 0 for all")
    start: str = setting("", "which, such as 2,4,6; default: every second of 6 for 3, and so on")
    size: str = setting("", "a published size with random weights in its place, such as TINYBERT_4")


@dataclass(frozen=True, kw_only=True)
class StudentChoice(Settings):
    """Which student: layers of the teacher, a published size, or a model that exists."""

    layers: int = setting(3, "of a student that is the teacher with fewer of them")
    start: str = setting("", "teacher layers that it starts from, such as 2,4,6; default: the recipe's")
    size: str = setting("", "a published size in place of that, such as TINYBERT_4, with random weights")
    student: str = setting("", "folder of a student in place of that, with the teacher's vocabulary")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size and self.student:
            raise ValueError(f"size and student exclude each other, got {self.size!r} and {self.student!r}")


@dataclass(frozen=True, kw_only=True)
class StudentSettings(StudentChoice, TaskSettings):
    """Of a student that learns a task."""


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings, pretraining.TextSettings):
    """Those of a run on plain text, before any task."""

    steps: int = setting(7000, "updates of the parameters, in the last stage")
    weight_decay: float = setting(0.0, "of matrices")
    packing: str = setting("full", "sequences of whole lines: full, over the ends of documents, or doc")

    def __post_init__(self) -> None:
        super().__post_init__()
        pretraining.TextSettings.__post_init__(self)
        if self.packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {self.packing!r}")


@dataclass(frozen=True, kw_only=True)
class TextStudentSettings(TextSettings, StudentChoice):
    """Of a student that learns from plain text."""
