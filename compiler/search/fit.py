"""Find plans whose *measured* time meets a target: the budget's, and controls of equal time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np

import unetc
from unetc.artifacts.plan import Phase, Plan, Prediction
from unetc.artifacts.profile import Profile
from unetc.compiler.planner.choices import BinRun, Choices, TreatedRun
from unetc.compiler.planner.emissions import emitting, with_emissions
from unetc.compiler.planner.planner import PlanOptions, assemble, make_plan
from unetc.errors import PlanError
from unetc.percent import percent
from unetc.treatments import Treatment

from .candidate import Candidate
from .workbench import Workbench

TOLERANCE = 0.05
"""A saving may exceed the budget by this share of it."""

_EDGE = 0.01
"""A saving should exceed the budget by this share of it, because a second measurement may be a little lower."""
ATTEMPTS = 6
LONGEST_PERIOD = 10


def fit_plan(
    workbench: Workbench,
    options: PlanOptions,
    notes: list[str],
    *,
    correction: float = 1.0,
    emits: Collection[str] = (),
) -> tuple[Candidate, float]:
    """Plan, measure, and plan again with corrected costs until the measured saving meets the budget.

    Args:
        workbench: Where to measure.
        options: Budget and limits.
        notes: Adjustments are appended in words.
        correction: Where to start, see `make_plan`.
        emits: Branches that engine 0 emits for other quality levels; the measured time includes them.

    Returns:
        The plan that saves the budget and least more, and the correction it was made with.

    Raises:
        PlanError: If no attempt meets the budget.
    """
    best: tuple[Candidate, float] | None = None
    most = 0.0
    middle = aim = middle_of(options.budget)
    for attempt in range(ATTEMPTS):
        asked = replace(options, budget=min(aim, 0.99))
        try:
            plan = make_plan(workbench.profile, asked, correction=correction)
        except PlanError:
            if attempt > 0:
                break  # measured savings fell short by so much that no plan aims high enough
            plan = make_plan(workbench.profile, options, correction=correction)  # the aim lies above the budget
        candidate = workbench.compile(emitting(plan, emits))
        saving = candidate.saving
        most = max(most, saving)
        candidate = replace(candidate, plan=msgspec.structs.replace(candidate.plan, budget=options.budget))
        if options.budget == 0:
            return candidate, correction
        if saving >= options.budget and (best is None or saving < best[0].saving):
            best = candidate, correction
        if options.budget <= saving <= options.budget * (1 + TOLERANCE):
            break
        predicted = 1 - candidate.plan.prediction.time_ratio
        by_steps = _saved_by_steps(workbench, candidate)
        if predicted - by_steps > 0.1 * predicted:
            correction *= float(np.clip((saving - by_steps) / (predicted - by_steps), 0.3, 2.0))
        else:  # whole steps keep their promise, but come in runs of bins
            aim += middle - saving
        notes.append(
            f"attempt {attempt + 1}: planned to save {percent(predicted)}, measured {percent(saving)}; "
            f"planned again for {percent(aim)} with costs scaled by {correction:.3f}"
        )
        if aim <= 0 or aim >= 1:
            break
    if best is None:
        raise PlanError(
            f"no plan met the budget of {percent(options.budget)} when measured; the most that was saved "
            f"is {percent(most)}. Ask for a smaller budget, or analyse again on a quiet machine."
        )
    return best


def middle_of(budget: float) -> float:
    """Return the middle of the accepted savings: half of all plans aimed at an edge would miss it."""
    return (1 + TOLERANCE / 2) * budget


def budget_of(middle: float) -> float:
    """Return the budget whose accepted savings have this middle."""
    return middle / (1 + TOLERANCE / 2)


def aim_again(budget: float, by_engines: float, saved: float) -> float | None:
    """Decide whether a plan saves too little, and for which saving another should be chosen.

    Args:
        budget: Share of the time to save.
        by_engines: Saving of the plan by the times of its engines.
        saved: Best estimate of its saving, which says by how much the times of engines are wrong.

    Returns:
        The saving by the times of engines to ask for; None if the plan saves enough.
    """
    if budget == 0 or saved >= (1 + _EDGE) * budget:  # without a budget noise is no shortfall
        return None
    return by_engines + middle_of(budget) - saved


def _saved_by_steps(workbench: Workbench, candidate: Candidate) -> float:
    """Return the share of the time that is saved in steps that compute nothing."""
    whole = {component.name for component in workbench.profile.components if component.kind == "step"}
    schedule = workbench.schedule(candidate)
    empty = sum(1 for engine in schedule if whole & candidate.plan.engines[engine].treatments.keys())
    return empty / len(schedule)


def fit_uniform(workbench: Workbench, target: float, correction: float) -> Candidate:
    """Find the best plan that removes the same in all phases and saves the same measured time."""

    def draw(budget: float) -> Plan:
        options = PlanOptions(budget=budget, max_engines=1, max_phases=1)
        return make_plan(workbench.profile, options, correction=correction)

    return _closest(workbench, draw, target)


def fit_deep_hold(workbench: Workbench, target: float, seed: int) -> Candidate:
    """Find the best plan that holds one level in all phases with one period: the rule of DeepCache.

    For every level the shortest period that saves enough is tried, or else the longest; of those that save the target,
    the one that does the least damage is returned, or else the one that saves most.

    Source:
        Ma et al. 2023, arXiv:2312.00858: uniform 1:N caching of the deep branch.
    """
    profile = workbench.profile

    def reaches(candidate: Candidate) -> bool:
        return candidate.saving >= (1 - TOLERANCE) * target

    share = {cost.component: cost.saved_ms.mean / profile.full_ms.mean for cost in profile.costs}
    tried: list[Candidate] = []
    for level in (c.name for c in profile.components if c.kind == "level" and c.name in share):
        for period in range(2, LONGEST_PERIOD + 1):
            promises = share[level] * (1 - 1 / period) >= (1 - TOLERANCE / 2) * target
            if promises or period == LONGEST_PERIOD:
                candidate = workbench.compile(hold_everywhere(profile, level, period))
                if reaches(candidate) or period == LONGEST_PERIOD:
                    tried.append(candidate)
                    break
    if not tried:
        raise PlanError("the model has no level that could be held.")
    if not (enough := [candidate for candidate in tried if reaches(candidate)]):
        return max(tried, key=lambda candidate: candidate.saving)
    damages = workbench.damages(enough, seed=seed)
    return enough[min(range(len(enough)), key=lambda i: damages[i].relative_l2.mean)]


def hold_everywhere(profile: Profile, component: str, period: int) -> Plan:
    """Plan to compute a component at one of every `period` steps and to hold it at the others."""
    treatments = {component: Treatment.HOLD}
    return Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=0.0,
        max_engines=1,
        engines=with_emissions([{}, treatments], profile.components),
        phases=(Phase(low=profile.bins[0].low, high=profile.bins[-1].high, cycle=(0, *[1] * (period - 1))),),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=Choices(profile).memory([treatments])),
    )


def fit_random(workbench: Workbench, target: float, correction: float, seed: int, *, max_engines: int) -> Candidate:
    """Find a plan that treats random components at random noise levels and saves the same measured time."""
    choices = Choices(workbench.profile, correction)
    bins = len(choices.steps)

    def draw(budget: float) -> Plan:
        generator = np.random.default_rng((seed, 0))
        cuts = generator.choice(np.arange(1, bins), size=min(max_engines, bins) - 1, replace=False)
        edges = [0, *sorted(cuts.tolist()), bins]
        runs = [
            BinRun(first=first, last=last, period=int(generator.choice(choices.periods)))
            for first, last in pairwise(edges)
        ]
        chosen: list[dict[str, Treatment]] = [{} for _ in runs]
        pairs = [(index, name) for index in range(len(runs)) for name in choices.names]
        for position in generator.permutation(len(pairs)):
            index, name = pairs[position]
            treated = [TreatedRun(run=run, treatments=own) for run, own in zip(runs, chosen, strict=True)]
            if 1 - choices.predict(treated).time_ratio >= budget:
                break
            possible = choices.treatments(runs[index], name)
            if possible:
                chosen[index][name] = possible[int(generator.integers(len(possible)))]
        options = PlanOptions(budget=min(budget, 0.99), max_engines=max_engines)
        treated = [TreatedRun(run=run, treatments=own) for run, own in zip(runs, chosen, strict=True)]
        return assemble(workbench.profile, options, treated, choices)

    return _closest(workbench, draw, target)


def _closest(workbench: Workbench, draw: Callable[[float], Plan], target: float) -> Candidate:
    """Draw plans for corrected budgets, time each once and return the one whose saving is closest to the target."""
    timed: dict[bytes, Candidate] = {}

    def time(budget: float) -> Candidate:
        plan = draw(budget)
        drawn = msgspec.json.encode((plan.engines, plan.phases))
        if drawn not in timed:
            timed[drawn] = workbench.compile(plan)
        return timed[drawn]

    best = min(attempts(time, target), key=lambda candidate: abs(candidate.saving - target), default=None)
    if best is None:
        raise PlanError(f"no control plan saves {percent(target)} of the time.")
    return best


def attempts(draw: Callable[[float], Candidate], target: float) -> Iterator[Candidate]:
    """Draw candidates for corrected budgets until one saves the target.

    Args:
        draw: Makes a candidate for a budget, or raises `PlanError`; the next budget is then smaller.
        target: Share of the time to save.
    """
    budget = target
    for _ in range(ATTEMPTS):
        try:
            candidate = draw(budget)
        except PlanError:
            budget *= 0.9
            continue
        yield candidate
        if abs(candidate.saving - target) <= TOLERANCE / 2 * target:
            break
        budget = float(np.clip(budget * target / max(candidate.saving, 0.01), 0.02, 0.95))
