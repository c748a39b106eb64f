"""A few trials of every promise; `make promises` runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.promises.promise import Place, Promise
from tests.promises.promises import PROMISES

EVERY_RUN = {"corruption", "paths", "code", "keys", "fuzz"}
"""Promises whose trials take seconds. The others set up servers or many processes, and take turns in slices."""


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
            outcome = trial(number)
            assert outcome.tries > 0
            assert outcome.broken == ()
            assert promise.exceeded(outcome.figures) == ()
