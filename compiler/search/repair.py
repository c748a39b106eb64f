"""Repair plans by local search on their measured damage.

Single damages add up only approximately, and bins are coarser than steps. So the schedule of a plan, one engine per
step, is changed a little at a time and sampled. Changes that do less damage within the budget stay. The rows of the
scheduler table are tuned to every schedule before it is judged.

Several searches run together, as far as there are workers. A free worker gets the next schedule of a search that no
other works for. If there is none, it gets a schedule that a search would sample next if those that are being sampled
were no better. Its result is used if that comes true, so the number of workers does not change the plan that is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unetc.arguments import plain_fields
from unetc.artifacts.profile import Damage
from unetc.errors import PlanError
from unetc.progress import OnProgress, Progress
from unetc.runtime.rollout import FULL_ENGINE

from .candidate import Candidate
from .fit import middle_of
from .jobs import Judge, Judged
from .workbench import Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairOptions:
    """How long to search."""

    evaluations: int = 40
    """Most schedules that are sampled; 0 keeps the plan unchanged."""
    patience: int = 12
    """Schedules in a row without gain after which the search ends."""
    tune: bool = True
    """Whether to tune the scheduler's rows to every schedule; without, damage is measured with the plain rows."""

    def __post_init__(self) -> None:
        """Check numbers and flags.

        Raises:
            PlanError: If one has another type.
        """
        plain_fields(self, PlanError)


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
        budget: Share of the time to save, see `Search`.
        seed: Seed of the noise that damage is measured on.
        options: How long to search.
        on_progress: Called as the work advances.
    """
    search = Search(workbench, candidate, budget, seed, options)
    repair_all(workbench, (search,), on_progress)
    return search.repaired


def repair_all(workbench: Workbench, searches: Sequence[Search], on_progress: OnProgress) -> None:
    """Run searches together until all have ended."""
    asked: list[tuple[Search, _Asked]] = []

    def jobs() -> Iterator[Judge | None]:
        while True:
            idlest = sorted(searches, key=lambda search: search.in_flight)
            found = next(((search, one) for search in idlest if (one := search.ask())), None)
            if found is not None:
                asked.append(found)
                yield found[1].job
            elif any(search.in_flight for search in searches):
                yield None
            else:
                return

    total = sum(search.most for search in searches)
    for position, judged in workbench.workers.run(jobs()):
        search, one = asked[position]
        search.tell(one, judged)
        on_progress(Progress(stage="repair", done=sum(search.done for search in searches), total=total))
    on_progress(Progress(stage="repair", done=total, total=total))


@dataclass(slots=True, kw_only=True, eq=False)
class _Asked:
    """A schedule that is being sampled."""

    candidate: Candidate
    job: Judge
    random: Any
    """State of the random numbers after it was drawn."""
    judged: Judged | None = None


class Search:
    """A search for the best schedule of one plan's engines.

    By its engines' times, the result saves the budget and half of the excess that `fit` tolerates, or as much as the
    plan if that is less. Sampling runs are noisy: half of them would miss an edge.
    """

    def __init__(
        self, workbench: Workbench, candidate: Candidate, budget: float, seed: int, options: RepairOptions
    ) -> None:
        """Sample nothing yet.

        Args:
            workbench: Where to measure.
            candidate: A plan that saves the budget.
            budget: Share of the time to save.
            seed: Seed of the noise that damage is measured on.
            options: How long to search.
        """
        self._workbench = workbench
        self._options = options
        self._seed = seed
        self._floor = min(candidate.saving, middle_of(budget))
        self._generator = np.random.default_rng(seed)
        self._base = candidate
        """The best candidate so far, which is changed."""
        self._least: Damage | None = None
        """Its damage; None before it is known."""
        self._evaluated: list[Evaluated] = []
        self._asked: list[_Asked] = []
        """Schedules that are being sampled, in order; each was drawn as if those before it were no better."""
        self._tried: set[tuple[int, ...]] = set()
        self._misses = 0
        self._exhausted = False

    @property
    def in_flight(self) -> int:
        """Number of schedules that are being sampled."""
        return sum(1 for one in self._asked if one.judged is None)

    @property
    def most(self) -> int:
        """Most schedules that are sampled."""
        return max(1, self._options.evaluations)

    @property
    def done(self) -> int:
        """Number of schedules that were sampled, or the most at the end."""
        return self.most if self._ends and not self._asked else len(self._evaluated)

    @property
    def repaired(self) -> Repaired:
        """The best schedule, once it has ended."""
        assert self._least is not None
        return Repaired(candidate=self._base, damage=self._least, evaluated=tuple(self._evaluated))

    @property
    def _ends(self) -> bool:
        """Whether it ends if no schedule that is being sampled is better."""
        if not self._evaluated and not self._asked:
            return False
        known = len(self._evaluated) + len(self._asked)
        misses = self._misses + len(self._asked) - (self._least is None)
        return self._exhausted or known >= self._options.evaluations or misses >= self._options.patience

    def ask(self) -> _Asked | None:
        """Draw the next schedule to sample; None if none is wanted before the next result."""
        if self._ends:
            return None
        changed: Candidate | None = self._base
        if self._asked or self._evaluated:
            neighbours = _neighbours(self._workbench, self._base, self._floor, self._generator)
            changed = next((one for one in neighbours if self._workbench.schedule(one) not in self._tried), None)
        if changed is None:
            self._exhausted = True
            return None
        self._tried.add(self._workbench.schedule(changed))
        job = Judge(engines=changed, seed=self._seed, batches=1, tune=self._options.tune)
        asked = _Asked(candidate=changed, job=job, random=self._generator.bit_generator.state)
        self._asked.append(asked)
        return asked

    def tell(self, asked: _Asked, judged: Judged) -> None:
        """Take the result of a schedule; those drawn before a better one was known are of no use."""
        asked.judged = judged
        while self._asked and (first := self._asked[0]).judged is not None:
            del self._asked[0]
            self._take(first, first.judged)

    def _take(self, asked: _Asked, judged: Judged) -> None:
        candidate = replace(asked.candidate, tuned=judged.tuned)
        self._evaluated.append(Evaluated(candidate=candidate, damage=judged.damage))
        if self._least is None:  # the plan itself: its neighbours are the same whatever its damage is
            self._base, self._least = candidate, judged.damage
            return
        better = judged.damage.relative_l2.mean < self._least.relative_l2.mean
        if not better:
            self._misses += 1
            return
        self._base, self._least, self._misses = candidate, judged.damage, 0
        self._tried -= {self._workbench.schedule(later.candidate) for later in self._asked}
        self._asked.clear()
        self._generator.bit_generator.state = asked.random
        self._exhausted = False


_PROPOSALS = 200
"""Random changes drawn before the search gives up finding one that is new and saves enough."""


def _neighbours(
    workbench: Workbench, candidate: Candidate, floor: float, generator: np.random.Generator
) -> Iterator[Candidate]:
    """Propose schedules that save enough and differ in one or two steps; the first step keeps its engine."""
    schedule = workbench.schedule(candidate)
    if len(schedule) < 2:
        return
    count = len(candidate.plan.engines)
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
