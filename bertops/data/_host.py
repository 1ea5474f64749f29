"""Loads the compiled module ``bertops._host``, and checks what all its callers check."""

from importlib import import_module
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_TOKENS = 2**31 - 1  # cu_seqlens is int32
MAX_EPOCH = 2**32 - 1


def host() -> Any:
    """The module; an ImportError says how to build it."""
    try:
        return import_module("bertops._host")
    except ImportError as error:
        raise ImportError(
            f"bertops._host could not be loaded ({error}); build it with "
            "'pip install --no-build-isolation -e .' in the source tree"
        ) from error


def rate(name: str, probability: float) -> int:
    """The probability times 2^32, as the compiled code compares it with random words."""
    if not 0 <= probability <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {probability}")
    return round(probability * 2**32)


def check_range(name: str, value: int, low: int, high: int) -> int:
    """``value`` as an int in [low, high]."""
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {number}")
    return number


def check_seed(seed: int) -> int:
    """A seed is any integer of 64 bits without sign."""
    return check_range("seed", seed, 0, 2**64 - 1)


def check_epoch(epoch: int) -> int:
    """An epoch is counted from 0 and has 32 bits."""
    return check_range("epoch", epoch, 0, MAX_EPOCH)


def integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """A 1-D int64 array; other kinds of numbers are refused, not rounded."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D, got shape {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    return array.astype(np.int64)
