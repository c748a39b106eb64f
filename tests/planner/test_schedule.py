"""Schedules written as phases."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.plans import plan_of
from unetc.artifacts.plan import Assignment, Phase
from unetc.compiler.planner.schedule import phases_of
from unetc.treatments import Treatment

ENGINES = (
    Assignment(treatments={}, emits=("step",)),
    Assignment(treatments={"a": Treatment.DROP}, emits=("step",)),
    Assignment(treatments={"step": Treatment.FORECAST}),
)


@given(
    schedule=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    gaps=st.lists(st.floats(0.01, 3), min_size=60, max_size=60),
)
def test_phases_give_the_schedule_back(schedule: list[int], gaps: list[float]) -> None:
    schedule = [0, *schedule]  # something has to be computed first
    levels = [sum(gaps[:i]) - 20 for i in range(len(schedule))]
    phases = phases_of(schedule, levels, levels[0] - 1, levels[-1] + 1)
    assert plan_of(ENGINES, phases).schedule(levels) == tuple(schedule)
    assert all(left.high == right.low for left, right in itertools.pairwise(phases))


@given(
    cycles=st.lists(
        st.tuples(st.sampled_from([(0,), (1,), (0, 2), (0, 2, 2), (0, 1, 2)]), st.integers(3, 6)),
        min_size=1,
        max_size=4,
    )
)
def test_cycles_are_found(cycles: list[tuple[tuple[int, ...], int]]) -> None:
    schedule = [engine for cycle, turns in cycles for engine in cycle * turns]
    phases = phases_of(schedule, [float(i) for i in range(len(schedule))], 0.0, 1.0)
    # a greedy search may give a step to the phase before, which costs a phase at a seam, never more
    assert len(phases) <= 2 * len(cycles)


@given(levels=st.lists(st.floats(0, 3), max_size=20).map(sorted), cut=st.floats(0.1, 2.9), prefix=st.integers(0, 20))
def test_a_choice_depends_on_what_was_before_alone(levels: list[float], cut: float, prefix: int) -> None:
    """So steps that come one at a time, as in a pipeline of diffusers, get the engines that a whole schedule gets."""
    phases = Phase(low=0.0, high=cut, cycle=(1, 2)), Phase(low=cut, high=3.0, cycle=(2, 0, 1))
    plan = plan_of(ENGINES, phases)
    assert plan.schedule(levels[:prefix]) == plan.schedule(levels)[:prefix]


def test_a_regular_schedule_is_one_phase() -> None:
    levels = [float(i) for i in range(12)]
    assert [phase.cycle for phase in phases_of([0, 2, 2] * 4, levels, 0.0, 12.0)] == [(0, 2, 2)]
    assert [phase.cycle for phase in phases_of([0] * 4 + [0, 2] * 4, levels, 0.0, 12.0)] == [(0,), (2, 0)]


def test_a_schedule_serves_other_numbers_of_steps() -> None:
    levels = [i / 4 for i in range(40)]
    plan = plan_of(ENGINES, phases_of([0] * 20 + [0, 2] * 10, levels, 0.0, 10.0))
    finer = plan.schedule([i / 8 for i in range(80)])
    assert finer[:38] == (0,) * 38  # the phases change half-way between two steps
    assert 19 <= finer.count(2) <= 22
