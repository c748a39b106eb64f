"""Plans of a ladder share their engines: equal treatments emit equal branches, and no schedule changes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plans import plan_of
from unetc.artifacts import Assignment, Phase, Plan
from unetc.compiler.planner.emissions import emitting, share_engines, with_emissions
from unetc.treatments import Treatment

NAMES = ("a", "b", "c")
LEVELS = np.linspace(0, 10, 21).tolist()

treatments = st.dictionaries(
    st.sampled_from(NAMES),
    st.sampled_from([one for one in Treatment if one is not Treatment.KEEP]),
    min_size=1,
    max_size=2,
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw a plan as planners make them: every engine but the first one has treatments."""
    assigned = draw(st.lists(treatments, max_size=3))
    ends = draw(st.sampled_from([(), (4,), (2, 5), (1, 6, 9)]))
    cycle = st.lists(st.integers(0, len(assigned)), min_size=1, max_size=3).map(tuple)
    return plan_of(
        with_emissions([{}, *assigned], ()),
        [Phase(low=low, high=high, cycle=draw(cycle)) for low, high in pairwise([0, *ends, 11])],
    )


@given(st.lists(plans(), min_size=1, max_size=3))
def test_engines_of_a_ladder_emit_the_same_wherever_they_can_share_a_graph(ladder: list[Plan]) -> None:
    shared = share_engines(ladder)
    reused = {name for plan in ladder for engine in plan.engines for name in engine.reused}
    assert {plan.engines[0].emits for plan in shared} == {tuple(sorted(reused))}
    emitted: dict[str, tuple[str, ...]] = {}
    for before, after in zip(ladder, shared, strict=True):
        assert [one.treatments for one in after.engines] == [one.treatments for one in before.engines]
        assert after.schedule(LEVELS) == before.schedule(LEVELS)
        for own, engine in zip(before.engines, after.engines, strict=True):
            assert {*own.emits} <= {*engine.emits}
            if Treatment.MEAN in engine.treatments.values():
                assert engine == own, "its mean belongs to one plan, so it cannot be shared and need not emit more"
            else:
                assert emitted.setdefault(str(sorted(engine.treatments.items())), engine.emits) == engine.emits


@given(plans())
def test_a_single_plan_stays_as_it_is(plan: Plan) -> None:
    assert emitting(plan, ()) == plan
    distinct = {str(sorted(engine.treatments.items())) for engine in plan.engines}
    if len(distinct) == len(plan.engines):
        assert share_engines([plan]) == (plan,)


def test_engine_0_can_emit_for_other_plans() -> None:
    plan = plan_of([Assignment(treatments={}, emits=("b",)), Assignment(treatments={"b": Treatment.HOLD})], PHASES)
    assert emitting(plan, ["c", "a", "b"]).engines == (
        Assignment(treatments={}, emits=("a", "b", "c")),
        Assignment(treatments={"b": Treatment.HOLD}),
    )


PHASES = [Phase(low=0.0, high=1.0, cycle=(0, 1))]


def test_no_plan_is_no_ladder() -> None:
    assert share_engines([]) == ()


@pytest.mark.parametrize("first", [0, 1])
def test_a_plan_that_reuses_nothing_emits_for_the_others(first: int) -> None:
    dropping = plan_of([Assignment(treatments={}), Assignment(treatments={"a": Treatment.DROP})], PHASES)
    holding = plan_of([Assignment(treatments={}, emits=("b",)), Assignment(treatments={"b": Treatment.HOLD})], PHASES)
    ladder = [dropping, holding][:: 1 if first == 0 else -1]
    assert [plan.engines[0].emits for plan in share_engines(ladder)] == [("b",), ("b",)]
