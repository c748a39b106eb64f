"""Controls that are plans of a restricted planner, fitted to a measured time, to be repaired as the plan itself is."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from unetc.compiler.planner.planner import PlanOptions, make_plan
from unetc.compiler.planner.restriction import Restriction
from unetc.errors import PlanError
from unetc.percent import percent
from unetc.runtime.rollout import FULL_ENGINE

from .candidate import Candidate
from .fit import TOLERANCE, attempts
from .repair import RepairOptions, Search
from .workbench import Workbench


def fit_restricted(
    workbench: Workbench,
    restriction: Restriction,
    target: float,
    correction: float,
    seed: int,
    *,
    limits: PlanOptions,
    options: RepairOptions,
) -> Search:
    """Fit a plan that keeps to a restriction and saves a measured time.

    Args:
        workbench: Where to measure.
        restriction: Treatments that the plan may use.
        target: Share of the time to save.
        correction: Measured / predicted saving, see `make_plan`.
        seed: Seed of the noise that damage is measured on.
        limits: Limits of the plan; budget and restriction are replaced.
        options: How long to search for a better schedule.

    Returns:
        The search for its best schedule, which has not begun.

    Raises:
        PlanError: If no such plan saves the target.
    """
    found = _fit(workbench, replace(limits, restriction=restriction), target, correction)
    spent = _spend(workbench, found, target)
    return Search(workbench, spent, target / (1 + TOLERANCE / 2), seed, options)


def _fit(workbench: Workbench, limits: PlanOptions, target: float, correction: float) -> Candidate:
    """Plan for corrected budgets and return the plan that saves the target and least more.

    Plans with the same engines are timed once.
    """

    def misses(candidate: Candidate) -> tuple[bool, float]:
        return candidate.saving < (1 - TOLERANCE / 2) * target, abs(candidate.saving - target)

    log_snr = workbench.scheduler.table(workbench.steps).log_snr.tolist()
    timed: dict[bytes, Candidate] = {}

    def draw(budget: float) -> Candidate:
        plan = make_plan(workbench.profile, replace(limits, budget=min(budget, 0.99)), correction=correction)
        engines = msgspec.json.encode(plan.engines)
        if engines in timed:
            return workbench.reschedule(timed[engines], plan.schedule(log_snr))
        timed[engines] = workbench.compile(plan)
        return timed[engines]

    best = min(attempts(draw, target), key=misses, default=None)
    if best is None or best.saving < (1 - TOLERANCE) * target:
        most = "" if best is None else f"; the most that was saved is {percent(best.saving)}"
        raise PlanError(f"no plan of this kind saves {percent(target)} of the time{most}.")
    return best


def _spend(workbench: Workbench, candidate: Candidate, target: float) -> Candidate:
    """Compute further steps in full while the plan saves more than the target, the last ones first.

    Whole steps come in runs of bins, so a plan may save too much, and errors in late steps have no time to decay.
    """
    for step in reversed(range(len(workbench.schedule(candidate)))):
        schedule = list(workbench.schedule(candidate))
        if schedule[step : step + 1] in ([], [FULL_ENGINE]):
            continue
        schedule[step] = FULL_ENGINE
        proposal = workbench.reschedule(candidate, schedule)
        if proposal.saving >= target and workbench.schedule(proposal) == tuple(schedule):
            candidate = proposal
    return candidate
