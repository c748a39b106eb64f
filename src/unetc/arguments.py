"""Arguments, read as the type that they must have or refused by name."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from .errors import SessionError, UnetcError, brief

T = TypeVar("T")


def wrong_type(name: str, value: object, expected: str, refusal: type[UnetcError]) -> UnetcError:
    """Make the error for an argument of another type than the one that was expected."""
    return refusal(f"{name} is {value!r}, a {type(value).__name__}. Expected {expected}.")


def whole_number(name: str, value: object, refusal: type[UnetcError] = SessionError) -> int:
    """Read a whole number, of Python, numpy or torch.

    Args:
        name: Name of the argument.
        value: The argument.
        refusal: The error that is raised.

    Raises:
        UnetcError: If the value is something else, such as a fraction, text or a bool.
    """
    if (number := _index(value)) is None:
        raise wrong_type(name, value, "a whole number", refusal)
    return number


def real_number(name: str, value: object, refusal: type[UnetcError] = SessionError) -> float:
    """Read a number, of Python, numpy or torch; one that is too large for a float becomes infinity.

    Args:
        name: Name of the argument.
        value: The argument.
        refusal: The error that is raised.

    Raises:
        UnetcError: If the value is something else, such as text, a bool or NaN.
    """
    number = _element(value)
    if not isinstance(number, Real) or isinstance(number, bool) or math.isnan(plain := _as_float(number)):
        raise wrong_type(name, value, "a number", refusal)
    return plain


def flag(name: str, value: object, refusal: type[UnetcError] = SessionError) -> bool:
    """Read True or False, of Python, numpy or torch.

    Args:
        name: Name of the argument.
        value: The argument.
        refusal: The error that is raised.

    Raises:
        UnetcError: If the value is something else, such as text or a number.
    """
    plain = _element(value)
    if not isinstance(plain, bool):
        raise wrong_type(name, value, "True or False", refusal)
    return plain


def plain_fields(options: Any, refusal: type[UnetcError]) -> None:
    """Make numbers, flags and lists of them in a frozen dataclass plain ones; its `__post_init__` calls this first.

    Files and hashes cannot take the numbers of numpy and torch, and the text "no" would count as yes.

    Raises:
        UnetcError: `refusal`, if a value is not of the field's type.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        kind = str(field.type)  # text, as in every module whose annotations are not evaluated
        if kind in _READERS and not (value is None and kind.endswith("None")):
            object.__setattr__(options, field.name, _READERS[kind](field.name, value, refusal))


def text(name: str, value: object, refusal: type[UnetcError] = SessionError) -> str:
    """Read text.

    Args:
        name: Name of the argument.
        value: The argument.
        refusal: The error that is raised.

    Raises:
        UnetcError: If the value is something else, such as a number or bytes.
    """
    if not isinstance(value, str):
        raise wrong_type(name, value, "text", refusal)
    return str(value)


def label(name: str, value: object, refusal: type[UnetcError] = SessionError) -> str | int:
    """Read the label of a class, a number or text; see `whole_number` and `text`."""
    read = str(value) if isinstance(value, str) else _index(value)
    if read is None:
        raise wrong_type(name, value, "the number or the name of a class", refusal)
    return read


def several(
    read: Callable[[str, object, type[UnetcError]], T],
) -> Callable[[str, object, type[UnetcError]], tuple[T, ...]]:
    """Make a reader of several values: one alone is a list of one, and text is not a list of letters."""

    def read_all(name: str, values: object, refusal: type[UnetcError]) -> tuple[T, ...]:
        scalar = not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0  # of numpy or torch
        alone = scalar or isinstance(values, str | bytes)
        listed: Iterable[object] = [values] if alone else cast(Iterable[object], values)
        return tuple(read(name, value, refusal) for value in listed)

    return read_all


texts = several(text)
"""Reads texts, such as prompts."""
labels = several(label)
"""Reads labels of classes."""

_READERS: dict[str, Callable[[str, Any, type[UnetcError]], object]] = {
    "int": whole_number,
    "int | None": whole_number,
    "float": real_number,
    "float | None": real_number,
    "bool": flag,
    "tuple[str, ...]": texts,
    "tuple[str | int, ...]": labels,
}
"""Readers of fields, by annotation."""


def _element(value: Any) -> Any:
    """Return the element of an array or a tensor that has just one, as a number of Python; anything else as it is."""
    item = getattr(value, "item", None)
    try:
        return value if item is None else item()
    except (TypeError, ValueError, RuntimeError):  # there are more elements, or no memory
        return value


def _index(value: object) -> int | None:
    """Return a whole number as one of Python; None for anything else."""
    number = _element(value)
    try:
        return None if isinstance(number, bool) else operator.index(number)
    except (TypeError, RuntimeError):  # the second from a tensor without memory
        return None


def _as_float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


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
