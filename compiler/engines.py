"""Specialise the full model and the engines of a plan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.plan import Assignment, Plan
from unetc.artifacts.profile import GUIDANCE, Bin, ModelReference, Profile
from unetc.backend import SerialisedGraph
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.errors import PlanError
from unetc.treatments import ROWS


def compile_full(gated: GatedGraph) -> SerialisedGraph:
    """Specialise the full model: it keeps everything and emits nothing."""
    return specialise(gated, {}, np.zeros(gated.channels, dtype=np.float32))


def compile_engines(gated: GatedGraph, plan: Plan, profile: Profile) -> tuple[SerialisedGraph, ...]:
    """Specialise one graph per engine of a plan.

    Raises:
        PlanError: If the plan belongs to another model or profile.
        CompileError: If a graph cannot be specialised.
    """
    check_plan(plan, profile)
    means = np.stack([np.frombuffer(row, dtype="<f4") for row in profile.means])
    return tuple(
        specialise(gated, assignment.in_graph, _means_of(plan, engine, profile, means), _emitted(assignment))
        for engine, assignment in enumerate(plan.engines)
    )


def _emitted(assignment: Assignment) -> tuple[str, ...]:
    """List the branches that a graph emits; the runtime computes the difference of guidance itself."""
    return tuple(name for name in assignment.emits if name != GUIDANCE)


def check_plan(plan: Plan, profile: Profile) -> None:
    """Refuse a plan that was not made from a profile.

    Raises:
        PlanError: If the plan belongs to another model or profile, or treats guidance in a way that cannot be.
    """
    if plan.model.sha256 != profile.model.sha256 or plan.profile_sha256 != profile.sha256():
        raise PlanError(
            f"the plan was made from another profile (of {plan.model.title}) than the one given (of "
            f"{profile.model.title}). Plan again from this profile."
        )
    guided = any(component.kind == "guidance" for component in profile.components)
    for treatment in (engine.treatments[GUIDANCE] for engine in plan.engines if GUIDANCE in engine.treatments):
        if not guided:
            raise PlanError(
                f"the plan treats {GUIDANCE}, which is no component of the profile: the model was analysed without "
                "guidance, or with guidance of three parts. Analyse it with a guidance scale above 1, or plan again."
            )
        if not treatment.row.of_guidance:
            possible = ", ".join(known for known, row in ROWS.items() if row.of_guidance)
            raise PlanError(f"{GUIDANCE} cannot get the treatment {treatment}. Expected one of: {possible}.")


def check_model(plan: Plan, model: ModelReference) -> None:
    """Refuse a plan of another model, before that is analysed.

    Raises:
        PlanError: If the weights differ.
    """
    if plan.model.sha256 != model.sha256:
        raise PlanError(
            f"the plan is of {plan.model.title} ({plan.model.sha256[:12]}), not of {model.title} ({model.sha256[:12]})."
            " Plan from a profile of this model."
        )


def _means_of(plan: Plan, engine: int, profile: Profile, means: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average the branch means over the bins where an engine runs, weighted by their steps."""
    weights = np.array([bin.steps * _share(plan, engine, bin) for bin in profile.bins])
    if not weights.any():
        weights += 1  # an engine that never runs
    averaged: NDArray[np.float64] = np.average(means.astype(np.float64), axis=0, weights=weights)
    return averaged.astype(np.float32)


def _share(plan: Plan, engine: int, bin: Bin) -> float:
    """Return the share of a bin that lies in phases of an engine."""
    overlaps = [min(bin.high, p.high) - max(bin.low, p.low) for p in plan.phases if engine in p.cycle]
    return sum(max(0.0, overlap) for overlap in overlaps) / (bin.high - bin.low)
