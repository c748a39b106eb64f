"""Choice of the cases of a test that run every day, and of its examples; the nightly suite has the others."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
from _pytest.mark import ParameterSet

AT_NIGHT = "UNETC_TESTS_AT_NIGHT"
"""Environment variable that is set while nightly tests run."""


def examples(every_day: int, *, at_night: int) -> int:
    """Return the number of examples of a property test."""
    return at_night if AT_NIGHT in os.environ else every_day


def every_nth(n: int, *axes: Iterable[Any]) -> list[ParameterSet]:
    """Combine the values of parameters; every n-th case runs every day, from the first on, and the others are nightly.

    The last parameter changes fastest. An n that has no divisor in common with the number of its values lets all of
    them take turns.

    Args:
        n: How many cases there are for one that runs every day.
        axes: Values of each parameter. A tuple stands for values of several parameters.
    """
    cases = [
        [value for part in parts for value in (part if isinstance(part, tuple) else (part,))]
        for parts in product(*axes)
    ]
    return [pytest.param(*case, marks=pytest.mark.nightly if number % n else ()) for number, case in enumerate(cases)]
