"""Find the branches that each engine has to emit for the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from unetc.artifacts.plan import Assignment, Plan
from unetc.artifacts.profile import GUIDANCE, STEP, Component
from unetc.treatments import Treatment


def with_emissions(
    assignments: Sequence[Mapping[str, Treatment]], components: Sequence[Component]
) -> tuple[Assignment, ...]:
    """Let every engine emit the branches that it computes and another engine reuses.

    A component that is nested in one that an engine does not compute is not computed there either. An engine that
    treats guidance computes half of the rows, so it emits the step alone.
    """
    nested = {component.name: component.nested for component in components}
    reused = {name for engine in assignments for name, treatment in engine.items() if treatment.reuses}
    engines = []
    for treatments in assignments:
        gone = set(treatments).union(*(nested.get(name, ()) for name in treatments))
        emits = reused - gone
        if GUIDANCE in treatments:
            emits &= {STEP}
        engines.append(Assignment(treatments=dict(sorted(treatments.items())), emits=tuple(sorted(emits))))
    return tuple(engines)


def emitting(plan: Plan, branches: Collection[str]) -> Plan:
    """Let engine 0 of a plan emit further branches, which engines of other quality levels reuse."""
    first, *others = plan.engines
    emits = tuple(sorted({*first.emits, *branches}))
    return msgspec.structs.replace(plan, engines=(msgspec.structs.replace(first, emits=emits), *others))


def share_engines(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """Let engines with the same treatments emit the same branches in all plans, so that plans share their graphs.

    All plans have engine 0, which emits every branch that an engine of any plan reuses. An engine with a mean has a
    graph for its own plan alone, because the mean depends on the phases.
    """
    shared: dict[tuple[tuple[str, Treatment], ...], set[str]] = {}
    for plan in plans:
        for engine in plan.engines:
            shared.setdefault(_key(engine), set()).update(engine.emits)
    return tuple(
        msgspec.structs.replace(
            plan,
            engines=tuple(
                engine
                if Treatment.MEAN in engine.treatments.values()
                else msgspec.structs.replace(engine, emits=tuple(sorted(shared[_key(engine)])))
                for engine in plan.engines
            ),
        )
        for plan in plans
    )


def _key(engine: Assignment) -> tuple[tuple[str, Treatment], ...]:
    return tuple(sorted(engine.treatments.items()))
