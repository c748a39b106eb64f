"""Every case of a thinned test runs in one of the two suites."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.every_day import AT_NIGHT, every_nth, examples


def test_every_third_case_runs_every_day_and_the_others_at_night() -> None:
    cases = every_nth(3, ["a", "b"], [(1, 2), (3, 4)])
    assert [case.values for case in cases] == [("a", 1, 2), ("a", 3, 4), ("b", 1, 2), ("b", 3, 4)]
    assert [[mark.name for mark in case.marks] for case in cases] == [[], ["nightly"], ["nightly"], []]


@given(n=st.integers(1, 9), first=st.integers(1, 6), last=st.integers(1, 6))
def test_the_first_case_and_one_of_n_run_every_day(n: int, first: int, last: int) -> None:
    cases = every_nth(n, range(first), range(last))
    daily = [case for case in cases if not case.marks]
    assert cases[0] in daily
    assert len(daily) == -(-first * last // n)
    assert len({case.values for case in cases}) == first * last


def test_a_property_has_more_examples_at_night(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AT_NIGHT, raising=False)
    assert examples(3, at_night=7) == 3
    monkeypatch.setenv(AT_NIGHT, "1")
    assert examples(3, at_night=7) == 7
