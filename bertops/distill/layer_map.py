"""Which teacher layer each student layer learns from.

A map is a list of teacher layers: entry m - 1 is the teacher layer g(m) of student layer m. Layers count
from 1, as in the papers and in :func:`bertops.capture`, so they are indices into ``hidden_states``, where 0
is the embedding::

    teachers = layer_map.uniform(4, 12)  # [3, 6, 9, 12]
    students = range(1, len(teachers) + 1)
    with bertops.capture(student, students) as s, bertops.capture(teacher, teachers) as t:
        ...
    loss = sum(bertops.relation_kl(a.v, b.v, a.mask) for a, b in zip(s, t))

======== ==================== =========================== ==============
function teacher layer g(m)   4 of 12                     student layers
======== ==================== =========================== ==============
uniform  m L / M              3, 6, 9, 12                 1 to M
top      m + L - M            9, 10, 11, 12               1 to M
bottom   m                    1, 2, 3, 4                  1 to M
skip     m L / M              3, 6, 9                     1 to M - 1
last     m + L - M            9, 10, 11                   1 to M - 1
======== ==================== =========================== ==============

for a student of M and a teacher of L layers.
"""

from collections.abc import Callable, Sequence


def uniform(student_layers: int, teacher_layers: int) -> list[int]:
    """Every (L / M)-th layer, the last to the last: [3, 6, 9, 12] for 4 of 12.

    Raises:
        ValueError: ``teacher_layers`` is not a multiple of ``student_layers``.

    Source: Jiao et al. 2020 (TinyBERT), section 4.2: g(m) = 3m for 4 of 12 layers, 2m for 6.
    """
    _check_counts(student_layers, teacher_layers)
    step, rest = divmod(teacher_layers, student_layers)
    if rest:
        raise ValueError(
            f"teacher_layers must be a multiple of student_layers, got {teacher_layers} and "
            f"{student_layers}; write the map yourself with explicit"
        )
    return [m * step for m in range(1, student_layers + 1)]


def top(student_layers: int, teacher_layers: int) -> list[int]:
    """The last M layers: [9, 10, 11, 12] for 4 of 12.

    Raises:
        ValueError: there are more student than teacher layers.

    Source: Jiao et al. 2020 (TinyBERT), section "Effects of Mapping Function": below uniform there.
    """
    _check_counts(student_layers, teacher_layers)
    return list(range(teacher_layers - student_layers + 1, teacher_layers + 1))


def bottom(student_layers: int, teacher_layers: int) -> list[int]:
    """The first M layers: [1, 2, 3, 4] for 4 of 12.

    Raises:
        ValueError: there are more student than teacher layers.

    Source: Jiao et al. 2020 (TinyBERT), section "Effects of Mapping Function": below uniform there.
    """
    _check_counts(student_layers, teacher_layers)
    return list(range(1, student_layers + 1))


def skip(student_layers: int, teacher_layers: int) -> list[int]:
    """PKD-Skip, every (L / M)-th layer without the last: [2, 4, 6, 8, 10] for 6 of 12.

    The last layers of both are left to the loss on the logits.

    Raises:
        ValueError: ``teacher_layers`` is not a multiple of ``student_layers``, or the student has one layer.

    Source: Sun et al. 2019 (Patient Knowledge Distillation), section 3.2.
    """
    return _without_the_last(uniform, student_layers, teacher_layers)


def last(student_layers: int, teacher_layers: int) -> list[int]:
    """PKD-Last, the M - 1 layers before the last: [7, 8, 9, 10, 11] for 6 of 12.

    The last layers of both are left to the loss on the logits.

    Raises:
        ValueError: there are more student than teacher layers, or the student has one layer.

    Source: Sun et al. 2019 (Patient Knowledge Distillation), section 3.2.
    """
    return _without_the_last(top, student_layers, teacher_layers)


def explicit(layers: Sequence[int], student_layers: int, teacher_layers: int) -> list[int]:
    """A map of your own, checked: ``explicit([1, 3, 5, 8, 10, 12], 6, 12)``.

    Args:
        layers: teacher layers of student layers 1, 2, ...: M of them, or M - 1 to leave out the last student
            layer, as skip and last do. From 1, or from the end, -1 being the last. They must not decrease;
            two student layers may share one.

    Returns:
        The layers, all counted from 1.

    Raises:
        TypeError: an entry is not an integer.
        ValueError: the number of layers does not fit, one does not exist, or they decrease.
    """
    _check_count("student_layers", student_layers)
    _check_count("teacher_layers", teacher_layers)
    fitting = (student_layers, student_layers - 1)
    if len(layers) not in fitting or not layers:
        raise ValueError(
            f"layers must have an entry for each of {student_layers} student layers, or for all but the "
            f"last, got {len(layers)}: {list(layers)}"
        )
    numbers = [layer_number("layers", layer, teacher_layers) for layer in layers]
    if numbers != sorted(numbers):
        raise ValueError(f"layers must not decrease, got {list(layers)} of {teacher_layers}")
    return numbers


def layer_number(name: str, layer: int, count: int) -> int:
    """``layer`` of ``count``, given from 1 or from the end, counted from 1; ``name`` is for the error."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"{name} must be integers, got {layer!r}")
    if layer == 0:
        raise ValueError(
            f"{name} must not hold 0: layers count from 1, and hidden_states[0] is the embedding"
        )
    if abs(layer) > count:
        raise ValueError(f"{name} must be from 1 to {count} or from -{count} to -1, got {layer}")
    return layer if layer > 0 else count + 1 + layer


def _without_the_last(
    full: Callable[[int, int], list[int]], student_layers: int, teacher_layers: int
) -> list[int]:
    _check_counts(student_layers, teacher_layers)
    if student_layers == 1:
        raise ValueError("student_layers must be at least 2, got 1: its last layer takes no part in this map")
    return full(student_layers, teacher_layers)[:-1]


def _check_counts(student_layers: int, teacher_layers: int) -> None:
    _check_count("student_layers", student_layers)
    _check_count("teacher_layers", teacher_layers)
    if student_layers > teacher_layers:
        raise ValueError(
            f"student_layers must be at most teacher_layers, got {student_layers} and {teacher_layers}; "
            "write the map yourself with explicit"
        )


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an integer, got {count!r}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
