"""Profile → Plan: choose the components to remove or reuse at each noise level.

Consecutive bins form a run with one set of treatments. A run either removes components in all of its steps, or reuses
them in all but one of every few steps: then its cycle is the full engine followed by the engine that holds. Two
planners choose the runs and the components: `exact`, an integer program, and `dynamic`, a Lagrangian relaxation that is
about a hundred times faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import inf

import unetc
from unetc.arguments import plain_fields
from unetc.artifacts.plan import Phase, Plan
from unetc.artifacts.profile import Profile
from unetc.errors import PlanError
from unetc.percent import percent
from unetc.treatments import Treatment

from .choices import TOLERANCE, BinRun, Choices, Limits, TreatedRun
from .dynamic import solve_fast
from .emissions import with_emissions
from .exact import most_saved, solve_exactly
from .restriction import Restriction

TIME_LIMIT_S = 60.0
"""The exact planner returns its best plan so far after this many seconds. Only then may two runs differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Saving and limits of a plan."""

    budget: float
    """Share of the full model's time to save, in [0, 1)."""
    max_engines: int = 4
    """Most engines in addition to the full model; engines that compute nothing do not count."""
    max_phases: int | None = None
    """Most ranges of noise levels; no limit when not given."""
    max_memory: float | None = None
    """Most weights of all engines together, each with its own copy; the full model counts 1."""
    planner: str = "fast"
    """`fast`, which misses optima between the corners of the convex hull, or `exact`."""
    restriction: Restriction = Restriction.ALL
    """Components and treatments that the plan may use."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            PlanError: If one is no number, or out of range.
        """
        plain_fields(self, PlanError)
        if not 0 <= self.budget < 1:
            raise PlanError(f"a budget is the share of time to save, in [0, 1); got {self.budget}. Try 0.27.")
        if self.max_engines < 1:
            raise PlanError(f"max-engines must be at least 1, got {self.max_engines}.")
        if self.max_phases is not None and self.max_phases < 1:
            raise PlanError(f"max-phases must be at least 1, got {self.max_phases}.")
        if self.max_memory is not None and not self.max_memory >= 1:
            raise PlanError(f"max-memory must be at least 1, the full model's own weights, got {self.max_memory:g}.")
        if self.planner not in ("exact", "fast"):
            raise PlanError(f"unknown planner {self.planner!r}. Expected exact or fast.")


def make_plan(profile: Profile, options: PlanOptions, *, correction: float = 1.0) -> Plan:
    """Choose the components to remove or reuse at each noise level.

    Args:
        profile: The analysis of a model.
        options: Budget and limits.
        correction: Measured / predicted saving of an earlier plan of this profile; 1 trusts the profile.

    Returns:
        The plan; the same arguments give the same bytes.

    Raises:
        PlanError: If no plan meets the budget.
    """
    choices = Choices(profile, correction, options.restriction)
    chosen = _solve(choices, options)
    return assemble(profile, options, [choices.treat(run, chosen[run]) for run in sorted(chosen)], choices)


def _solve(choices: Choices, options: PlanOptions) -> Mapping[BinRun, tuple[int, ...]]:
    if options.budget == 0:
        return {BinRun(first=0, last=len(choices.steps), period=1): ()}
    limits = limits_of(choices, options)
    chosen = solve_fast(choices, limits) if options.planner == "fast" else None
    if chosen is None:
        chosen = solve_exactly(choices, limits, time_limit_s=TIME_LIMIT_S)
    if chosen is None:
        raise PlanError(_why_impossible(choices, options))
    return chosen


def limits_of(choices: Choices, options: PlanOptions) -> Limits:
    """Translate options into limits for both planners, tolerance included."""
    return Limits(
        saved_steps=options.budget * float(choices.steps.sum()) - TOLERANCE,
        max_engines=options.max_engines,
        max_phases=options.max_phases,
        max_memory=inf if options.max_memory is None else options.max_memory + TOLERANCE,
    )


def _why_impossible(choices: Choices, options: PlanOptions) -> str:
    """State the largest saving within the limits, and the one without the memory limit if that is larger."""

    def most(options: PlanOptions) -> float:
        limits = limits_of(choices, options)
        return most_saved(choices, limits, time_limit_s=TIME_LIMIT_S) / float(choices.steps.sum())

    within, memory, lifted = most(options), "", ""
    if options.max_memory is not None:
        memory = f" and {options.max_memory:g} × the full model's weights"
        if (without := most(replace(options, max_memory=None))) > within + TOLERANCE:
            lifted = f", and {percent(without)} with more memory"
    limit = "" if options.restriction is Restriction.ALL else f" and the restriction {options.restriction}"
    return (
        f"no plan saves {percent(options.budget)} of the time with at most {options.max_engines} engines{memory}"
        f"{limit}. "
        f"The most that such a plan saves is {percent(within)}{lifted}. Ask for a smaller budget."
    )


def assemble(profile: Profile, options: PlanOptions, runs: Sequence[TreatedRun], choices: Choices) -> Plan:
    """Make a plan from treated runs of bins; neighbours with the same treatments become one phase."""
    merged: list[TreatedRun] = []
    for (period, _), alike in groupby(runs, key=_treatment_of):
        group = list(alike)
        run = BinRun(first=group[0].run.first, last=group[-1].run.last, period=period)
        merged.append(TreatedRun(run=run, treatments=group[0].treatments))
    assignments: list[Mapping[str, Treatment]] = [{}]
    for treated in merged:
        if treated.treatments not in assignments:
            assignments.append(treated.treatments)
    phases = tuple(
        Phase(
            low=profile.bins[treated.run.first].low,
            high=profile.bins[treated.run.last - 1].high,
            cycle=_cycle(assignments.index(treated.treatments), treated.run.period),
        )
        for treated in merged
    )
    return Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=options.budget,
        max_engines=options.max_engines,
        engines=with_emissions(assignments, profile.components),
        phases=phases,
        prediction=choices.predict(merged),
    )


def _treatment_of(treated: TreatedRun) -> tuple[int, dict[str, Treatment]]:
    """Return the key of a run: period and treatments. Without treatments the period does not matter."""
    return (treated.run.period if treated.treatments else 1), dict(treated.treatments)


def _cycle(engine: int, period: int) -> tuple[int, ...]:
    return (engine,) if period == 1 or engine == 0 else (0, *[engine] * (period - 1))
