"""Turn plans into engines and measure them jointly, on this machine or on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

import unetc
from unetc.artifacts.plan import Assignment, Phase, Plan, Prediction
from unetc.artifacts.profile import Damage, Profile
from unetc.backend import SerialisedGraph
from unetc.compiler.engines import compile_engines, compile_full
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.planner.schedule import phases_of
from unetc.jobs import Advance, Workers, ignore, run_all, run_one
from unetc.runtime.rollout import FULL_ENGINE
from unetc.sampler.table import SchedulerTables

from .bench import Measured, Sampling, SearchBench
from .candidate import Candidate, Engines
from .jobs import DescribeMachine, Judge, JudgeSchedule, Measure, TimeBatches, TimeEngines

TUNED_BATCHES = 4
"""Batches that rows are tuned on at last."""


def full_model(gated: GatedGraph, profile: Profile) -> Engines:
    """Specialise the full model, as the only engine of a plan."""
    plan = Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=0.0,
        max_engines=0,
        engines=(Assignment(treatments={}),),
        phases=(Phase(low=profile.bins[0].low, high=profile.bins[-1].high, cycle=(FULL_ENGINE,)),),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=1.0),
    )
    return Engines(plan=plan, graphs=(compile_full(gated),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """Specialises the plans of one profile, and has them measured."""

    gated: GatedGraph
    profile: Profile
    """The graph's analysis."""
    sampling: Sampling
    """How plans are sampled: with the profile's scheduler and batch."""
    workers: Workers[SearchBench]

    @property
    def scheduler(self) -> SchedulerTables:
        """The profile's scheduler."""
        return self.sampling.scheduler

    @property
    def steps(self) -> int:
        """Number of steps that plans are measured at."""
        return self.sampling.steps

    @property
    def full(self) -> SerialisedGraph:
        """The full model."""
        (graph,) = self.sampling.full.graphs
        return graph

    def compile(self, plan: Plan) -> Candidate:
        """Specialise the engines of a plan, and time each in turn with the others and with the full model.

        Raises:
            CompileError: If a graph cannot be specialised.
        """
        engines = Engines(plan=plan, graphs=compile_engines(self.gated, plan, self.profile))
        times = self.workers.run_alone(TimeEngines(engines=engines))
        return Candidate(
            plan=plan,
            graphs=engines.graphs,
            full_ms=times.full_ms,
            step_ms=times.step_ms,
            time_ratio=times.time_ratio,
        )

    def schedule(self, candidate: Candidate) -> tuple[int, ...]:
        """Return the engine of each step."""
        return candidate.plan.schedule(self._levels)

    @property
    def _levels(self) -> list[float]:
        """Noise level of each step."""
        levels: list[float] = self.scheduler.table(self.steps).log_snr.tolist()
        return levels

    def phases_of(self, candidate: Candidate, schedule: Sequence[int]) -> tuple[Phase, ...]:
        """Write a schedule, one engine per step, as phases over the noise levels of a candidate's plan."""
        outer = candidate.plan.phases
        return phases_of(schedule, self._levels, outer[0].low, outer[-1].high)

    def reschedule(self, candidate: Candidate, schedule: Sequence[int]) -> Candidate:
        """Change the schedule of a candidate, with plain rows; its time follows from the engines' times.

        Engine 0 replaces an engine that needs a branch which no earlier step emitted.
        """
        plan = msgspec.structs.replace(candidate.plan, phases=self.phases_of(candidate, schedule))
        changed = replace(candidate, plan=plan, tuned=None)
        used, before = self.schedule(changed), self.schedule(candidate)
        full = candidate.full_ms * len(used)
        change = sum(candidate.step_ms[e] for e in used) - sum(candidate.step_ms[e] for e in before)
        return replace(changed, time_ratio=candidate.time_ratio + change / full)

    def plain(self, candidate: Candidate) -> Candidate:
        """Give a candidate the scheduler's plain rows."""
        return replace(candidate, tuned=None)

    def judge(
        self, candidates: Sequence[Candidate], *, seed: int, batches: int, tune: bool, advance: Advance = ignore
    ) -> list[tuple[Candidate, Damage]]:
        """Sample with plans and compare each with the full model's samples.

        Args:
            candidates: The plans with their engines.
            seed: Seed of the noise.
            batches: Number of batches. Rows are tuned on fewer where their trajectories would take too much memory.
            tune: Whether to tune the rows of the scheduler table to each plan on the same samples.
            advance: Told how many plans were sampled.

        Returns:
            Each candidate with the rows that it was sampled with, and its damage.
        """
        jobs = [Judge(engines=one, seed=seed, batches=batches, tune=tune) for one in candidates]
        return [
            (replace(one, tuned=judged.tuned), judged.damage)
            for one, judged in zip(candidates, run_all(self.workers, jobs, advance), strict=True)
        ]

    def damages(
        self, candidates: Sequence[Candidate], *, seed: int, batches: int = 1, advance: Advance = ignore
    ) -> list[Damage]:
        """Sample with plans as they are; see `judge`."""
        judged = self.judge(candidates, seed=seed, batches=batches, tune=False, advance=advance)
        return [damage for _, damage in judged]

    def damage(self, candidate: Candidate, *, seed: int, batches: int = 1) -> Damage:
        """Sample with a plan as it is; see `judge`."""
        (damage,) = self.damages((candidate,), seed=seed, batches=batches)
        return damage

    def tune(self, candidate: Candidate, *, seed: int, batches: int) -> tuple[Candidate, Damage]:
        """Tune the rows of the scheduler table to a plan; see `judge`."""
        (tuned,) = self.judge((candidate,), seed=seed, batches=batches, tune=True)
        return tuned

    def damages_along(self, schedules: Sequence[SchedulerTables], *, seed: int) -> list[Damage | None]:
        """Sample one batch with the full model along other schedules and compare each with the full model's own.

        Args:
            schedules: The schedules, each for one number of steps.
            seed: Seed of the noise.

        Returns:
            Damages; None for a schedule that gives NaN or infinity.
        """
        return run_all(self.workers, [JudgeSchedule(scheduler=one, seed=seed) for one in schedules])

    def measure(self, candidate: Candidate, *, seed: int) -> Measured:
        """Sample with the plan and with the full model alternately, on the same noise.

        Args:
            candidate: The plan with its engines.
            seed: Seed of the noise, one that neither the profile nor the search has seen.
        """
        return self.workers.run_alone(Measure(engines=candidate, seed=seed))

    def batch_ms(self, candidates: Sequence[Candidate]) -> Mapping[bytes, tuple[tuple[int, float], ...]]:
        """Time the full model and the engines of some plans at several batches.

        Returns:
            Numbers of samples with the median milliseconds of a call, by graph.
        """
        return self.workers.run_alone(TimeBatches(plans=tuple(candidates)))

    def machine(self) -> dict[str, str]:
        """Describe the machine that measures."""
        return run_one(self.workers, DescribeMachine())
