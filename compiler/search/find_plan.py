"""Find the best plan for a budget: of all components, of whole steps alone, and in between.

The planner adds single damages. That is too coarse to tell whether whole steps or parts of them are better to reuse.
So both plans are made, repaired and judged on the same samples. Then the search goes on from the better one with the
engines of both, and for a guided model with one that forecasts guidance, which saves half of a step. Searches sample
one batch, on which the best of many schedules looks better than it is. So the best few of all searches are judged again
on more batches. A plan is never worse than one of whole steps, on the samples that it is chosen on.
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

from .candidate import Candidate
from .fit import fit_plan, middle_of
from .repair import Evaluated, Repaired, RepairOptions, Search, repair, repair_all
from .restricted import fit_restricted
from .workbench import TUNED_BATCHES, Workbench

_PER_FINALIST = 10
"""One in so many schedules that a search may sample is judged again, at least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best plan for a budget."""

    candidate: Candidate
    whole_steps: Candidate | None
    """The best plan of whole steps alone; None if none was searched or found."""
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
    of_all = Search(workbench, joint, limits.budget, seed, options)
    searched = limits.budget > 0 and options.evaluations > 0 and limits.restriction is Restriction.ALL
    of_steps = _of_whole_steps(workbench, limits, options, correction, seed, on_progress) if searched else None
    repair_all(workbench, [of_all] if of_steps is None else [of_all, of_steps], on_progress)
    best = of_all.repaired
    notes.append(
        f"planned for a damage of {joint.plan.prediction.relative_l2:.4f}, measured {_damage(best.evaluated[0]):.4f}; "
        f"after sampling {len(best.evaluated)} schedules {_damage(best):.4f}"
    )
    evaluated = list(best.evaluated)
    chosen = None
    if searched:
        if of_steps is not None:
            whole = of_steps.repaired
            evaluated.extend(whole.evaluated)
            saving = [one for one in (best, whole) if one.candidate.saving >= limits.budget]
            start = min(saving, key=_damage, default=best)
            both = _union(workbench, start.candidate, (joint, whole.candidate), limits, emits)
            between = repair(workbench, both, limits.budget, seed, options, on_progress)
            evaluated.extend(between.evaluated)
        chosen = _choose(workbench, evaluated, limits.budget, seed, options, notes, on_progress, emits)
    candidate, whole_steps = chosen or (_finished(workbench, best.candidate, limits.budget, emits), None)
    return Found(candidate=candidate, whole_steps=whole_steps, correction=correction, evaluated=tuple(evaluated))


def choose_again(
    workbench: Workbench,
    found: Found,
    budget: float,
    options: RepairOptions,
    notes: list[str],
    seed: int,
    on_progress: OnProgress,
    *,
    emits: Collection[str] = (),
) -> Found | None:
    """Choose a plan that saves more from the schedules that a search has sampled.

    Args:
        workbench: Where to measure.
        found: The search.
        budget: Share of the time to save.
        options: How long the search was.
        notes: Receives the choice in words.
        seed: Seed of the noise that damage is measured on.
        on_progress: Called as the work advances.
        emits: Branches that engine 0 emits for other quality levels.

    Returns:
        The plan; None if no schedule saves the budget.
    """
    if options.evaluations == 0:
        return None
    chosen = _choose(workbench, found.evaluated, budget, seed, options, notes, on_progress, emits)
    return None if chosen is None else replace(found, candidate=chosen[0], whole_steps=chosen[1])


def _choose(
    workbench: Workbench,
    evaluated: Sequence[Evaluated],
    budget: float,
    seed: int,
    options: RepairOptions,
    notes: list[str],
    on_progress: OnProgress,
    emits: Collection[str],
) -> tuple[Candidate, Candidate | None] | None:
    """Judge the best schedules again on more batches.

    Returns:
        The best of all that save the budget, and the best of whole steps alone, if there is one; None if no schedule
        saves the budget.
    """
    count = max(1, options.evaluations // _PER_FINALIST)
    saving = sorted((one for one in evaluated if one.candidate.saving >= budget), key=_damage)
    if not saving:
        return None
    whole = [one.candidate for one in saving if _is_of_whole_steps(workbench, one.candidate)]
    finalists = {id(own): own for own in (*(one.candidate for one in saving[:count]), *whole[:count])}

    def advance(done: int) -> None:
        on_progress(Progress(stage="finalists", done=done, total=len(finalists)))

    judged = workbench.judge(
        [*finalists.values()], seed=seed, batches=TUNED_BATCHES, tune=options.tune, advance=advance
    )
    damages = {key: damage.relative_l2.mean for key, (_, damage) in zip(finalists, judged, strict=True)}
    best = min(finalists, key=lambda key: damages[key])
    best_whole = min((id(own) for own in whole[:count]), key=lambda key: damages[key], default=None)
    kind = "whole steps alone" if _is_of_whole_steps(workbench, finalists[best]) else "components"
    notes.append(f"judged the best {len(finalists)} schedules again on more samples: {damages[best]:.4f} with {kind}")
    of_steps = None if best_whole is None else _without_unused(workbench, finalists[best_whole], ())
    return _finished(workbench, finalists[best], budget, emits), of_steps


def _finished(workbench: Workbench, candidate: Candidate, budget: float, emits: Collection[str]) -> Candidate:
    """Leave out what a chosen candidate does not use, and write the budget into its plan."""
    candidate = _without_unused(workbench, candidate, emits)
    return replace(candidate, plan=msgspec.structs.replace(candidate.plan, budget=budget))


def _damage(judged: Repaired | Evaluated) -> float:
    return judged.damage.relative_l2.mean


def _is_of_whole_steps(workbench: Workbench, candidate: Candidate) -> bool:
    """Check whether every step is computed in full or skipped as a whole."""
    used = {*workbench.schedule(candidate)} - {FULL_ENGINE}
    return all(set(candidate.plan.engines[engine].treatments) == {STEP} for engine in used)


def _of_whole_steps(
    workbench: Workbench,
    limits: PlanOptions,
    options: RepairOptions,
    correction: float,
    seed: int,
    on_progress: OnProgress,
) -> Search | None:
    """Plan with whole steps alone; return the search for its schedule, or None if no such plan meets the budget."""
    on_progress(Progress(stage="whole steps", done=0, total=1))
    target, kind = middle_of(limits.budget), Restriction.STEPS_ONLY
    try:
        return fit_restricted(workbench, kind, target, correction, seed, limits=limits, options=options)
    except PlanError:
        return None
    finally:
        on_progress(Progress(stage="whole steps", done=1, total=1))


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
