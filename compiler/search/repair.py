"""Repair a plan by local search on its measured damage.

Single damages add up only approximately, and bins are coarser than steps. So the schedule of a plan, one engine per
step, is changed a little at a time and sampled. Changes that do less damage within the budget stay. The rows of the
scheduler table are tuned to every schedule before it is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from unetc.artifacts.profile import Damage
from unetc.progress import OnProgress, Progress
from unetc.runtime.rollout import FULL_ENGINE

from .fit import middle_of
from .workbench import Candidate, Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairOptions:
    """How long to search."""

    evaluations: int = 40
    """Most schedules that are sampled; 0 keeps the plan unchanged."""
    patience: int = 12
    """Schedules in a row without gain after which the search ends."""
    tune: bool = True
    """Whether to tune the scheduler's rows to every schedule; without, damage is measured with the plain rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A candidate that was sampled."""

    candidate: Candidate
    damage: Damage


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """The best candidate, and everything that was sampled on the way."""

    candidate: Candidate
    damage: Damage
    evaluated: tuple[Evaluated, ...]


def repair(
    workbench: Workbench,
    candidate: Candidate,
    budget: float,
    seed: int,
    options: RepairOptions,
    on_progress: OnProgress,
) -> Repaired:
    """Search for a schedule of the same engines that saves the budget and does less damage.

    Args:
        workbench: Where to measure.
        candidate: A plan that saves the budget.
        budget: Share of the time to save. By its engines' times, the result saves this share and half of the excess
            that `fit` tolerates, or as much as the candidate if that is less. Sampling runs are noisy: half of them
            would miss an edge.
        seed: Seed of the noise that damage is measured on.
        options: How long to search.
        on_progress: Called as the work advances.
    """
    best, least = judge(workbench, candidate, seed, options)
    evaluated = [Evaluated(candidate=best, damage=least)]
    tried = {workbench.schedule(best)}
    misses = 0
    generator = np.random.default_rng(seed)
    floor = min(candidate.saving, middle_of(budget))
    while len(evaluated) < options.evaluations and misses < options.patience:
        changed = next(
            (c for c in _neighbours(workbench, best, floor, generator) if workbench.schedule(c) not in tried), None
        )
        if changed is None:
            break
        tried.add(workbench.schedule(changed))
        changed, damage = judge(workbench, changed, seed, options)
        evaluated.append(Evaluated(candidate=changed, damage=damage))
        better = damage.relative_l2.mean < least.relative_l2.mean
        misses = 0 if better else misses + 1
        if better:
            best, least = changed, damage
        on_progress(Progress(stage="repair", done=len(evaluated), total=options.evaluations))
    on_progress(Progress(stage="repair", done=options.evaluations, total=options.evaluations))
    return Repaired(candidate=best, damage=least, evaluated=tuple(evaluated))


def judge(
    workbench: Workbench, candidate: Candidate, seed: int, options: RepairOptions, *, batches: int = 1
) -> tuple[Candidate, Damage]:
    """Measure a schedule, with its rows tuned on the same samples if wanted; return it with these rows."""
    if options.tune:
        return workbench.tune(candidate, seed=seed, batches=batches)
    return candidate, workbench.damage(candidate, seed=seed, batches=batches)


_PROPOSALS = 200
"""Random changes drawn before the search gives up finding one that is new and saves enough."""


def _neighbours(
    workbench: Workbench, candidate: Candidate, floor: float, generator: np.random.Generator
) -> Iterator[Candidate]:
    """Propose schedules that save enough and differ in one or two steps; the first step keeps its engine."""
    schedule = workbench.schedule(candidate)
    if len(schedule) < 2:
        return
    count = len(candidate.programs)
    halves = [i for i, engine in enumerate(candidate.plan.engines) if engine.halves]
    for _ in range(_PROPOSALS):
        changed = list(schedule)
        first, second = generator.integers(1, len(schedule), size=2)
        move = generator.integers(4 if halves else 3)
        if move == 0:  # two steps change places
            changed[first], changed[second] = changed[second], changed[first]
        elif move == 1:  # neighbours change places
            changed[first], changed[first - 1] = changed[first - 1], changed[first]
        elif move == 3:  # two steps compute half of the rows, which takes the time of one full and one skipped step
            changed[first] = changed[second] = halves[int(generator.integers(len(halves)))]
        else:  # one step gets another engine, engine 0 as often as all others together
            changed[first] = FULL_ENGINE if generator.integers(2) else int(generator.integers(count))
        proposal = workbench.reschedule(candidate, changed)
        if proposal.saving >= floor and workbench.schedule(proposal) == tuple(changed) != schedule:
            yield proposal
