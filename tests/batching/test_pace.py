"""Estimates follow measured costs, sizes and the present speed of the machine."""

from __future__ import annotations

import pytest

from unetc.backend import Program
from unetc.runtime.batching.pace import HALF_LIFE_S, Cost, Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def programs() -> tuple[Program, Program]:
    return (lambda inputs, output: {}), (lambda inputs, output: {})


def test_a_cost_goes_through_two_calls() -> None:
    cost = Cost.through((10, 0.3), (100, 2.1))
    assert cost.seconds(10) == pytest.approx(0.3)
    assert cost.seconds(100) == pytest.approx(2.1)
    assert Cost.through((10, 0.3), (10, 0.3)).seconds(20) == pytest.approx(0.6)


def test_members_of_full_calls_take_less_time_each(clock: Clock, programs: tuple[Program, Program]) -> None:
    pace, (full, _) = Pace(clock), programs
    pace.measured(full, Cost(1.0, 0.1))
    alone = pace.alone({full: 5}, 10)
    assert alone == pytest.approx(10)
    assert pace.shared({full: 5}, 10, 80) == pytest.approx(5 * (1 + 8) / 8, rel=0.01)


def test_a_level_that_was_never_used_is_estimated_from_its_engines(
    clock: Clock, programs: tuple[Program, Program]
) -> None:
    pace, (slow, quick) = Pace(clock), programs
    pace.measured(slow, Cost(0.0, 0.2))
    pace.measured(quick, Cost(0.0, 0.01))
    for _ in range(100):
        pace.add(slow, 10, 4.0)  # the machine is half as fast as at warm-up
    assert pace.alone({slow: 4, quick: 4}, 10) == pytest.approx(2 * (8 + 0.4), rel=0.01)
    assert pace.alone({slow: 8}, 10) > pace.alone({slow: 4, quick: 4}, 10)


def test_the_first_call_says_how_slow_the_machine_is(clock: Clock, programs: tuple[Program, Program]) -> None:
    clock.now = 1000.0
    pace, (full, _) = Pace(clock), programs
    pace.measured(full, Cost(0.0, 0.1))
    assert pace.alone({full: 1}, 10) == pytest.approx(1)
    pace.add(full, 10, 3.0)
    assert pace.alone({full: 1}, 10) == pytest.approx(3)
    clock.now += HALF_LIFE_S
    assert pace.alone({full: 1}, 10) == pytest.approx(2)


def test_slowness_is_forgotten_when_nothing_runs(clock: Clock, programs: tuple[Program, Program]) -> None:
    pace, (full, _) = Pace(clock), programs
    pace.measured(full, Cost(0.0, 0.1))
    for _ in range(100):
        pace.add(full, 10, 9.0)
    assert pace.alone({full: 1}, 10) == pytest.approx(9, rel=0.01)
    clock.now += 10 * HALF_LIFE_S
    assert pace.alone({full: 1}, 10) == pytest.approx(1, rel=0.01)
