"""The bench of a search: a target that is open, with the full model and the engines that were sampled last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.manifest import Measurement
from unetc.artifacts.profile import Damage
from unetc.backend import Backend, Program, SerialisedGraph
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.device import Tensor
from unetc.metrics.damage import measure_damage
from unetc.metrics.interval import estimate
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.decoder import Decoder
from unetc.runtime.rollout import FULL_ENGINE
from unetc.runtime.rows import own_half
from unetc.runtime.session import Session
from unetc.sampler.table import SchedulerTable, SchedulerTables
from unetc.timing import interleaved_ms

from .candidate import Candidate, Engines
from .tune import Recording, record, tune

ENGINE_ROUNDS = 15
ENGINE_SECONDS = 5.0
"""Least time spent on engines with short calls: a disturbance of the machine may last a second or two."""
SAMPLING_ROUNDS = 5
"""Batches on which damage is measured, and least rounds of timing."""
SAMPLING_SECONDS = 10.0
"""Least time spent on plans with short sampling runs: a share of a budget is a small part of the full model's time."""
LARGEST_BATCH = 32
"""Largest batch that engines are timed at, unless the profile's is larger."""
LONGEST_CALL_MS = 250.0
"""Batches above the profile's are left out where a call of the full model would take longer."""
BATCH_ROUNDS = 5
BATCH_SECONDS = 1.0
RECORDED_BYTES = 2**30
"""Most memory for the full model's trajectories that rows are tuned on."""
_FEWEST_ENGINES = 12
"""Engines that stay loaded, however large they are."""
_ENGINE_BYTES = 2**31
"""Memory for further engines: searches sample plans in turn, and each has its own copy of the weights that it packs."""

RUINED = Damage(relative_l2=estimate([1e6]), psnr=estimate([-100.0]), ssim=estimate([-1.0]))
"""Damage of a plan with NaN or infinity. The full model makes such steps again, so the images themselves look good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A plan that was timed while it sampled."""

    measurement: Measurement
    non_finite_steps: int
    """Steps that gave NaN or infinity, which the full model made again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderGraph:
    """The decoder, as a graph with its weights."""

    graph: bytes
    scale: int
    """Image pixels per latent pixel, along each side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How plans are sampled."""

    full: Engines
    """The full model, as the only engine of a plan."""
    scheduler: SchedulerTables
    sample_shape: tuple[int, int, int]
    predicted_channels: int
    batch: int
    """Samples per call."""
    steps: int
    """Number of steps that plans are measured at."""
    conditions: Conditions = UNCONDITIONAL
    """Conditions of the samples: sample k gets row k, modulo their number."""
    decoder: DecoderGraph | None = None
    """Turns samples into images, on which damage is measured; None if they are images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchEquipment:
    """All that the bench of a search needs besides an open target."""

    sampling: Sampling
    weights: bytes
    """Content of the weights file of all graphs."""

    def packed(self) -> SearchEquipment:
        """Return it as it is."""
        return self

    def on(self, backend: Backend) -> SearchBench:
        """Set up the bench."""
        return SearchBench(self.sampling, self.weights, backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """Times of the engines of a plan, each in turn with the others and with the full model."""

    full_ms: float
    """Median milliseconds per call of the full model."""
    step_ms: tuple[float, ...]
    """Median milliseconds per call of every engine."""
    time_ratio: float
    """Time of the schedule's engine calls / as many calls of the full model."""


class SearchBench:
    """Samples and times plans."""

    def __init__(self, sampling: Sampling, weights: bytes, backend: Backend) -> None:
        """Take the weights; engines are loaded when they are needed.

        Args:
            sampling: How plans are sampled.
            weights: Content of the weights file of all graphs.
            backend: The target, opened.
        """
        decoder = sampling.decoder
        self._sampling = sampling
        self._decoder = Decoder(decoder.graph, decoder.scale, backend) if decoder else None
        self._device = backend.device
        self._loader = backend.open_weights(weights)
        self._most_engines = max(_FEWEST_ENGINES, _ENGINE_BYTES // max(1, len(weights)))
        self._programs: dict[bytes, Program] = {}
        self._references: dict[tuple[int, int], NDArray[np.float32]] = {}
        self._recordings: dict[tuple[int, int], tuple[Recording, NDArray[np.float32]]] = {}
        """Trajectories of the full model and their images, by seed and batch."""

    def session(self, engines: Engines) -> Session:
        """Open a session over the engines of a plan."""
        own = self._sampling
        return Session(
            plan=engines.plan,
            full=self._load(own.full.graphs[FULL_ENGINE]),
            programs=[self._load(graph) for graph in engines.graphs],
            scheduler=own.scheduler,
            sample_shape=own.sample_shape,
            steps=own.steps,
            predicted_channels=own.predicted_channels,
            conditions=own.conditions,
            decoder=self._decoder,
            device=self._device,
            tuned=engines.tuned,
        )

    def _load(self, graph: SerialisedGraph) -> Program:
        """Load a graph, or find it among those loaded last."""
        program = self._programs.pop(graph.graph, None)
        if program is None:
            program = self._loader.load(graph)
        self._programs[graph.graph] = program
        while len(self._programs) > self._most_engines:
            del self._programs[next(iter(self._programs))]
        return program

    def damage(self, engines: Engines, *, seed: int, batches: int = 1) -> Damage:
        """Sample with a plan and compare it with the full model's samples, made once per seed; NaN gives `RUINED`."""
        session = self.session(engines)
        parts = [
            (self._reference(session, seed, batch), self._sample(session, seed, batch)) for batch in range(batches)
        ]
        if session.non_finite_steps:
            return RUINED
        return measure_damage(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def damage_along(self, scheduler: SchedulerTables, *, seed: int) -> Damage:
        """Sample one batch with the full model along another schedule and compare it with the full model's own.

        Raises:
            NonFiniteError: If the other schedule gives NaN or infinity.
        """
        session = self.session(self._sampling.full)
        sampled = session.along(scheduler).sample(self._sampling.batch, seed=seed, full_model=True)
        return measure_damage(self._reference(session, seed), sampled)

    def _reference(self, session: Session, seed: int, batch: int = 0) -> NDArray[np.float32]:
        """Sample one batch with the full model, once per seed."""
        if (seed, batch) not in self._references:
            self._references[seed, batch] = self._sample(session, seed, batch, full_model=True)
        return self._references[seed, batch]

    def _sample(
        self,
        session: Session,
        seed: int,
        batch: int,
        *,
        full_model: bool = False,
        latents: bool = False,
        conditions: Conditions | None = None,
    ) -> NDArray[np.float32]:
        """Sample one batch of a seed, perhaps under other conditions."""
        size = self._sampling.batch
        first = batch * size
        taken = None if conditions is None else conditions.take(range(first, first + size))
        return session.sample(
            size, seed=seed, first_index=first, full_model=full_model, latents=latents, conditions=taken
        )

    def tune(self, engines: Engines, *, seed: int, batches: int) -> tuple[SchedulerTable | None, Damage]:
        """Tune the rows of the scheduler table to a plan.

        Args:
            engines: The plan with its engines.
            seed: Seed of the noise.
            batches: Number of batches to tune on; fewer where their trajectories would take too much memory.

        Returns:
            The tuned table, and the plan's damage on the samples that it was tuned on. Nothing is tuned to a plan that
            computes everything in full.
        """
        own, session = self._sampling, self.session(engines)
        if set(session.schedule(own.steps)) == {FULL_ENGINE}:
            return engines.tuned, self.damage(engines, seed=seed)
        table = own.scheduler.table(own.steps)
        size = 4 * own.batch * table.steps * int(np.prod(own.sample_shape))
        batches = min(batches, max(1, RECORDED_BYTES // size))
        recordings, images = zip(*(self._recording(session, seed, batch) for batch in range(batches)), strict=True)
        tuned = tune(session, table, recordings)
        if session.non_finite_steps:
            return engines.tuned, RUINED
        return tuned.table, measure_damage(np.concatenate(images), session.decode(tuned.samples))

    def _recording(self, session: Session, seed: int, batch: int) -> tuple[Recording, NDArray[np.float32]]:
        """Record one batch of the full model and decode it, once per seed."""
        if (seed, batch) not in self._recordings:
            size = self._sampling.batch
            indices = range(batch * size, (batch + 1) * size)
            recording = record(session, indices, seed=seed, steps=self._sampling.steps)
            self._recordings[seed, batch] = recording, session.decode(recording.samples[-1])
        return self._recordings[seed, batch]

    def measure(self, engines: Engines, *, seed: int) -> Measured:
        """Sample with the plan and with the full model alternately, on the same noise.

        Args:
            engines: The plan with its engines.
            seed: Seed of the noise, one that neither the profile nor the search has seen.
        """
        conditions, session = self._sampling.conditions, self.session(engines)
        # the time of a ControlNet is no part of the denoiser's, so times are measured without one
        without = replace(conditions, control=None)
        full: list[NDArray[np.float32]] = []
        pruned: list[NDArray[np.float32]] = []

        def sample(*, full_model: bool) -> None:
            into = full if full_model else pruned
            into.append(self._sample(session, seed, len(into), full_model=full_model, latents=True, conditions=without))

        calls = [partial(sample, full_model=True), partial(sample, full_model=False)]
        times = interleaved_ms(calls, rounds=SAMPLING_ROUNDS, warmup=0, seconds=SAMPLING_SECONDS)
        ratios = times[:, 1] / times[:, 0]
        del full[SAMPLING_ROUNDS:], pruned[SAMPLING_ROUNDS:]
        if conditions.control is not None:
            full, pruned = (
                [self._sample(session, seed, i, full_model=full_model, latents=True) for i in range(SAMPLING_ROUNDS)]
                for full_model in (True, False)
            )
        images = [session.decode(part) for part in full]
        self._references |= {(seed, i): image for i, image in enumerate(images)}
        damage = measure_damage(np.concatenate(images), session.decode(np.concatenate(pruned)))
        return Measured(
            measurement=Measurement(time_ratio=float(np.median(ratios)), damage=damage),
            non_finite_steps=session.non_finite_steps,
        )

    def time(self, engines: Engines) -> EngineTimes:
        """Time the engines of a plan, each in turn with the others and with the full model."""
        session = self.session(engines)
        halved = [self._sampling.conditions.paired and engine.halves for engine in engines.plan.engines]
        full_times, times = self._time(session.full, session.programs, halved)
        used = session.schedule(self._sampling.steps)
        ratio = np.median(times[:, used].sum(axis=1) / (full_times * len(used)))
        return EngineTimes(
            full_ms=float(np.median(full_times)),
            step_ms=tuple(np.median(times, axis=0).tolist()),
            time_ratio=float(ratio),
        )

    def _time(
        self, full: Program, programs: Sequence[Program], halved: Sequence[bool]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Measure milliseconds per alternating call: [round] for the full model, [round, program] for the others.

        Programs that are marked as halved are called with the rows of the samples' own conditions alone.
        """
        inputs, output = self._call_of(self._sampling.batch, programs[FULL_ENGINE : FULL_ENGINE + 1])
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
        graphs = {one.graph: one for engines in (self._sampling.full, *candidates) for one in engines.graphs}
        programs = {key: self._load(graph) for key, graph in graphs.items()}
        emitters = [programs[candidate.graphs[FULL_ENGINE].graph] for candidate in candidates]
        own = self._sampling.batch
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
        sample = np.random.default_rng(0).standard_normal((batch, *self._sampling.sample_shape)).astype(np.float32)
        device = self._device
        inputs = dict(self._sampling.conditions.take(range(batch)).on(device).widen(device.put(sample), 500.0))
        output = device.empty((len(inputs["sample"]), self._sampling.predicted_channels, *sample.shape[2:]))
        cache = BranchCache(device=device)
        for emitter in dict.fromkeys(emitters):
            cache.store(emitter(inputs, output), 550.0)
        return inputs | cache.inputs(500.0, rows=len(output)), output
