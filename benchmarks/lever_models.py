"""A model with a scheduler, on which plans are sampled whose engines a lever has changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.plan import Assignment, Plan, full_plan
from unetc.backend import Array, Backend, Program, SerialisedGraph
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.schedule import phases_of
from unetc.compiler.search.tune import Recording, record, tune
from unetc.metrics.distances import relative_l2
from unetc.metrics.interval import estimate
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.session import Session
from unetc.sampler.table import SchedulerTable, SchedulerTables
from unetc.timing import interleaved_ms

BATCH = 32
CALIBRATED = 16
"""Samples that dampings, corrections and tuned rows are found on."""
TIMED_BATCH = 8
CALIBRATED_SEED = 1001
"""Seed of these samples, and of the trajectories that weights are trained on."""
JUDGED_SEED = 2001
"""Seed of the samples that damages are measured on."""
RESAMPLES = 2000

Damages = NDArray[np.float64]
"""Relative L2 of every judged sample."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Regime:
    """The model with one scheduler."""

    gated: GatedGraph
    backend: Backend
    tables: SchedulerTables
    steps: int
    sample_shape: tuple[int, int, int]
    judged: int
    """Samples that damages are measured on."""
    _references: dict[int, Array] = field(default_factory=dict)
    _recordings: list[Recording] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.tables.name} {self.steps}"

    @property
    def table(self) -> SchedulerTable:
        """The scheduler's plain rows."""
        return self.tables.table(self.steps)

    def graph(self, engine: Assignment, means: Array | None = None) -> SerialisedGraph:
        """Specialise an engine; branch means are needed for a plan that replaces branches by them."""
        none = np.zeros(self.gated.channels, dtype=np.float32)
        return specialise(self.gated, engine.in_graph, none if means is None else means, engine.emits)

    def load(self, plan: Plan) -> list[Program]:
        """Specialise and load the engines of a plan that removes nothing."""
        loader = self.backend.open_weights(self.gated.read_weights())
        return [loader.load(self.graph(engine)) for engine in plan.engines]

    def session(self, plan: Plan, programs: Sequence[Program], tuned: SchedulerTable | None = None) -> Session:
        """Open a session over the engines of a plan."""
        return Session(
            plan=plan,
            full=programs[0],
            programs=programs,
            scheduler=self.tables,
            sample_shape=self.sample_shape,
            steps=self.steps,
            predicted_channels=self.gated.predicted_channels,
            device=self.backend.device,
            tuned=tuned,
        )

    def damages(self, session: Session, seed: int = JUDGED_SEED) -> Damages:
        """Sample with a plan and compare every sample with the full model's."""
        count = self.judged if seed == JUDGED_SEED else CALIBRATED
        sample = partial(_sample, session, count, seed)
        if seed not in self._references:
            self._references[seed] = sample(full_model=True)
        own = sample(full_model=False)
        assert session.non_finite_steps == 0
        return relative_l2(self._references[seed], own)

    def tune(self, session: Session) -> tuple[SchedulerTable, float]:
        """Tune the rows of the table to a plan; return it with the mean damage on the samples of the tuning."""
        if not self._recordings:
            self._recordings.append(record(session, range(CALIBRATED), seed=CALIBRATED_SEED, steps=self.steps))
        tuned = tune(session, self.table, self._recordings)
        return tuned.table, float(relative_l2(self._recordings[0].samples[-1], tuned.samples).mean())

    def time_ratio(self, plan: Plan, programs: Sequence[Program]) -> float:
        """Time the engines of a plan in turns with the full model; return the schedule's time / the full model's."""
        loader = self.backend.open_weights(self.gated.read_weights())
        full = loader.load(self.graph(Assignment(treatments={})))
        sample = np.random.default_rng(0).standard_normal((TIMED_BATCH, *self.sample_shape)).astype(np.float32)
        inputs = {"sample": sample, "timestep": np.full(TIMED_BATCH, 500.0, dtype=np.float32)}
        output, cache = np.empty_like(sample), BranchCache(device=self.backend.device)
        cache.store(programs[0](inputs, output), 550.0)
        inputs |= cache.inputs(500.0, rows=TIMED_BATCH)
        calls = [partial(program, inputs, output) for program in (full, *programs)]
        times = np.median(interleaved_ms(calls, rounds=20), axis=0)
        used = plan.schedule(self.table.log_snr.tolist())
        return float(np.mean([times[1 + engine] for engine in used]) / times[0])


def _sample(session: Session, count: int, seed: int, *, full_model: bool) -> Array:
    """Sample batches of a seed."""
    parts = [
        session.sample(min(BATCH, count - first), seed=seed, first_index=first, full_model=full_model)
        for first in range(0, count, BATCH)
    ]
    return np.concatenate(parts)


def read_plan(path: Path, *keys: str | int) -> Plan:
    """Read a plan inside a JSON file."""
    value = json.loads(path.read_text())
    for key in keys:
        value = value[key]
    return Plan.from_json(json.dumps(value).encode(), str(path))


def with_engines(plan: Plan, engines: Sequence[Assignment], schedule: Sequence[int], table: SchedulerTable) -> Plan:
    """Write a plan of the same model by hand."""
    outer = full_plan(plan).phases[0]
    phases = phases_of(schedule, table.log_snr.tolist(), outer.low, outer.high)
    return msgspec.structs.replace(plan, engines=tuple(engines), phases=phases)


def compared(damages: Damages, control: Damages) -> dict[str, float | list[float]]:
    """Summarise damages, and their mean / a control's on the same samples with its 95 % bootstrap interval."""
    own, generator = estimate(damages), np.random.default_rng(0)
    drawn = generator.integers(len(damages), size=(RESAMPLES, len(damages)))
    ratios = damages[drawn].mean(axis=1) / control[drawn].mean(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    return {
        "relative_l2": [own.mean, own.low, own.high],
        "of_control": [float(damages.mean() / control.mean()), low, high],
    }
