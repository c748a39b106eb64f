"""Find the best plan for a budget: of all components, of whole steps alone, and in between.

The planner adds single damages. That is too coarse to tell whether whole steps or parts of them are better to reuse.
So both plans are made, repaired and judged on the same samples. Then the search goes on from the better one with the
engines of both, and for a guided model with one that forecasts guidance, which saves half of a step. A plan is never
worse than one of whole steps, on the samples that it is chosen on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import msgspec

from unetc.artifacts.profile import GUIDANCE, STEP
from unetc.compiler.planner.emissions import emitting, with_emissions
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.planner.restriction import Restriction
from unetc.errors import PlanError
from unetc.progress import OnProgress, Progress
from unetc.runtime.rollout import FULL_ENGINE
from unetc.treatments import Treatment

from .fit import fit_plan, middle_of
from .repair import Evaluated, Repaired, RepairOptions, repair
from .restricted import fit_restricted
from .workbench import Candidate, Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best plan for a budget."""

    candidate: Candidate
    correction: float
    """Measured / predicted saving, see `make_plan`."""
    evaluated: tuple[Evaluated, ...]
    """Every schedule that was sampled."""


def find_plan(
    workbench: Workbench,
    limits: PlanOptions,
    options: RepairOptions,
    notes: list[str],
    seed: int,
    on_progress: OnProgress,
    *,
    correction: float = 1.0,
    emits: Collection[str] = (),
) -> Found:
    """Find the plan that saves a budget and does least damage.

    Args:
        workbench: Where to measure.
        limits: Budget and limits.
        options: How long to search for a better schedule of each plan.
        notes: Receives the steps of the search in words.
        seed: Seed of the noise that damage is measured on.
        on_progress: Called as the work advances.
        correction: Where to start, see `make_plan`.
        emits: Branches that engine 0 emits for other quality levels.

    Raises:
        PlanError: If no plan meets the budget.
    """
    on_progress(Progress(stage="fitting the plan", done=0, total=1))
    joint, correction = fit_plan(workbench, limits, notes, correction=correction, emits=emits)
    on_progress(Progress(stage="fitting the plan", done=1, total=1))
    best = repair(workbench, joint, limits.budget, seed, options, on_progress)
    first, last = (damage.relative_l2.mean for damage in (best.evaluated[0].damage, best.damage))
    notes.append(
        f"planned for a damage of {joint.plan.prediction.relative_l2:.4f}, measured {first:.4f}; after sampling "
        f"{len(best.evaluated)} schedules {last:.4f}"
    )
    evaluated = list(best.evaluated)
    if limits.budget > 0 and options.evaluations > 0 and limits.restriction is Restriction.ALL:
        whole = _of_whole_steps(workbench, limits, options, correction, seed, on_progress)
        if whole is not None:
            evaluated.extend(whole.evaluated)
            best = _better(best, whole, limits.budget, "whole steps alone", notes)
            both = _union(workbench, best.candidate, (joint, whole.candidate), limits, emits)
            between = repair(workbench, both, limits.budget, seed, options, on_progress)
            evaluated.extend(between.evaluated)
            best = _better(best, between, limits.budget, "engines of both plans", notes)
    candidate = _without_unused(workbench, best.candidate, emits)
    plan = msgspec.structs.replace(candidate.plan, budget=limits.budget)
    return Found(candidate=replace(candidate, plan=plan), correction=correction, evaluated=tuple(evaluated))


def _of_whole_steps(
    workbench: Workbench,
    limits: PlanOptions,
    options: RepairOptions,
    correction: float,
    seed: int,
    on_progress: OnProgress,
) -> Repaired | None:
    """Plan with whole steps alone; None if no such plan meets the budget."""
    on_progress(Progress(stage="whole steps", done=0, total=1))
    target, kind = middle_of(limits.budget), Restriction.STEPS_ONLY
    try:
        return fit_restricted(workbench, kind, target, correction, seed, limits=limits, options=options)
    except PlanError:
        return None
    finally:
        on_progress(Progress(stage="whole steps", done=1, total=1))


def _better(best: Repaired, other: Repaired, budget: float, what: str, notes: list[str]) -> Repaired:
    """Return the one that does less damage, if it saves the budget."""
    before, after = best.damage.relative_l2.mean, other.damage.relative_l2.mean
    if other.candidate.saving < budget or after >= before:
        return best
    notes.append(f"{what} do less damage: {after:.4f} in place of {before:.4f}")
    return other


def _union(
    workbench: Workbench,
    start: Candidate,
    others: Sequence[Candidate],
    limits: PlanOptions,
    emits: Collection[str],
) -> Candidate:
    """Make a candidate with the schedule of one and the engines of others.

    An engine for guidance joins them where the limits leave room for one more, which has all weights.
    """
    assignments = _distinct([dict(engine.treatments) for one in others for engine in one.plan.engines])
    guided = any(component.kind == "guidance" for component in workbench.profile.components)
    computing = sum(1 for own in assignments if own and STEP not in own)
    if guided and computing < limits.max_engines and limits.max_memory is None:
        assignments.append({GUIDANCE: Treatment.FORECAST})
    return _with_engines(workbench, start, _distinct(assignments), emits)


def _without_unused(workbench: Workbench, candidate: Candidate, emits: Collection[str]) -> Candidate:
    """Leave out engines that the schedule does not use, and the branches that only they reuse."""
    used = {FULL_ENGINE, *workbench.schedule(candidate)}
    if len(used) == len(candidate.plan.engines):
        return candidate
    kept = [dict(engine.treatments) for i, engine in enumerate(candidate.plan.engines) if i in used]
    return _with_engines(workbench, candidate, kept, emits)


def _distinct(assignments: list[dict[str, Treatment]]) -> list[dict[str, Treatment]]:
    """Leave out repetitions."""
    return [own for i, own in enumerate(assignments) if own not in assignments[:i]]


def _with_engines(
    workbench: Workbench, candidate: Candidate, assignments: list[dict[str, Treatment]], emits: Collection[str]
) -> Candidate:
    """Give a candidate other engines, among them those that its schedule uses."""
    engines = with_emissions(assignments, workbench.profile.components)
    position = {
        i: assignments.index(dict(own.treatments))
        for i, own in enumerate(candidate.plan.engines)
        if dict(own.treatments) in assignments
    }
    schedule = [position[engine] for engine in workbench.schedule(candidate)]
    phases = workbench.phases_of(candidate, schedule)
    plan = msgspec.structs.replace(candidate.plan, engines=engines, phases=phases)
    return workbench.compile(emitting(plan, emits))
