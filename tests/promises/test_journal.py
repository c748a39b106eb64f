"""A run of the promises that was killed goes on where it was, unless the code has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.promises import corruption, journal, kill
from tests.promises.journal import Journal, modules_of_tests
from tests.promises.promise import Outcome, Place, Promise, Trial


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    yield lambda number: Outcome(tries=number + 1)


PROMISE = Promise(name="counting", promised="", tried="", prepare=prepare, trials=3, short=1, seconds=0.0)


def test_trials_are_read_again_but_for_a_line_that_is_cut(tmp_path: Path) -> None:
    written = Journal(PROMISE, tmp_path)
    for number in range(2):
        written.add(number, Outcome(tries=number + 1), 0.0)
    path = tmp_path / "counting.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert set(Journal(PROMISE, tmp_path).lines) == {0}


def test_trials_of_other_code_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(PROMISE, tmp_path).add(0, Outcome(), 0.0)
    monkeypatch.setattr(journal, "modules_of_tests", lambda promise: {Path(kill.__file__)})
    assert not Journal(PROMISE, tmp_path).lines


def test_the_code_of_a_promise_holds_the_helpers_that_it_imports() -> None:
    names = {path.name for path in modules_of_tests(corruption.PROMISE)}
    assert {"corruption.py", "cached_engine.py", "quick_build.py"} <= names
    assert "kill.py" not in names
