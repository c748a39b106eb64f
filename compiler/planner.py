"""The planner: minimise predicted damage subject to measured time and number of engines. Pure and deterministic.

The damages of one component in consecutive bins add linearly: leaving out the same thing pushes the output the same
way. Different components push in directions of their own, and independent errors add in squares. The total over an
assignment is a prediction; `build` measures the joint plan afterwards.

The problem is a mixed-integer linear program. The noise-level bins are cut into segments of consecutive bins; every
segment that is used has one assignment. With y[s] = segment s is used, z[s] = it has an engine of its own, x[s, c] = it
removes component c:

    minimise    sum d[s, c]^2 x[s, c]                     d: upper 95 % bound, summed over the segment's bins
    subject to  every bin lies in exactly one used segment
                x[s, c] <= z[s] <= y[s],   sum z[s] <= K  at most K engines beside the full one
                x[s, c] + x[s, n] <= z[s]                 n nested in c: it is gone already
                sum steps[s] saved[c] x[s, c] >= budget * steps * full
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

import unetc
from unetc.artifacts.plan import Assignment, Phase, Plan, Prediction
from unetc.artifacts.profile import Profile, Treatment
from unetc.errors import PlanError

TIME_LIMIT_S = 60.0
"""The solver returns its best plan so far after this many seconds. Only then may two runs differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What to plan for."""

    budget: float
    """Share of the full model's time to save, in [0, 1)."""
    max_engines: int = 4
    """Most engines beside the full model."""
    max_phases: int | None = None
    """Most ranges of noise levels; no limit when not given."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            PlanError: If one is out of range.
        """
        if not 0 <= self.budget < 1:
            raise PlanError(f"a budget is the share of time to save, in [0, 1); got {self.budget}. Try 0.27.")
        if self.max_engines < 1:
            raise PlanError(f"max-engines must be at least 1, got {self.max_engines}.")
        if self.max_phases is not None and self.max_phases < 1:
            raise PlanError(f"max-phases must be at least 1, got {self.max_phases}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """The profile as the planner needs it, one row per bin and one column per component."""

    names: tuple[str, ...]
    damage: Mapping[Treatment, NDArray[np.float64]]
    """[bin, component] per treatment, upper bound of the relative L2 damage."""
    saved: NDArray[np.float64]
    """[component], share of the full model's time, at least 0."""
    steps: NDArray[np.int64]
    """[bin]"""
    nested: tuple[tuple[int, int], ...]
    """Pairs (outer, inner) of components where inner goes with outer."""

    @classmethod
    def of(cls, profile: Profile, correction: float = 1.0) -> Removal:
        """Read a profile; `correction` scales all saved times to what joint measurements showed."""
        names = tuple(component.name for component in profile.components)
        position = {name: i for i, name in enumerate(names)}
        damage = {t: np.full((len(profile.bins), len(names)), np.inf) for t in (Treatment.DROP, Treatment.MEAN)}
        for effect in profile.effects:
            upper = effect.damage.relative_l2.high
            damage[effect.treatment][effect.bin, position[effect.component]] = upper
        saved = np.zeros(len(names))
        for cost in profile.costs:
            saved[position[cost.component]] = max(0.0, cost.saved_ms.mean) / profile.full_ms.mean * correction
        return cls(
            names=names,
            damage=damage,
            saved=saved,
            steps=np.array([bin.steps for bin in profile.bins]),
            nested=tuple(
                (position[component.name], position[inner])
                for component in profile.components
                for inner in component.nested
            ),
        )

    def per_treatment(self, segment: tuple[int, int]) -> dict[Treatment, NDArray[np.float64]]:
        """Square the damage of a segment of bins, summed over them, [component] per treatment."""
        return {t: table[segment[0] : segment[1]].sum(axis=0) ** 2 for t, table in self.damage.items()}

    def least(self, segment: tuple[int, int]) -> NDArray[np.float64]:
        """Square the damage of the less harmful treatment over a segment of bins, [component]."""
        least: NDArray[np.float64] = np.min(list(self.per_treatment(segment).values()), axis=0)
        return least

    def assignment(self, segment: tuple[int, int], removed: Sequence[int]) -> dict[str, Treatment]:
        """Choose the less harmful treatment of each removed component over a segment of bins."""
        tables = self.per_treatment(segment)
        return {self.names[c]: min(tables, key=lambda treatment: float(tables[treatment][c])) for c in removed}

    def predict(self, segments: Sequence[tuple[tuple[int, int], Mapping[str, Treatment]]]) -> Prediction:
        """Predict time and damage of an assignment per segment."""
        position = {name: i for i, name in enumerate(self.names)}
        saved, squared = 0.0, 0.0
        for segment, treatments in segments:
            columns = {position[name]: treatment for name, treatment in treatments.items()}
            inner = {i for outer, i in self.nested if outer in columns}
            tables = self.per_treatment(segment)
            for c in columns.keys() - inner:
                saved += float(self.steps[segment[0] : segment[1]].sum() * self.saved[c])
                squared += float(tables[columns[c]][c])
        return Prediction(time_ratio=1 - saved / float(self.steps.sum()), relative_l2=float(np.sqrt(squared)))


def make_plan(profile: Profile, options: PlanOptions, *, correction: float = 1.0) -> Plan:
    """Plan what to remove at which noise level.

    Args:
        profile: What was measured.
        options: Budget and limits.
        correction: Measured / predicted saving of an earlier plan of this profile; 1 trusts the profile.

    Returns:
        The plan; the same arguments give the same bytes.

    Raises:
        PlanError: If no plan meets the budget.
    """
    removal = Removal.of(profile, correction)
    segments = _segments(len(profile.bins))
    chosen = _solve(removal, segments, options) if options.budget > 0 else {(0, len(profile.bins)): ()}
    return assemble(profile, options, [(s, removal.assignment(s, chosen[s])) for s in sorted(chosen)], removal)


def assemble(
    profile: Profile,
    options: PlanOptions,
    segments: Sequence[tuple[tuple[int, int], Mapping[str, Treatment]]],
    removal: Removal,
) -> Plan:
    """Make a plan from an assignment per segment of bins; equal neighbours become one phase."""
    engines: list[Assignment] = [Assignment(treatments={})]
    phases: list[Phase] = []
    merged: list[tuple[tuple[int, int], Mapping[str, Treatment]]] = []
    for treatments, equal in groupby(segments, key=lambda item: dict(item[1])):
        group = [segment for segment, _ in equal]
        merged.append(((group[0][0], group[-1][1]), treatments))
    for (first, last), removed in merged:
        assignment = Assignment(treatments=dict(sorted(removed.items())))
        if assignment not in engines:
            engines.append(assignment)
        low, high = profile.bins[first].low, profile.bins[last - 1].high
        phases.append(Phase(low=low, high=high, cycle=(engines.index(assignment),)))
    return Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=options.budget,
        max_engines=options.max_engines,
        engines=tuple(engines),
        phases=tuple(phases),
        prediction=removal.predict(merged),
    )


def _segments(bins: int) -> list[tuple[int, int]]:
    return [(first, last) for first in range(bins) for last in range(first + 1, bins + 1)]


def _solve(
    removal: Removal, segments: list[tuple[int, int]], options: PlanOptions
) -> dict[tuple[int, int], tuple[int, ...]]:
    """Solve the program and return the removed components of every used segment."""
    components = len(removal.names)
    count = len(segments)
    width = components + 2  # columns of a segment: x[c] ..., z, y
    steps = np.array([removal.steps[a:b].sum() for a, b in segments])
    damage = np.array([removal.least(segment) for segment in segments])
    rows = _Rows(count * width)
    for b in range(len(removal.steps)):
        rows.add({s * width + width - 1: 1.0 for s, (first, last) in enumerate(segments) if first <= b < last}, 1, 1)
    for s in range(count):
        z, y = s * width + components, s * width + components + 1
        rows.add({z: 1.0, y: -1.0}, -np.inf, 0)
        for c in range(components):
            rows.add({s * width + c: 1.0, z: -1.0}, -np.inf, 0)
        for outer, inner in removal.nested:
            rows.add({s * width + outer: 1.0, s * width + inner: 1.0, z: -1.0}, -np.inf, 0)
    rows.add({s * width + components: 1.0 for s in range(count)}, 0, options.max_engines)
    if options.max_phases is not None:
        rows.add({s * width + width - 1: 1.0 for s in range(count)}, 0, options.max_phases)
    saving, objective, allowed = np.zeros((3, count, width))
    saving[:, :components] = np.outer(steps, removal.saved)
    objective[:, :components] = np.where(np.isfinite(damage), damage, 0)
    allowed[:, :components] = np.isfinite(damage) & (saving[:, :components] > 0)
    allowed[:, components:] = 1
    bounds = Bounds(0, allowed.ravel())
    structure = rows.constraint()
    enough = LinearConstraint(saving.reshape(1, -1), options.budget * float(removal.steps.sum()), np.inf)
    result = _minimise(objective.ravel(), [structure, enough], bounds)
    if result.x is None:
        most = saving.ravel() @ _minimise(-saving.ravel(), [structure], bounds).x / removal.steps.sum()
        raise PlanError(
            f"no plan saves {options.budget:.1%} of the time with at most {options.max_engines} engines "
            f"(solver: {result.message}). The most that such a plan saves is {most:.1%}. Ask for a smaller budget."
        )
    values = result.x.reshape(count, width) > 0.5
    return {
        segment: tuple(np.flatnonzero(values[s, :components]).tolist())
        for s, segment in enumerate(segments)
        if values[s, -1]
    }


def _minimise(objective: NDArray[np.float64], constraints: list[LinearConstraint], bounds: Bounds) -> Any:
    """Solve a program in zeros and ones; `x` of the result is None if there is no solution.

    HiGHS stops at an absolute gap of 1e-6 as well as at the relative one. So the optimum of the relaxed program, which
    is close to the optimum sought, is made the unit.

    Source:
        Huangfu and Hall 2018, doi:10.1007/s12532-017-0130-5; scipy.optimize.milp.
    """
    scaled = objective / (np.abs(objective).max() or 1.0)
    relaxed = milp(scaled, constraints=constraints, bounds=bounds)
    unit = max(abs(relaxed.fun or 0.0), 1e-6)
    return milp(
        scaled / unit,
        constraints=constraints,
        integrality=np.ones(len(objective)),
        bounds=bounds,
        options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": 1e-4},
    )


class _Rows:
    """Collects sparse constraint rows."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._data: list[float] = []
        self._row: list[int] = []
        self._column: list[int] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, entries: Mapping[int, float], low: float, high: float) -> None:
        """Require low <= sum of coefficient * variable <= high."""
        self._row += [len(self._low)] * len(entries)
        self._column += list(entries.keys())
        self._data += list(entries.values())
        self._low.append(low)
        self._high.append(high)

    def constraint(self) -> LinearConstraint:
        """Build what the solver takes."""
        shape = (len(self._low), self._columns)
        matrix = sparse.csr_array((self._data, (self._row, self._column)), shape=shape)
        return LinearConstraint(matrix, self._low, self._high)
