"""Numbers and words that functions are given: what they must be, said in one way."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def check_whole(least: int = 1, **values: Any) -> None:
    """Raises ValueError for what is not a whole number of at least `least`.

    Example:
        >>> check_whole(draws=2.5)
        Traceback (most recent call last):
        ValueError: Expected draws to be a whole number of at least 1; got 2.5
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"Expected {name} to be a whole number of at least {least}; got {value!r}")


def check_number(least: float = 0.0, **values: Any) -> None:
    """Raises ValueError for what is not a finite number of at least `least`."""
    for name, value in values.items():
        if not is_number(value) or not least <= value < math.inf:
            raise ValueError(f"Expected {name} to be a number of at least {least:g}; got {value!r}")


def is_number(value: Any) -> bool:
    """Whether a value is a real number, NumPy's included; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_one_of(known: Iterable[str], **values: Any) -> None:
    """Raises ValueError for what is not one of these words."""
    for name, value in values.items():
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"Expected {name} to be one of {', '.join(known)}; got {value!r}")


def check_seed(seed: Any, least: int = -(2**63), largest: int = 2**64 - 1) -> None:
    """Raises ValueError for what is not a whole number in this range, by default torch's."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not least <= int(seed) <= largest:
        raise ValueError(f"Expected seed to be a whole number from {least} to {largest}; got {seed!r}")
