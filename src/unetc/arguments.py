"""Arguments of sampling, read as the type that they must have or refused by name."""

from __future__ import annotations

import operator
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from .errors import SessionError, brief


def whole_number(name: str, value: object) -> int:
    """Read a whole number, of Python or numpy.

    Raises:
        SessionError: If the value is something else, such as a fraction or text.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise SessionError(f"{name} is {value!r}, a {type(value).__name__}. Expected a whole number.") from error


def real_number(name: str, value: object) -> float:
    """Read a number.

    Raises:
        SessionError: If the value is something else, such as text.
    """
    if not isinstance(value, Real):
        raise SessionError(f"{name} is {value!r}, a {type(value).__name__}. Expected a number.")
    return float(value)


def float_array(name: str, value: object, *, expected: str = "floats") -> NDArray[np.float32]:
    """Read an array of floats, from anything that numpy can convert.

    Args:
        name: Name of the argument.
        value: The argument.
        expected: Description of the elements in the error message.

    Raises:
        SessionError: If the value is no array, or holds something else, such as integers.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # the last from a tensor of torch that has a gradient
        raise SessionError(f"cannot read {name} as an array: {brief(error)}. Expected {expected}.") from error
    if array.dtype.kind != "f":
        raise SessionError(f"{name}: got elements of type {array.dtype}. Expected {expected}.")
    return array.astype(np.float32, copy=False)
