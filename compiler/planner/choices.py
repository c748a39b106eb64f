"""A planner's choices: damage and saved time of every component in every run of noise-level bins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.plan import Prediction
from unetc.artifacts.profile import Profile
from unetc.treatments import Treatment

from .restriction import Restriction


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class BinRun:
    """A run of bins, and the period of its refreshes."""

    first: int
    last: int
    """Index of the bin after the last one."""
    period: int
    """1 removes components in every step. A period p above 1 reuses components in all but one of p steps."""


TOLERANCE = 1e-6
"""Margin of every limit: HiGHS cannot distinguish a smaller miss, and measurements are far less exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a plan."""

    saved_steps: float
    """Time to save, in steps of the full model."""
    max_engines: int
    """Most engines, not counting the full one and those that compute nothing."""
    max_phases: int | None
    """Most runs; no limit when None."""
    max_memory: float
    """Most weights of all engines together, the full one included, in full engines; infinite for no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreatedRun:
    """Treatments of a plan in a run of bins."""

    run: BinRun
    treatments: Mapping[str, Treatment]


class Choices:
    """A profile as planners need it.

    Damages of one component add linearly over the bins of a run, because their errors point the same way. Damages of
    different components and runs add in squares, because their errors do not.
    `docs/decisions/009-add-damages-over-bins.md` has the measurements.
    """

    def __init__(self, profile: Profile, correction: float = 1.0, restriction: Restriction = Restriction.ALL) -> None:
        """Read a profile.

        Args:
            profile: The analysis.
            correction: Joint saving / sum of single savings, as measured; scales all components but the step, which
                saves everything at once.
            restriction: Treatments that it does not allow count as not measured.
        """
        self.names = tuple(component.name for component in profile.components)
        self.position = {name: i for i, name in enumerate(self.names)}
        self.steps = np.array([bin.steps for bin in profile.bins])
        self.nested = tuple(
            (self.position[component.name], self.position[inner])
            for component in profile.components
            for inner in component.nested
        )
        self.whole = frozenset(self.position[c.name] for c in profile.components if c.kind == "step")
        """Components that leave nothing to compute; an engine for them costs nothing to have."""
        self.guidance = next((self.position[c.name] for c in profile.components if c.kind == "guidance"), None)
        """Guidance, which saves rows: other components then save a share of the rows that are left; None without it."""
        self.freed = np.zeros(len(self.names))
        """Share of the full engine's weights that an engine without the component does not hold, [component]."""
        for cost in profile.costs:
            self.freed[self.position[cost.component]] = cost.freed_bytes / profile.full_bytes
        self.saved = self._consistent_shares(profile)
        components = [c for c in range(len(self.names)) if c not in self.whole]
        self.saved[components] = np.minimum(1.0, self.saved[components] * correction)
        self._damage: dict[tuple[Treatment, int], NDArray[np.float64]] = {}
        kinds = {component.name: component.kind for component in profile.components}
        for effect in profile.effects:
            if not restriction.allows(kinds[effect.component], effect.treatment):
                continue
            table = self._damage.setdefault(
                (effect.treatment, effect.period), np.full((len(self.steps), len(self.names)), np.nan)
            )
            table[effect.bin, self.position[effect.component]] = effect.relative_l2.high
        for (treatment, period), table in self._damage.items():
            table[self._treated(treatment, period)[:, None] & np.isnan(table)] = np.inf

    def _treated(self, treatment: Treatment, period: int) -> NDArray[np.bool_]:
        """Find the bins in which a treatment could be measured, [bin]: a reuse not where all steps are refreshes.

        Where it could and has no damage, nobody has tried it, or it ended in NaN: no plan makes it there.
        """
        if not treatment.reuses:
            return np.ones(len(self.steps), dtype=bool)
        first = np.cumsum(self.steps) - self.steps
        treated: NDArray[np.bool_] = (self.steps > 1) | ((self.steps == 1) & (first % period > 0))
        return treated  # of two steps, only one is a refresh

    def _consistent_shares(self, profile: Profile) -> NDArray[np.float64]:
        """Read which share of the full model's time each component saves.

        Nested components cannot save more than the component around them. Measured one by one they may seem to,
        because noise and shared work count for each of them; then they are scaled down.
        """
        shares = np.zeros(len(self.names))
        for cost in profile.costs:
            shares[self.position[cost.component]] = np.clip(cost.saved_ms.mean / profile.full_ms.mean, 0.0, 1.0)
        timed = {self.position[cost.component] for cost in profile.costs}
        for outer, members in self.inner.items():
            if outer not in timed:
                continue
            leaves = [c for c in members if c not in self.inner and c != self.guidance]
            if (total := float(shares[leaves].sum())) > shares[outer]:
                shares[leaves] *= shares[outer] / total
        return shares

    @cached_property
    def inner(self) -> dict[int, list[int]]:
        """Nested components by the component around them; the innermost ones first."""
        inner: dict[int, list[int]] = {}
        for outer, i in self.nested:
            inner.setdefault(outer, []).append(i)
        return dict(sorted(inner.items(), key=lambda item: len(item[1])))

    @property
    def periods(self) -> tuple[int, ...]:
        """Periods that were measured, 1 first."""
        return tuple(sorted({period for _, period in self._damage} | {1}))

    def treatments(self, run: BinRun, name: str) -> tuple[Treatment, ...]:
        """List the treatments that a component can get over a run."""
        return tuple(t for t, table in self.squared(run).items() if np.isfinite(table[self.position[name]]))

    @cached_property
    def runs(self) -> tuple[BinRun, ...]:
        """All runs of bins with all periods."""
        bins = len(self.steps)
        return tuple(
            BinRun(first=first, last=last, period=period)
            for first in range(bins)
            for last in range(first + 1, bins + 1)
            for period in self.periods
        )

    def treated_steps(self, run: BinRun) -> int:
        """Count the steps of a run that are not refreshes."""
        steps = int(self.steps[run.first : run.last].sum())
        return steps if run.period == 1 else steps - -(-steps // run.period)

    def squared(self, run: BinRun) -> dict[Treatment, NDArray[np.float64]]:
        """Square the damage of a run, [component] per treatment; infinite where there is no such treatment."""
        result = {}
        for (treatment, period), table in self._damage.items():
            if period == run.period:
                rows = table[run.first : run.last]
                worst = np.fmax.reduce(rows)  # the value of a bin in which it cannot be measured
                with np.errstate(over="ignore"):  # a square too large for a float is as bad as infinite
                    total = np.where(np.isnan(rows), worst, rows).sum(axis=0) ** 2
                result[treatment] = np.where(np.isnan(worst), np.inf, total)
        return result

    def least(self, run: BinRun) -> NDArray[np.float64]:
        """Square the damage of the least harmful treatment over a run, [component]."""
        least: NDArray[np.float64] = np.min([np.full(len(self.names), np.inf), *self.squared(run).values()], axis=0)
        return least

    def saving(self, run: BinRun, *, halved: bool = False) -> NDArray[np.float64]:
        """Time that each component saves over a run, in steps of the full model, [component].

        Args:
            run: The run.
            halved: Whether guidance is treated too. The others then save a share of the time that guidance leaves.
        """
        saving: NDArray[np.float64] = self.treated_steps(run) * self.saved
        if halved and self.guidance is not None:
            others = np.arange(len(self.names)) != self.guidance
            saving[others] *= 1 - self.saved[self.guidance]
        return saving

    def treat(self, run: BinRun, chosen: Iterable[int]) -> TreatedRun:
        """Treat each chosen component in the least harmful way."""
        tables = self.squared(run)
        treatments = {self.names[c]: min(tables, key=lambda t: float(tables[t][c])) for c in chosen}
        return TreatedRun(run=run, treatments=treatments)

    def predict(self, plan: Sequence[TreatedRun]) -> Prediction:
        """Predict time and damage of treated runs."""
        saved, squared = 0.0, 0.0
        for treated in plan:
            tables, outermost = self.squared(treated.run), self._outermost(treated.treatments)
            saving = self.saving(treated.run, halved=self.guidance in outermost)
            for c in outermost:
                saved += float(saving[c])
                squared += float(tables[treated.treatments[self.names[c]]][c])
        return Prediction(
            time_ratio=1 - saved / float(self.steps.sum()),
            relative_l2=float(np.sqrt(squared)),
            memory=self.memory(treated.treatments for treated in plan),
        )

    def memory(self, assignments: Iterable[Mapping[str, Treatment]]) -> float:
        """Bound the weights of the full engine and of all assignments' engines, as a multiple of the full engine's.

        Removing several components frees at least the sum of their single shares. Weights that only they share are
        freed in addition. No weight is counted twice: two components that free the same weight are nested.
        """
        total = 1.0
        for treatments in {tuple(sorted(own.items())): own for own in assignments}.values():
            removed = self._outermost(treatments)
            if treatments and not removed & self.whole:
                total += 1 - float(self.freed[list(removed)].sum())
        return total

    def _outermost(self, treatments: Mapping[str, Treatment]) -> set[int]:
        """Find the treated components that are not nested in another treated one."""
        columns = {self.position[name] for name in treatments}
        return columns - {inner for outer, inner in self.nested if outer in columns}
