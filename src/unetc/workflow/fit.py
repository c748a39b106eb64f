"""Find plans whose *measured* time meets a target: the budget's, and controls of equal time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import Treatment
from unetc.compiler.planner import PlanOptions, Removal, assemble, make_plan
from unetc.errors import PlanError

from .workbench import Candidate, Workbench

TOLERANCE = 0.05
"""A saving may exceed the budget by this share of it."""

ATTEMPTS = 6
RANDOM_PLANS = 3


def fit_plan(
    workbench: Workbench, options: PlanOptions, notes: list[str], *, correction: float = 1.0
) -> tuple[Candidate, float]:
    """Plan, measure, and plan again with corrected costs until the measured saving meets the budget.

    Args:
        workbench: Where to measure.
        options: Budget and limits.
        notes: What was adjusted is appended in words.
        correction: Where to start, see `make_plan`.

    Returns:
        The plan that saves the budget and least more, and the correction it was made with.

    Raises:
        PlanError: If no attempt meets the budget.
    """
    best: tuple[Candidate, float] | None = None
    most = 0.0
    for attempt in range(ATTEMPTS):
        candidate = workbench.compile(make_plan(workbench.profile, options, correction=correction))
        saving = candidate.saving
        most = max(most, saving)
        if options.budget == 0:
            return candidate, correction
        if saving >= options.budget and (best is None or saving < best[0].saving):
            best = candidate, correction
        if options.budget <= saving <= options.budget * (1 + TOLERANCE):
            break
        predicted = 1 - candidate.plan.prediction.time_ratio
        # aim at the middle of the accepted range: a fit to its edge would miss it half of the time
        aim = (1 + TOLERANCE / 2) * options.budget
        correction *= float(np.clip(saving / predicted * options.budget / aim, 0.5, 2.0))
        notes.append(
            f"attempt {attempt + 1}: planned to save {predicted:.1%}, measured {saving:.1%}; "
            f"planned again with costs scaled by {correction:.3f}"
        )
    if best is None:
        raise PlanError(
            f"no plan met the budget of {options.budget:.1%} when measured; the most that was saved is {most:.1%}. "
            "Ask for a smaller budget, or analyse again on a quiet machine."
        )
    return best


def fit_uniform(workbench: Workbench, target: float, correction: float) -> Candidate:
    """Find the best plan that removes the same in all phases and saves the same measured time."""

    def draw(budget: float) -> Plan:
        options = PlanOptions(budget=budget, max_engines=1, max_phases=1)
        return make_plan(workbench.profile, options, correction=correction)

    return _closest(workbench, draw, target)


def fit_random(workbench: Workbench, target: float, correction: float, like: Plan, seed: int) -> Candidate:
    """Find a plan that removes random components in the phases of another one and saves the same measured time."""
    profile = workbench.profile
    removal = Removal.of(profile, correction)
    edges = [profile.bin_of(phase.low) for phase in like.phases] + [len(profile.bins)]
    segments = list(pairwise(edges))

    def draw(budget: float) -> Plan:
        generator = np.random.default_rng((seed, 0))
        chosen: dict[tuple[int, int], dict[str, Treatment]] = {segment: {} for segment in segments}
        pairs = [(segment, name) for segment in segments for name in removal.names]
        for position in generator.permutation(len(pairs)):
            segment, name = pairs[position]
            if 1 - removal.predict(list(chosen.items())).time_ratio >= budget:
                break
            chosen[segment][name] = (Treatment.DROP, Treatment.MEAN)[int(generator.integers(2))]
        options = PlanOptions(budget=min(budget, 0.99), max_engines=max(1, len(segments)))
        return assemble(profile, options, list(chosen.items()), removal)

    return _closest(workbench, draw, target)


def _closest(workbench: Workbench, draw: Callable[[float], Plan], target: float) -> Candidate:
    """Draw plans for corrected budgets and return the one whose measured saving is closest to the target."""
    budget = target
    best: Candidate | None = None
    for _ in range(ATTEMPTS):
        try:
            candidate = workbench.compile(draw(budget))
        except PlanError:
            budget *= 0.9
            continue
        if best is None or abs(candidate.saving - target) < abs(best.saving - target):
            best = candidate
        if abs(candidate.saving - target) <= TOLERANCE / 2 * target:
            break
        budget = float(np.clip(budget * target / max(candidate.saving, 0.01), 0.02, 0.95))
    if best is None:
        raise PlanError(f"no control plan saves {target:.1%} of the time.")
    return best
