"""A few trials of every promise; `make promises` runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.promises.promise import Outcome, Place, Promise
from tests.promises.promises import PROMISES

EVERY_RUN = {"corruption", "paths", "keys"}
"""Promises whose trials take a second. The others set up servers or many processes, and take turns in slices."""


@pytest.mark.parametrize(
    "promise",
    [
        pytest.param(promise, id=promise.name, marks=() if promise.name in EVERY_RUN else pytest.mark.nightly)
        for promise in PROMISES
    ],
)
def test_it_is_kept(promise: Promise, shared: Path, tmp_path: Path) -> None:
    with promise.prepare(Place(shared=shared, own=tmp_path)) as trial:
        for number in range(promise.short):
            outcome = promise.judged(trial(number))
            assert outcome.tries > 0
            assert outcome.broken == ()


def test_a_figure_above_its_limit_breaks_a_promise() -> None:
    numerics = next(promise for promise in PROMISES if promise.name == "numerics")
    name, limit = next(iter(numerics.limits.items()))
    assert numerics.judged(Outcome(figures={name: limit})).broken == ()
    assert len(numerics.judged(Outcome(figures={name: 9.0})).broken) == 1
