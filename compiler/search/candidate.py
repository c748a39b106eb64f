"""Plans with their engines, as plain values that travel to the machine that samples them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from unetc.artifacts.plan import Plan
from unetc.backend import SerialisedGraph
from unetc.sampler.table import SchedulerTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """A plan with its engines."""

    plan: Plan
    graphs: tuple[SerialisedGraph, ...]
    tuned: SchedulerTable | None = None
    """Scheduler table with rows tuned to the plan; None without."""

    def key(self) -> str:
        """Hash everything that its samples depend on, apart from the model and its target."""
        digest = hashlib.sha256(msgspec.json.encode((self.plan.engines, self.plan.phases)))
        for graph in self.graphs:
            digest.update(hashlib.sha256(graph.graph).digest())
        if self.tuned is not None:
            digest.update(self.tuned.sample_coefficients.tobytes() + self.tuned.prediction_coefficients.tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Engines):
    """A plan with its engines and their times."""

    full_ms: float
    """Median milliseconds per call of the full model, timed alternately with the engines."""
    step_ms: tuple[float, ...]
    """Median milliseconds per call of every engine."""
    time_ratio: float
    """Time of the schedule's engine calls / as many calls of the full model."""

    @property
    def saving(self) -> float:
        """Share of the full model's time that is saved."""
        return 1 - self.time_ratio
