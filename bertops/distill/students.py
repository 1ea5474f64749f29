"""Students: layers of their teacher, published sizes, or models that exist."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bertops.distill.initialize import encoder_of, init_student_from_teacher
from bertops.distill.settings import StudentChoice
from bertops.models import sizes
from bertops.models.config import EncoderConfig

LayerMap = Callable[[int, int], Sequence[int]]
Build = Callable[[EncoderConfig], Any]  # a new model of a config, with the head that is wanted


def new_student(
    teacher: Any,
    settings: StudentChoice,
    build: Build,
    load: Callable[[str], Any],
    start: LayerMap,
    *,
    heads: bool = False,
) -> Any:
    """The student of ``settings``, in training mode; see :func:`cut` and :func:`sized`.

    Args:
        teacher: what it learns from.
        settings: also the seed of what starts at random.
        build: makes a new one.
        load: reads one from ``settings.student``.
        start: the recipe's choice of teacher layers, from the numbers of layers of student and teacher.
        heads: a student of the teacher's layers starts with its head too.

    Raises:
        ValueError: no such size, or the student does not fit the teacher; says what.
    """
    torch.manual_seed(settings.seed)
    if settings.student:
        return load(settings.student).train()
    if settings.size:
        return sized(settings.size, teacher.config, build)
    return cut(teacher, settings.layers, settings.start, build, start, heads=heads)


def cut(model: Any, count: int, chosen: str, build: Build, start: LayerMap, *, heads: bool = False) -> Any:
    """A model on ``count`` layers of ``model``: the ``chosen``, or those that ``start`` maps.

    Args:
        chosen: layers counted from 1, such as ``2,4,6``, or nothing.
        build, heads: as :func:`new_student` takes them.
    """
    if count < 1:
        raise ValueError(f"layers must be at least 1, got {count}")
    try:
        layers = [int(number) for number in chosen.split(",")] if chosen else None
    except ValueError:
        raise ValueError(f"start must be layers such as 2,4,6, got {chosen!r}") from None
    student = build(replace(model.config, num_hidden_layers=count))
    depth = len(encoder_of("model", model).layers)
    init_student_from_teacher(student, model, layers or start(count, depth), heads=heads)
    return student.train()


def sized(name: str, teacher: EncoderConfig, build: Build) -> Any:
    """A model of a published size with random weights that reads the teacher's tokens."""
    known = {key: value for key, value in vars(sizes).items() if isinstance(value, EncoderConfig)}
    if name not in known:
        raise ValueError(f"size must be one of {', '.join(known)}, got {name!r}")
    config = replace(known[name], vocab_size=teacher.vocab_size, pad_token_id=teacher.pad_token_id)
    return build(config).train()
