"""Find the branches that each engine has to emit for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unetc.artifacts.plan import Assignment
from unetc.artifacts.profile import Component
from unetc.treatments import Treatment


def with_emissions(
    assignments: Sequence[Mapping[str, Treatment]], components: Sequence[Component]
) -> tuple[Assignment, ...]:
    """Let every engine emit the branches that it computes and another engine reuses.

    A component that is nested in one that an engine does not compute is not computed there either.
    """
    nested = {component.name: component.nested for component in components}
    reused = {name for engine in assignments for name, treatment in engine.items() if treatment.reuses}
    engines = []
    for treatments in assignments:
        gone = set(treatments).union(*(nested.get(name, ()) for name in treatments))
        engines.append(Assignment(treatments=dict(sorted(treatments.items())), emits=tuple(sorted(reused - gone))))
    return tuple(engines)
