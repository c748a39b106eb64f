"""The fast planner: a Lagrangian relaxation of the limits of time and memory, by dynamic programming over noise levels.

At a price of time and one of memory, every run of bins has a best set of components of its own, and the best way to cut
the noise levels into runs is a shortest path with a limited number of engines. What is found is optimal for the time it
saves, but optima between the corners of the convex hull are not found; `exact` finds them. A limit of memory that binds
puts more of them there, as most of what an engine holds it holds whatever it removes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .choices import BinRun, Choices, Limits

_PRICES = 100
"""Most prices tried; ten are many."""
_ROUNDING = 1e-9
"""A plan is below a chord if it is by more than this share of the chord's rise."""

_Totals = NDArray[np.float64]
"""[squared damage, saved steps, memory] of components, engines or plans; or what each of them is weighed by."""
_SQUARED, _SAVED, _MEMORY = np.eye(3)
_FULL = _MEMORY
"""What an engine adds that removes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What can be done in a run, at some weights."""

    mode: BinRun
    chosen: tuple[int, ...]
    engines: int
    """Engines that it needs, 0 or 1."""
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A plan."""

    chosen: dict[BinRun, tuple[int, ...]]
    totals: _Totals


def solve_fast(choices: Choices, limits: Limits) -> dict[BinRun, tuple[int, ...]] | None:
    """Choose the components of every run of bins.

    Args:
        choices: What can be chosen.
        limits: What the plan must keep to.

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
    """Find the plan that costs least of those with enough saving, or one beside it on the convex hull.

    Two plans, one that gains too little and one that gains enough, are the ends of a chord. Its slope is the next
    price; the plan that is best at it lies below the chord and replaces one of them, until there is none.

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
        rise, run = (rich.totals - poor.totals) @ cost, (rich.totals - poor.totals) @ saving
        weights = cost - rise / run * saving
        found = solve(weights)
        if found is None or (found.totals - poor.totals) @ weights >= -_ROUNDING * abs(rise):
            break
        if found.totals @ saving >= enough:
            rich = found
        else:
            poor = found
    return rich


class _Relaxation:
    """Plans without a budget: the best ones by a weighed sum of their totals."""

    def __init__(self, choices: Choices, limits: Limits) -> None:
        self._choices = choices
        self._max_engines = limits.max_engines
        self._max_runs = min(len(choices.steps), limits.max_phases or len(choices.steps))
        self._modes: dict[tuple[int, int], list[BinRun]] = {}
        self._totals: dict[BinRun, _Totals] = {}
        self._possible: dict[BinRun, NDArray[np.bool_]] = {}
        whole = np.isin(np.arange(len(choices.names)), list(choices.whole))
        for mode in sorted(choices.modes, key=lambda mode: mode.last):
            squared = choices.least(mode)
            possible = np.isfinite(squared)
            self._modes.setdefault((mode.first, mode.last), []).append(mode)
            self._totals[mode] = np.column_stack(
                [np.where(possible, squared, 0), choices.saving(mode), -choices.freed * ~whole]
            )
            self._possible[mode] = possible

    def solve(self, weights: _Totals) -> _Found:
        """Find the plan whose weighed sum of totals is least."""
        bins = len(self._choices.steps)
        # least[b][e][r]: the least value of the first b bins with at most e engines and exactly r runs
        least = np.full((bins + 1, self._max_engines + 1, self._max_runs + 1), np.inf)
        least[0, :, 0] = 0
        last: dict[tuple[int, int, int], _Part] = {}
        for modes in self._modes.values():
            for part in self._parts(modes, weights):
                before = least[part.mode.first, : self._max_engines + 1 - part.engines, :-1]
                after = least[part.mode.last, part.engines :, 1:]
                better = before + part.value < after
                after[better] = before[better] + part.value
                for engines, runs in np.argwhere(better).tolist():
                    last[part.mode.last, engines + part.engines, runs + 1] = part
        engines, runs = self._max_engines, int(np.argmin(least[bins, self._max_engines]))
        chosen: dict[BinRun, tuple[int, ...]] = {}
        totals = np.zeros(3)
        while bins > 0:
            part = last[bins, engines, runs]
            chosen[part.mode] = part.chosen
            totals += self._totals[part.mode][list(part.chosen)].sum(axis=0) + part.engines * _FULL
            bins, engines, runs = part.mode.first, engines - part.engines, runs - 1
        return _Found(chosen=chosen, totals=totals)

    def _parts(self, modes: Sequence[BinRun], weights: _Totals) -> tuple[_Part, _Part]:
        """Find the best that can be done in a run without an engine of its own, and with one."""
        free, computing = [], []
        for mode in modes:
            value = np.where(self._possible[mode], self._totals[mode] @ weights, 0)
            whole = tuple(c for c in sorted(self._choices.whole) if value[c] < 0)
            free.append(_Part(mode=mode, chosen=whole, engines=0, value=float(value[list(whole)].sum())))
            value[list(self._choices.whole)] = 0
            best = _best_set(self._choices.inner, value)
            total = float(value[list(best)].sum() + weights @ _FULL)
            computing.append(_Part(mode=mode, chosen=best, engines=1, value=total))
        return min(free, key=lambda part: part.value), min(computing, key=lambda part: part.value)


def _best_set(inner: Mapping[int, Sequence[int]], value: NDArray[np.float64]) -> tuple[int, ...]:
    """Choose the components with the least sum of values; of one and those nested in it either, not both."""
    chosen = set(np.flatnonzero(value < 0).tolist())
    for outer, members in inner.items():
        held = chosen & set(members)
        if outer in chosen:
            if value[outer] <= sum(value[c] for c in held):
                chosen -= held
            else:
                chosen.discard(outer)
    return tuple(sorted(chosen))
