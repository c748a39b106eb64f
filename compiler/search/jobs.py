"""The jobs of a search: sampled schedules, which run anywhere, and timings, which need a machine for themselves.

The full model's samples belong to the bench, which makes them once per seed. So the result of a job depends on nothing
but its fields and the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from unetc.artifacts.profile import Damage
from unetc.environment import describe
from unetc.errors import NonFiniteError
from unetc.jobs import Advance
from unetc.sampler.table import SchedulerTable, SchedulerTables

from .bench import EngineTimes, Measured, SearchBench
from .candidate import Candidate, Engines


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The damage of a plan."""

    damage: Damage
    tuned: SchedulerTable | None
    """Scheduler table with the rows that it was sampled with; None for the plain ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Sample a plan, with rows tuned to it on the same samples if wanted."""

    engines: Engines
    seed: int
    batches: int
    tune: bool

    @property
    def name(self) -> str:
        """Name in messages."""
        kind = "tuning" if self.tune else "sampling"
        return f"{kind} plan {self.engines.key()} on {self.batches} batches of seed {self.seed}"

    def run(self, bench: SearchBench, advance: Advance) -> Judged:
        """Measure the damage."""
        engines, tuned = self.engines, self.engines.tuned
        if self.tune:
            tuned, damage = bench.tune(engines, seed=self.seed, batches=self.batches)
        else:
            damage = bench.damage(engines, seed=self.seed, batches=self.batches)
        return Judged(damage=damage, tuned=tuned)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSchedule:
    """Sample with the full model along another schedule."""

    scheduler: SchedulerTables
    seed: int

    @property
    def name(self) -> str:
        """Name in messages."""
        _, rows = self.scheduler.to_array()
        key = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
        return f"sampling along schedule {key} of {self.scheduler.name} on seed {self.seed}"

    def run(self, bench: SearchBench, advance: Advance) -> Damage | None:
        """Measure the damage; None if the schedule gives NaN or infinity."""
        try:
            return bench.damage_along(self.scheduler, seed=self.seed)
        except NonFiniteError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEngines:
    """Time the engines of a plan."""

    engines: Engines

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"timing plan {self.engines.key()}"

    def run(self, bench: SearchBench, advance: Advance) -> EngineTimes:
        """Time each in turn with the others and with the full model."""
        return bench.time(self.engines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Time a plan while it samples, and measure its damage."""

    engines: Engines
    seed: int

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"measuring plan {self.engines.key()} on seed {self.seed}"

    def run(self, bench: SearchBench, advance: Advance) -> Measured:
        """Sample with the plan and with the full model alternately."""
        return bench.measure(self.engines, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBatches:
    """Time the full model and the engines of some plans at several batches."""

    plans: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"timing batches of plans {', '.join(plan.key() for plan in self.plans)}"

    def run(self, bench: SearchBench, advance: Advance) -> Mapping[bytes, tuple[tuple[int, float], ...]]:
        """Return numbers of samples with the median milliseconds of a call, by graph."""
        return bench.batch_ms(self.plans)


@dataclass(frozen=True, slots=True)
class DescribeMachine:
    """Describe the machine that a bench is on."""

    name: str = "the description of a machine"

    def run(self, bench: SearchBench, advance: Advance) -> dict[str, str]:
        """List its processor and its libraries."""
        return describe()
