"""Workers whose timings are made by hand: measured times never repeat, and decide which plans are searched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import checkout  # noqa: F401 - makes unetc importable
import msgspec
import numpy as np

from unetc.artifacts.profile import STEP
from unetc.compiler.search.bench import EngineTimes, SearchBench
from unetc.compiler.search.candidate import Engines
from unetc.compiler.search.jobs import Measure, TimeBatches, TimeEngines
from unetc.jobs import Advance, Job, Result, Workers, ignore
from unetc.sampler.table import SchedulerTable


@dataclass(frozen=True, kw_only=True)
class HandTimed(Workers[SearchBench]):
    """Workers whose results have made-up times: a treated component saves 7 % of a call, a step all of it."""

    workers: Workers[SearchBench]
    table: SchedulerTable
    """The scheduler at the number of steps of the search."""
    alone: list[str] = field(default_factory=list)
    """Names of the jobs that ran alone."""

    @property
    def machine(self) -> str:
        """Kind of the machines."""
        return self.workers.machine

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the machines."""
        return self.workers.notes

    def run(self, jobs: Iterable[Any], **how: Any) -> Iterator[tuple[int, Any]]:
        """Run jobs."""
        return self.workers.run(jobs, **how)

    def run_alone(self, job: Job[SearchBench, Result], advance: Advance = ignore) -> Result:
        """Make up the times of a job; run it if it also measures damage."""
        self.alone.append(job.name)
        result: Any
        match job:
            case TimeEngines():
                result = self.times(job.engines)
            case TimeBatches():
                result = {graph.graph: ((1, 1.0),) for plan in job.plans for graph in plan.graphs}
            case Measure():
                measured = self.workers.run_alone(job)
                ratio = self.sampled_ratio(self.times(job.engines).time_ratio)
                result = replace(measured, measurement=msgspec.structs.replace(measured.measurement, time_ratio=ratio))
            case _:
                raise AssertionError(f"{job.name} needs no machine for itself")
        return result

    def sampled_ratio(self, by_engines: float) -> float:
        """Make up the time ratio of a plan while it samples."""
        return by_engines

    def times(self, engines: Engines) -> EngineTimes:
        """Make up the times of a plan's engines."""
        step_ms = tuple(
            0.0 if STEP in own.treatments else 1 - min(0.9, 0.07 * len(own.treatments)) for own in engines.plan.engines
        )
        schedule = engines.plan.schedule(self.table.log_snr.tolist())
        return EngineTimes(
            full_ms=1.0, step_ms=step_ms, time_ratio=float(np.mean([step_ms[engine] for engine in schedule]))
        )

    def sharing(self, shared: Any) -> Any:
        """Refuse."""
        raise AssertionError("a search shares nothing")
