"""Turn plans into loaded engines and measure them jointly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.manifest import Measurement
from unetc.artifacts.plan import Phase, Plan
from unetc.artifacts.profile import Damage, Profile
from unetc.backend import Backend, Program, SerialisedGraph
from unetc.compiler.engines import compile_engines, compile_full
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.planner.schedule import phases_of
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.device import Tensor
from unetc.metrics.damage import measure_damage
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.decoder import Decoder
from unetc.runtime.rollout import FULL_ENGINE
from unetc.runtime.rows import own_half
from unetc.runtime.session import Session
from unetc.sampler.table import SchedulerTable, SchedulerTables
from unetc.timing import interleaved_ms

from .tune import Recording, record, tune

ENGINE_ROUNDS = 15
ENGINE_SECONDS = 5.0
"""Least time spent on engines with short calls: a disturbance of the machine may last a second or two."""
SAMPLING_ROUNDS = 5
TUNED_BATCHES = 4
"""Batches that rows are tuned on at last."""
LARGEST_BATCH = 32
"""Largest batch that engines are timed at, unless the profile's is larger."""
LONGEST_CALL_MS = 250.0
"""Batches above the profile's are left out where a call of the full model would take longer."""
BATCH_ROUNDS = 5
BATCH_SECONDS = 1.0
RECORDED_BYTES = 2**30
"""Most memory for the full model's trajectories that rows are tuned on."""
_LOADED_ENGINES = 12
"""Engines kept for the next plan; each has its own copy of the weights that it packs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan with its engines, loaded and timed."""

    plan: Plan
    graphs: tuple[SerialisedGraph, ...]
    programs: tuple[Program, ...]
    session: Session
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

    @property
    def tuned(self) -> SchedulerTable | None:
        """Scheduler table with rows tuned to the plan; None without."""
        return self.session.tuned


class Workbench:
    """Compiles and measures plans of one profile on one backend."""

    def __init__(
        self,
        gated: GatedGraph,
        profile: Profile,
        scheduler: SchedulerTables,
        backend: Backend,
        *,
        steps: int,
        conditions: Conditions = UNCONDITIONAL,
        decoder: Decoder | None = None,
    ) -> None:
        """Set up for a profile.

        Args:
            gated: The graph.
            profile: The graph's analysis.
            scheduler: The profile's scheduler.
            backend: The profile's target.
            steps: Number of steps that plans are measured at.
            conditions: Conditions of the samples: sample k gets row k, modulo their number.
            decoder: Turns samples into images, on which damage is measured.
        """
        self.profile = profile
        self.scheduler = scheduler
        self.steps = steps
        self.full = compile_full(gated)
        self._conditions = conditions
        self._decoder = decoder
        self._gated = gated
        self._device = backend.device
        self._loader = backend.open_weights(gated.weights.read_bytes())
        self._programs: dict[bytes, Program] = {}
        self._references: dict[tuple[int, int], NDArray[np.float32]] = {}
        self._recordings: dict[tuple[int, int], tuple[Recording, NDArray[np.float32]]] = {}
        """Trajectories of the full model and their images, by seed and batch."""

    def compile(self, plan: Plan) -> Candidate:
        """Specialise, load and time the engines of a plan, each in turn with the others and with the full model.

        Raises:
            CompileError: If a graph cannot be specialised.
        """
        graphs = compile_engines(self._gated, plan, self.profile)
        full, *programs = (self._load(graph) for graph in (self.full, *graphs))
        halved = [self._conditions.paired and engine.halves for engine in plan.engines]
        full_times, times = self._time(full, programs, halved)
        session = self._session(plan, programs)
        used = session.schedule(self.steps)
        ratio = np.median(times[:, used].sum(axis=1) / (full_times * len(used)))
        return Candidate(
            plan=plan,
            graphs=graphs,
            programs=tuple(programs),
            session=session,
            full_ms=float(np.median(full_times)),
            step_ms=tuple(np.median(times, axis=0).tolist()),
            time_ratio=float(ratio),
        )

    def schedule(self, candidate: Candidate) -> tuple[int, ...]:
        """Return the engine of each step."""
        return candidate.session.schedule(self.steps)

    def phases_of(self, candidate: Candidate, schedule: Sequence[int]) -> tuple[Phase, ...]:
        """Write a schedule, one engine per step, as phases over the noise levels of a candidate's plan."""
        outer = candidate.plan.phases
        levels = self.scheduler.table(self.steps).log_snr.tolist()
        return phases_of(schedule, levels, outer[0].low, outer[-1].high)

    def reschedule(self, candidate: Candidate, schedule: Sequence[int]) -> Candidate:
        """Change the schedule of a candidate; its time follows from the engines' times.

        Engine 0 replaces an engine that needs a branch which no earlier step emitted.
        """
        plan = msgspec.structs.replace(candidate.plan, phases=self.phases_of(candidate, schedule))
        session = self._session(plan, candidate.programs)
        used, before = session.schedule(self.steps), self.schedule(candidate)
        full = candidate.full_ms * len(used)
        change = sum(candidate.step_ms[e] for e in used) - sum(candidate.step_ms[e] for e in before)
        return replace(candidate, plan=plan, session=session, time_ratio=candidate.time_ratio + change / full)

    def damage(self, candidate: Candidate, *, seed: int, batches: int = 1) -> Damage:
        """Sample with a plan and compare it with the full model's samples, which are made once per seed."""
        parts = [
            (self._reference(candidate, seed, batch), self._sample(candidate, seed, batch)) for batch in range(batches)
        ]
        return measure_damage(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def damage_along(self, candidate: Candidate, scheduler: SchedulerTables, *, seed: int) -> Damage:
        """Sample one batch with the full model along another schedule and compare it with the full model's own.

        Args:
            candidate: Any plan; its session has the full model.
            scheduler: The other schedule.
            seed: Seed of the noise.
        """
        session = candidate.session.along(scheduler)
        sampled = session.sample(self.profile.batch, seed=seed, full_model=True)
        return measure_damage(self._reference(candidate, seed), sampled)

    def _reference(self, candidate: Candidate, seed: int, batch: int = 0) -> NDArray[np.float32]:
        """Sample one batch with the full model, once per seed."""
        if (seed, batch) not in self._references:
            self._references[seed, batch] = self._sample(candidate, seed, batch, full_model=True)
        return self._references[seed, batch]

    def _sample(
        self, candidate: Candidate, seed: int, batch: int, *, full_model: bool = False, latents: bool = False
    ) -> NDArray[np.float32]:
        """Sample one batch of a seed."""
        size = self.profile.batch
        return candidate.session.sample(
            size, seed=seed, first_index=batch * size, full_model=full_model, latents=latents
        )

    def tune(self, candidate: Candidate, *, seed: int, batches: int) -> tuple[Candidate, Damage]:
        """Tune the rows of the scheduler table to a plan.

        Args:
            candidate: The plan with its engines.
            seed: Seed of the noise.
            batches: Number of batches to tune on; fewer where their trajectories would take too much memory.

        Returns:
            The candidate with the tuned table, and its damage on the samples that it was tuned on.
        """
        if set(self.schedule(candidate)) == {FULL_ENGINE}:
            return candidate, self.damage(candidate, seed=seed)
        table = self.scheduler.table(self.steps)
        size = 4 * self.profile.batch * table.steps * int(np.prod(self.profile.sample_shape))
        batches = min(batches, max(1, RECORDED_BYTES // size))
        recordings, images = zip(*(self._recording(candidate, seed, batch) for batch in range(batches)), strict=True)
        tuned = tune(candidate.session, table, recordings)
        damage = measure_damage(np.concatenate(images), candidate.session.decode(tuned.samples))
        session = self._session(candidate.plan, candidate.programs, tuned.table)
        return replace(candidate, session=session), damage

    def _recording(self, candidate: Candidate, seed: int, batch: int) -> tuple[Recording, NDArray[np.float32]]:
        """Record one batch of the full model and decode it, once per seed."""
        if (seed, batch) not in self._recordings:
            indices = range(batch * self.profile.batch, (batch + 1) * self.profile.batch)
            recording = record(candidate.session, indices, seed=seed, steps=self.steps)
            self._recordings[seed, batch] = recording, candidate.session.decode(recording.samples[-1])
        return self._recordings[seed, batch]

    def measure(self, candidate: Candidate, *, seed: int) -> Measurement:
        """Sample with the plan and with the full model alternately, on the same noise.

        Args:
            candidate: The plan with its engines.
            seed: Seed of the noise, one that neither the profile nor the search has seen.
        """
        batch = self.profile.batch
        ratios: list[float] = []
        full: list[NDArray[np.float32]] = []
        pruned: list[NDArray[np.float32]] = []
        for i in range(SAMPLING_ROUNDS):
            # the time of a ControlNet is no part of the denoiser's, so times are measured without one
            timed = replace(self._conditions, control=None).take(range(i * batch, (i + 1) * batch))
            sample = partial(
                candidate.session.sample, batch, seed=seed, first_index=i * batch, conditions=timed, latents=True
            )
            times = interleaved_ms(
                [lambda s=sample: full.append(s(full_model=True)), lambda s=sample: pruned.append(s())],  # type: ignore[misc]
                rounds=1,
                warmup=0,
            )
            ratios.append(float(times[0, 1] / times[0, 0]))
        if self._conditions.control is not None:
            full, pruned = (
                [self._sample(candidate, seed, i, full_model=full_model, latents=True) for i in range(SAMPLING_ROUNDS)]
                for full_model in (True, False)
            )
        images = [candidate.session.decode(part) for part in full]
        self._references |= {(seed, i): image for i, image in enumerate(images)}
        damage = measure_damage(np.concatenate(images), candidate.session.decode(np.concatenate(pruned)))
        return Measurement(time_ratio=float(np.median(ratios)), damage=damage)

    def plain(self, candidate: Candidate) -> Candidate:
        """Give a candidate the scheduler's plain rows."""
        return replace(candidate, session=self._session(candidate.plan, candidate.programs))

    def _session(self, plan: Plan, programs: Sequence[Program], tuned: SchedulerTable | None = None) -> Session:
        return Session(
            plan=plan,
            full=self._load(self.full),
            programs=programs,
            scheduler=self.scheduler,
            sample_shape=self.profile.sample_shape,
            steps=self.steps,
            predicted_channels=self._gated.predicted_channels,
            conditions=self._conditions,
            decoder=self._decoder,
            device=self._device,
            tuned=tuned,
        )

    def _load(self, graph: SerialisedGraph) -> Program:
        """Load a graph, or find it among those loaded last."""
        program = self._programs.pop(graph.graph, None)
        if program is None:
            program = self._loader.load(graph)
        self._programs[graph.graph] = program
        while len(self._programs) > _LOADED_ENGINES:
            del self._programs[next(iter(self._programs))]
        return program

    def _time(
        self, full: Program, programs: Sequence[Program], halved: Sequence[bool]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Measure milliseconds per alternating call: [round] for the full model, [round, program] for the others.

        Programs that are marked as halved are called with the rows of the samples' own conditions alone.
        """
        inputs, output = self._call_of(self.profile.batch, programs[FULL_ENGINE : FULL_ENGINE + 1])
        half = own_half(inputs, output, self._device) if any(halved) else (inputs, output)
        wanted = list(zip(programs, halved, strict=True))
        distinct = list(dict.fromkeys(((full, False), *wanted)))  # engine 0 is the full model where it emits nothing
        calls = [partial(program, *(half if is_half else (inputs, output))) for program, is_half in distinct]
        times = interleaved_ms(calls, rounds=ENGINE_ROUNDS, wait=self._device.synchronize, seconds=ENGINE_SECONDS)
        return times[:, 0], times[:, [distinct.index(one) for one in wanted]]

    def batch_ms(self, candidates: Sequence[Candidate]) -> dict[bytes, tuple[tuple[int, float], ...]]:
        """Time the full model and the engines of some plans at several batches, each in turn with all others.

        Batches double from 1 to the profile's batch, and on to `LARGEST_BATCH` while a call of the full model takes no
        longer than `LONGEST_CALL_MS`. Guided calls have both halves, for every graph.

        Returns:
            Numbers of samples with the median milliseconds of a call, by graph.
        """
        programs = {self.full.graph: self._load(self.full)}
        for candidate in candidates:
            for graph, program in zip(candidate.graphs, candidate.programs, strict=True):
                programs.setdefault(graph.graph, program)
        emitters = [candidate.programs[FULL_ENGINE] for candidate in candidates]
        own = self.profile.batch
        most = max(own, min(LARGEST_BATCH, LONGEST_CALL_MS * own / candidates[0].full_ms))
        sizes = sorted({own, *(2**i for i in range(int(most).bit_length()))})
        calls: dict[tuple[bytes, int], Callable[[], object]] = {}
        for size in sizes:
            inputs, output = self._call_of(size, emitters)
            calls |= {(graph, size): partial(program, inputs, output) for graph, program in programs.items()}
        times = interleaved_ms(
            list(calls.values()),
            rounds=BATCH_ROUNDS,
            warmup=1,
            wait=self._device.synchronize,
            seconds=BATCH_SECONDS,
        )
        medians = dict(zip(calls, np.median(times, axis=0).tolist(), strict=True))
        return {graph: tuple((size, medians[graph, size]) for size in sizes) for graph in programs}

    def _call_of(self, batch: int, emitters: Sequence[Program]) -> tuple[dict[str, Tensor], Tensor]:
        """Make inputs and output of a call, with the branches that some engines emit at the step before it."""
        sample = np.random.default_rng(0).standard_normal((batch, *self.profile.sample_shape)).astype(np.float32)
        device = self._device
        inputs = dict(self._conditions.take(range(batch)).on(device).widen(device.put(sample), 500.0))
        output = device.empty((len(inputs["sample"]), self._gated.predicted_channels, *sample.shape[2:]))
        cache = BranchCache(device=device)
        for emitter in dict.fromkeys(emitters):
            cache.store(emitter(inputs, output), 550.0)
        return inputs | cache.inputs(500.0, rows=len(output)), output
