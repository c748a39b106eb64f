"""The fast planner: a Lagrangian relaxation of the limits of time and memory, by dynamic programming over noise levels.

At given prices of time and memory, every run of bins has a best set of components. The best way to cut the noise levels
into runs is then a shortest path with a limited number of engines. A plan found this way is optimal for the time that
it saves. Optima between the corners of the convex hull are missed; `exact` finds them. A binding memory limit puts more
optima there, because an engine holds most of its weights whatever it removes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .choices import BinRun, Choices, Limits

_PRICES = 100
"""Most prices to try; ten are already many."""
_ROUNDING = 1e-9
"""A plan lies below a chord if the distance exceeds this share of the chord's rise."""

_Totals = NDArray[np.float64]
"""[squared damage, saved steps, memory] of components, engines or plans; or the weights of these three."""
_SQUARED, _SAVED, _MEMORY = np.eye(3)
_FULL = _MEMORY
"""Totals that an engine adds before it removes anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Best treatment of a run at given weights."""

    run: BinRun
    chosen: tuple[int, ...]
    engines: int
    """Number of engines that it needs, 0 or 1."""
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A plan."""

    chosen: dict[BinRun, tuple[int, ...]]
    totals: _Totals


def solve_fast(choices: Choices, limits: Limits) -> dict[BinRun, tuple[int, ...]] | None:
    """Choose the components of every run of bins.

    Args:
        choices: The choices.
        limits: The limits of the plan.

    Returns:
        The chosen components by run, or None if no plan was found.
    """
    relaxation = _Relaxation(choices, limits)

    def solve_in_time(cost: _Totals) -> _Found | None:
        return _cheapest(relaxation.solve, cost, saving=_SAVED, enough=limits.saved_steps)

    found = _cheapest(solve_in_time, _SQUARED, saving=-_MEMORY, enough=1 - limits.max_memory)
    return None if found is None else found.chosen


def _cheapest(
    solve: Callable[[_Totals], _Found | None], cost: _Totals, *, saving: _Totals, enough: float
) -> _Found | None:
    """Find the cheapest plan that saves enough, or its neighbour on the convex hull.

    A plan that saves too little and one that saves enough are the ends of a chord. The chord's slope is the next price.
    The best plan at that price lies below the chord and replaces one end, until no plan does.

    Source:
        Jüttner et al. 2001, "Lagrange relaxation based method for the QoS routing problem" (LARAC),
        doi:10.1109/INFCOM.2001.916277.
    """
    poor = solve(cost)
    if poor is None or poor.totals @ saving >= enough:
        return poor
    rich = solve(-saving)
    if rich is None or rich.totals @ saving < enough:
        return None
    for _ in range(_PRICES):
        rise, width = (rich.totals - poor.totals) @ cost, (rich.totals - poor.totals) @ saving
        weights = cost - rise / width * saving  # both ends of the chord cost the same
        found = solve(weights)
        if found is None or (found.totals - poor.totals) @ weights >= -_ROUNDING * abs(rise):
            break
        if found.totals @ saving >= enough:
            rich = found
        else:
            poor = found
    return rich


class _Relaxation:
    """Plans without a budget: the best ones by a weighted sum of their totals."""

    def __init__(self, choices: Choices, limits: Limits) -> None:
        self._choices = choices
        self._max_engines = limits.max_engines
        self._max_runs = min(len(choices.steps), limits.max_phases or len(choices.steps))
        self._runs: dict[tuple[int, int], list[BinRun]] = {}
        self._totals: dict[tuple[BinRun, bool], _Totals] = {}
        """Totals by run and whether guidance is treated too."""
        self._possible: dict[BinRun, NDArray[np.bool_]] = {}
        whole = np.isin(np.arange(len(choices.names)), list(choices.whole))
        for run in sorted(choices.runs, key=lambda run: run.last):
            squared = choices.least(run)
            possible = np.isfinite(squared)
            self._runs.setdefault((run.first, run.last), []).append(run)
            for halved in (False, True)[: 1 if choices.guidance is None else 2]:
                saving = choices.saving(run, halved=halved)
                self._totals[run, halved] = np.column_stack(
                    [np.where(possible, squared, 0), saving, -choices.freed * ~whole]
                )
            self._possible[run] = possible

    def solve(self, weights: _Totals) -> _Found:
        """Find the plan with the least weighted sum of totals."""
        bins = len(self._choices.steps)
        # least[b][e][r]: the least value of the first b bins with at most e engines and exactly r runs
        least = np.full((bins + 1, self._max_engines + 1, self._max_runs + 1), np.inf)
        least[0, :, 0] = 0
        last: dict[tuple[int, int, int], _Part] = {}
        for runs in self._runs.values():
            for part in self._parts(runs, weights):
                before = least[part.run.first, : self._max_engines + 1 - part.engines, :-1]
                after = least[part.run.last, part.engines :, 1:]
                better = before + part.value < after
                after[better] = before[better] + part.value
                for engines, count in np.argwhere(better).tolist():
                    last[part.run.last, engines + part.engines, count + 1] = part
        engines, count = self._max_engines, int(np.argmin(least[bins, self._max_engines]))
        chosen: dict[BinRun, tuple[int, ...]] = {}
        totals = np.zeros(3)
        while bins > 0:
            part = last[bins, engines, count]
            chosen[part.run] = part.chosen
            own = self._totals[part.run, self._choices.guidance in part.chosen]
            totals += own[list(part.chosen)].sum(axis=0) + part.engines * _FULL
            bins, engines, count = part.run.first, engines - part.engines, count - 1
        return _Found(chosen=chosen, totals=totals)

    def _parts(self, runs: Sequence[BinRun], weights: _Totals) -> tuple[_Part, _Part]:
        """Find the best treatment of a run without a separate engine, and with one."""
        free, computing = [], []
        guidance = self._choices.guidance
        for run in runs:
            value = np.where(self._possible[run], self._totals[run, False] @ weights, 0)
            whole = tuple(c for c in sorted(self._choices.whole) if value[c] < 0)
            free.append(_Part(run=run, chosen=whole, engines=0, value=float(value[list(whole)].sum())))
            value[[*self._choices.whole, *([] if guidance is None else [guidance])]] = 0
            best = best_set(self._choices.inner, value)
            total = float(value[list(best)].sum() + weights @ _FULL)
            computing.append(_Part(run=run, chosen=best, engines=1, value=total))
            if guidance is not None and self._possible[run][guidance]:
                computing.append(self._with_guidance(run, guidance, weights))
        return min(free, key=lambda part: part.value), min(computing, key=lambda part: part.value)

    def _with_guidance(self, run: BinRun, guidance: int, weights: _Totals) -> _Part:
        """Find the best treatment of a run in which guidance is treated, so that the others save less."""
        value = np.where(self._possible[run], self._totals[run, True] @ weights, 0)
        own = float(value[guidance])
        value[[*self._choices.whole, guidance]] = 0
        others = best_set(self._choices.inner, value)
        total = own + float(value[list(others)].sum() + weights @ _FULL)
        return _Part(run=run, chosen=tuple(sorted((*others, guidance))), engines=1, value=total)


def best_set(inner: Mapping[int, Sequence[int]], value: NDArray[np.float64]) -> tuple[int, ...]:
    """Choose the components with the least sum of values; never a component together with one nested in it."""
    chosen = set(np.flatnonzero(value < 0).tolist())
    # innermost first, so that a nested set is final before it is compared with the component around it
    for outer, members in inner.items():
        held = chosen & set(members)
        if outer in chosen:
            if value[outer] <= sum(value[c] for c in held):
                chosen -= held
            else:
                chosen.discard(outer)
    return tuple(sorted(chosen))
