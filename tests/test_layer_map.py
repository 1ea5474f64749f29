"""Layer maps against the papers' own lists, and the maps that do not exist."""

import pytest

from bertops.distill import layer_map
from bertops.distill.layer_map import bottom, explicit, last, skip, top, uniform

EVERY = pytest.mark.parametrize("function", [uniform, top, bottom, skip, last])


@pytest.mark.parametrize(
    ("function", "student_layers", "teacher_layers", "expected"),
    [
        (uniform, 4, 12, [3, 6, 9, 12]),  # TinyBERT
        (uniform, 6, 12, [2, 4, 6, 8, 10, 12]),
        (uniform, 12, 12, list(range(1, 13))),
        (uniform, 1, 12, [12]),
        (top, 4, 12, [9, 10, 11, 12]),
        (top, 3, 3, [1, 2, 3]),
        (top, 5, 12, [8, 9, 10, 11, 12]),
        (bottom, 4, 12, [1, 2, 3, 4]),
        (bottom, 5, 12, [1, 2, 3, 4, 5]),
        (skip, 6, 12, [2, 4, 6, 8, 10]),  # Patient Knowledge Distillation
        (skip, 3, 12, [4, 8]),
        (skip, 6, 24, [4, 8, 12, 16, 20]),
        (last, 6, 12, [7, 8, 9, 10, 11]),
        (last, 3, 12, [10, 11]),
        (last, 5, 12, [8, 9, 10, 11]),
        (last, 2, 2, [1]),
    ],
)
def test_maps_of_the_papers(function, student_layers, teacher_layers, expected):
    assert function(student_layers, teacher_layers) == expected


@pytest.mark.parametrize("function", [uniform, skip])
@pytest.mark.parametrize(("student_layers", "teacher_layers"), [(5, 12), (7, 24)])
def test_layers_that_do_not_divide(function, student_layers, teacher_layers):
    with pytest.raises(
        ValueError, match=f"multiple of student_layers, got {teacher_layers} and {student_layers}"
    ):
        function(student_layers, teacher_layers)


@EVERY
def test_more_student_than_teacher_layers(function):
    with pytest.raises(ValueError, match="at most teacher_layers, got 13 and 12"):
        function(13, 12)


@pytest.mark.parametrize("function", [skip, last])
def test_a_single_layer_has_none_before_the_last(function):
    with pytest.raises(ValueError, match="student_layers must be at least 2, got 1"):
        function(1, 12)


@EVERY
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ((0, 12), ValueError, "student_layers must be at least 1, got 0"),
        ((-3, 12), ValueError, "student_layers must be at least 1, got -3"),
        ((1, 0), ValueError, "teacher_layers must be at least 1, got 0"),
        ((6.0, 12), TypeError, "student_layers must be an integer, got 6.0"),
        ((True, 12), TypeError, "student_layers must be an integer, got True"),
        ((6, "12"), TypeError, "teacher_layers must be an integer, got '12'"),
    ],
)
def test_counts_that_are_none(function, counts, error, message):
    with pytest.raises(error, match=message):
        function(*counts)


@pytest.mark.parametrize(
    ("layers", "counts", "expected"),
    [
        ([1, 3, 5, 8, 10, 12], (6, 12), [1, 3, 5, 8, 10, 12]),
        ([4, 8], (3, 12), [4, 8]),
        ((1, -2, -1), (3, 12), [1, 11, 12]),
        ([1, 1, 2, 2], (4, 2), [1, 1, 2, 2]),
        ([21], (1, 24), [21]),
    ],
)
def test_explicit_maps(layers, counts, expected):
    assert explicit(layers, *counts) == expected


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([0, 6, 12], ValueError, r"layers must not hold 0.*hidden_states\[0\] is the embedding"),
        ([4, 8, 13], ValueError, "layers must be from 1 to 12 or from -12 to -1, got 13"),
        ([-13, 8, 12], ValueError, "from -12 to -1, got -13"),
        ([4, 8, 7], ValueError, r"layers must not decrease, got \[4, 8, 7\]"),
        ([-1, 8, 12], ValueError, "layers must not decrease"),
        ([12], ValueError, r"each of 3 student layers, or for all but the last, got 1: \[12\]"),
        ([1, 2, 3, 4], ValueError, "each of 3 student layers.*got 4"),
        ([4, 8.0, 12], TypeError, "layers must be integers, got 8.0"),
        ([True, 8, 12], TypeError, "layers must be integers, got True"),
    ],
)
def test_explicit_maps_that_do_not_exist(layers, error, message):
    with pytest.raises(error, match=message):
        explicit(layers, 3, 12)


def test_explicit_of_no_layer():
    with pytest.raises(ValueError, match="each of 1 student layers"):
        explicit([], 1, 12)


def test_counts_of_explicit():
    with pytest.raises(ValueError, match="teacher_layers must be at least 1, got 0"):
        explicit([1], 1, 0)


@EVERY
def test_every_map_is_an_explicit_one(function):
    for teacher_layers in range(2, 25):
        for student_layers in range(2, teacher_layers + 1):
            if function in (uniform, skip) and teacher_layers % student_layers:
                continue
            layers = function(student_layers, teacher_layers)
            assert layer_map.explicit(layers, student_layers, teacher_layers) == layers
            assert len(set(layers)) == len(layers) == student_layers - (function in (skip, last))
