"""The fast planner: a Lagrangian relaxation of the time budget, solved by dynamic programming over noise levels.

For a price of time, every run of bins has a best set of components of its own, and the best way to cut the noise levels
into runs is a shortest path with a limited number of engines. The price is found by bisection. What it finds is
optimal for the time it saves, but it does not find optima between the corners of the convex hull; `exact` does.

Source:
    Everett 1963, "Generalized Lagrange multiplier method", doi:10.1287/opre.11.3.399.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .choices import Choices, Mode

_HALVINGS = 50


_Costs = Mapping[Mode, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Least squared damage and saved time of every component in each mode, whatever the price."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    """The best set of a mode at a price."""

    value: float
    squared: float
    saved: float
    chosen: tuple[int, ...]


def solve_fast(
    choices: Choices, *, saved_steps: float, max_engines: int, max_phases: int | None
) -> dict[Mode, tuple[int, ...]] | None:
    """Choose the components of every run of bins.

    Args:
        choices: What can be chosen.
        saved_steps: Time to save, in steps of the full model.
        max_engines: Most engines beside engine 0 and those that compute nothing.
        max_phases: Most runs; no limit when None.

    Returns:
        The chosen components by run, or None if no price saves enough.
    """
    costs = {mode: (choices.least(mode), choices.saving(mode)) for mode in choices.modes}
    low, high = 0.0, 1.0
    best = None
    for _ in range(80):
        best = _cheapest(choices, costs, high, max_engines, max_phases)
        if best[0] >= saved_steps:
            break
        high *= 4
    if best is None or best[0] < saved_steps:
        return None
    found = best
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        candidate = _cheapest(choices, costs, middle, max_engines, max_phases)
        if candidate[0] >= saved_steps:
            high = middle
            if candidate[1] < found[1]:
                found = candidate
        else:
            low = middle
    return found[2]


def _cheapest(
    choices: Choices, costs: _Costs, price: float, max_engines: int, max_phases: int | None
) -> tuple[float, float, dict[Mode, tuple[int, ...]]]:
    """Minimise squared damage − price × saved time; return time saved, squared damage and the chosen sets."""
    bins = len(choices.steps)
    sets = {mode: _best_set(choices.inner, *costs[mode], price) for mode in choices.modes}
    phases = min(bins, max_phases or bins)
    # best[b][e][p]: the least value of the first b bins with at most e engines and exactly p runs
    value = np.full((bins + 1, max_engines + 1, phases + 1), np.inf)
    value[0, :, 0] = 0
    step: dict[tuple[int, int, int], tuple[Mode, int]] = {}
    for mode in sorted(choices.modes, key=lambda m: m.last):
        best = sets[mode]
        needed = 0 if not best.chosen or set(best.chosen) <= choices.whole else 1
        for engines in range(needed, max_engines + 1):
            for p in range(1, phases + 1):
                total = value[mode.first, engines - needed, p - 1] + best.value
                if total < value[mode.last, engines, p]:
                    value[mode.last, engines, p] = total
                    step[mode.last, engines, p] = mode, needed
    p = int(np.argmin(value[bins, max_engines]))
    chosen: dict[Mode, tuple[int, ...]] = {}
    b, engines = bins, max_engines
    while b > 0:
        mode, needed = step[b, engines, p]
        chosen[mode] = sets[mode].chosen
        b, engines, p = mode.first, engines - needed, p - 1
    saved = sum(sets[mode].saved for mode in chosen)
    return saved, sum(sets[mode].squared for mode in chosen), chosen


def _best_set(
    inner: Mapping[int, Sequence[int]], squared: NDArray[np.float64], saving: NDArray[np.float64], price: float
) -> _Best:
    """Choose the components of one run at a price; of one and those nested in it either can be chosen, not both."""
    value = np.where(
        np.isfinite(squared) & (saving > 0), np.where(np.isfinite(squared), squared, 0) - price * saving, 0
    )
    chosen = {c for c in range(len(value)) if value[c] < 0}
    for outer, members in inner.items():
        held = chosen & set(members)
        if outer in chosen:
            if value[outer] <= sum(value[c] for c in held):
                chosen -= held
            else:
                chosen.discard(outer)
    best = tuple(sorted(chosen))
    return _Best(
        value=float(sum(value[c] for c in best)),
        squared=float(sum(squared[c] for c in best)),
        saved=float(sum(saving[c] for c in best)),
        chosen=best,
    )
