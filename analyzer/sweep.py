"""The sweep: damage of ablations that reach the final output, resumable.

For a bin, the ablated trajectories start from the full model's trajectory at the first step of the bin (the shared
prefix is computed once). They carry their treatment through the bin, and the full model finishes them. Several
ablations share one batch, each with its own gates. One batch is one job with one result file, so a killed sweep
continues where it stopped. An interruption does not change how batches are cut, so the numbers are equal bit by bit.
An ablation that produces NaN or infinity has no effect; the others of its batch are measured as if it were not there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.profile import GUIDANCE, Bin, Component, Effect, NonFinite, without_guidance
from unetc.artifacts.record import Record, read_cached
from unetc.backend import Array
from unetc.compiler.graph.gate import gate_values
from unetc.errors import ProfileError
from unetc.jobs import Advance, Workers, finish
from unetc.metrics.distances import relative_l2
from unetc.metrics.interval import estimate
from unetc.progress import OnProgress, Progress
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.trajectory import Trajectory
from unetc.sampler.noise import initial_noise
from unetc.sampler.table import SchedulerTable
from unetc.treatments import Treatment

from .ablation import Ablation, PeriodicTreatment
from .bench import Bench
from .denoiser import GatedDenoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The ablations and trajectories of an analysis, without the denoiser."""

    components: Sequence[Component]
    """All components of the denoiser, and guidance where it is guided."""
    ablated: Sequence[Component]
    """Components to ablate."""
    table: SchedulerTable
    bins: tuple[Bin, ...]
    sample_shape: tuple[int, int, int]
    samples: int
    seed: int
    rows: int
    """Most samples in one batch."""

    @property
    def in_graph(self) -> Sequence[Component]:
        """Components that have a gate."""
        return without_guidance(tuple(self.components))

    @property
    def denoises(self) -> bool:
        """Whether the denoised sample follows from a prediction, so that it can be reused."""
        return self.table.prediction_type is not None

    @property
    def ablations_per_batch(self) -> int:
        """Number of ablations whose samples fit in one batch."""
        return max(1, self.rows // self.samples)

    def steps_of(self, bin_index: int) -> range:
        """List the steps of a bin."""
        first = sum(bin.steps for bin in self.bins[:bin_index])
        return range(first, first + self.bins[bin_index].steps)

    def of_first(self, samples: int) -> Outline:
        """Return the outline with only the first samples."""
        return replace(self, samples=samples)

    def on(self, denoiser: GatedDenoiser) -> Sweep:
        """Add the denoiser."""
        return Sweep(**{one.name: getattr(self, one.name) for one in fields(Outline)}, denoiser=denoiser)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep(Outline):
    """An outline with the denoiser that runs it."""

    denoiser: GatedDenoiser

    def of_first(self, samples: int) -> Sweep:
        """Return the sweep with only the first samples."""
        return replace(self, samples=samples, denoiser=self.denoiser.of_first(samples))

    def indices(self, count: int) -> NDArray[np.int64]:
        """Return the index within the seed of every sample in a batch of `count` ablations."""
        return np.tile(np.arange(self.samples), count)

    def timestep(self, step: int) -> float:
        """Return the scheduler's value at a step."""
        return float(self.table.timesteps[step])

    def log_snr(self, step: int) -> float:
        """Return the noise level at a step."""
        return float(self.table.log_snr[step])

    def gates(self, names: Sequence[str], treatment: Treatment) -> Array:
        """Return the gates of a batch of ablations, one component each, all with one treatment."""
        rows = [gate_values(self.in_graph, {name: treatment}) for name in names]
        return np.repeat(np.stack(rows), self.samples, axis=0)

    def recall(self, sample: Array, step: int, cache: BranchCache, names: Sequence[str], treatment: Treatment) -> Array:
        """Predict for a batch of ablations that each reuse the branch of one component."""
        index = {component.name: component.index for component in self.in_graph}
        own = [index[name] for name in names]
        marks = np.zeros((len(names), len(index)), dtype=np.float32)
        marks[np.arange(len(names)), own] = 1
        return self.denoiser.recall(
            sample,
            self.timestep(step),
            cache,
            log_snr=self.log_snr(step),
            treatments=dict.fromkeys(own, treatment),
            holds=np.repeat(marks, self.samples, axis=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FullTrajectory:
    """The full model's trajectory."""

    states: tuple[Trajectory, ...]
    """State before every step, and the last one."""
    means: NDArray[np.float32]
    """[bin, channel of all components], mean of every branch over the steps of the bin."""

    def seen(self, sweep: Sweep, step: int) -> Array:
        """Scale the samples of a sweep to the denoiser's input at a step."""
        seen: Array = self.states[step].seen(sweep.table, step)
        return seen[: sweep.samples]

    @property
    def final(self) -> Array:
        """The full model's samples, [sample, channel, height, width]."""
        final: Array = self.states[-1].sample
        return final


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A sweep and the full model's trajectory, from which ablations start: what their jobs run on."""

    sweep: Sweep
    base: FullTrajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCourse:
    """A course as it travels to workers, which have the denoiser."""

    outline: Outline
    base: FullTrajectory

    def on(self, bench: Bench) -> Course:
        """Add the denoiser."""
        return Course(sweep=self.outline.on(bench.denoiser), base=self.base)


class Swept(Record, frozen=True, kw_only=True):
    """Results of ablations that were carried to the final output."""

    effects: tuple[Effect, ...]
    non_finite: tuple[NonFinite, ...]

    @property
    def all(self) -> tuple[Effect | NonFinite, ...]:
        """All results."""
        return (*self.effects, *self.non_finite)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The job of a batch of ablations: one treatment of several components in one bin."""

    bin: int
    periodic: PeriodicTreatment
    names: tuple[str, ...]
    calls: int
    """Denoiser calls per sample."""

    @property
    def name(self) -> str:
        """Name of the result's file."""
        key = hashlib.sha256(repr((self.periodic, self.names)).encode()).hexdigest()[:16]
        return f"bin{self.bin:02d}-{self.periodic.treatment}{self.periodic.period}-{key}.json"

    def read(self, path: Path) -> Swept | None:
        """Read the result; None if the file is missing or damaged, so that the job has to run again."""
        if (result := read_cached(path, Swept)) is None:
            return None
        wanted = {(name, self.periodic.treatment, self.periodic.period, self.bin) for name in self.names}
        return result if {one.key for one in result.all} == wanted else None

    def run(self, course: Course, advance: Advance) -> Swept:
        """Carry the ablations to the final output."""
        return _run(course.sweep, course.base, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBase:
    """The job of the full model's trajectory."""

    outline: Outline
    name: str = "the full model's trajectory"

    def run(self, bench: Bench, advance: Advance) -> FullTrajectory:
        """Sample with the full model."""
        return run_base(self.outline.on(bench.denoiser), lambda progress: advance(progress.done))


def make_bins(log_snr: NDArray[np.float64], count: int) -> tuple[Bin, ...]:
    """Cut a schedule into bins of equal numbers of steps (as nearly as possible), from high to low noise."""
    parts = [part for part in np.array_split(log_snr, count) if len(part)]
    edges = [float(parts[0][0])]
    edges += [float((left[-1] + right[0]) / 2) for left, right in pairwise(parts)]
    edges.append(float(parts[-1][-1]) + 1.0)
    return tuple(
        Bin(low=low, high=high, steps=len(part)) for low, high, part in zip(edges, edges[1:], parts, strict=False)
    )


def run_base(sweep: Sweep, on_progress: OnProgress) -> FullTrajectory:
    """Sample with the full model, keeping the state before every step and the mean of every branch.

    Raises:
        ProfileError: If the full model produces NaN or infinity.
    """
    indices = sweep.indices(1)
    trajectory = Trajectory.start(sweep.table, initial_noise(sweep.seed, indices.tolist(), sweep.sample_shape))
    gates = sweep.denoiser.gates({}, sweep.samples)
    states = [trajectory]
    means: list[Array] = []
    for step in range(sweep.table.steps):
        seen, timestep = trajectory.seen(sweep.table, step), sweep.timestep(step)
        means.append(sweep.denoiser.branch_means(seen, timestep))
        prediction = sweep.denoiser.predict(seen, timestep, gates=gates, means=means[step])
        if not np.isfinite(prediction).all():
            raise ProfileError(
                f"the full model produces NaN or infinity at step {step + 1} of {sweep.table.steps} (timestep "
                f"{timestep:g}), {_first_non_finite(sweep, means[step])}. Check that the weights are finite, and that "
                "the target's precision can hold what the model computes."
            )
        trajectory = trajectory.advance(sweep.table, step, prediction, seed=sweep.seed, indices=indices.tolist())
        states.append(trajectory)
        on_progress(Progress(stage="full model", done=step + 1, total=sweep.table.steps))
    per_bin = [
        np.mean([means[step] for step in sweep.steps_of(b)], axis=0, dtype=np.float64) for b in range(len(sweep.bins))
    ]
    return FullTrajectory(states=tuple(states), means=np.stack(per_bin).astype(np.float32))


def run_sweep(
    workers: Workers[Course],
    outline: Outline,
    chosen: Sequence[tuple[Ablation, int]],
    work: Path,
    on_progress: OnProgress,
    *,
    deadline: float = math.inf,
) -> Swept:
    """Measure ablations in bins; results that are already in `work` are read.

    A batch takes the place of its first ablation in the given order. After the deadline, a time of the monotonic clock,
    no batch begins; finished ones are still read.

    Raises:
        ArtifactError: If `work` cannot be written.
    """
    jobs = _batches(outline, chosen)
    total = sum(job.calls for job in jobs)

    def advance(done: int) -> None:
        on_progress(Progress(stage="ablations", done=done, total=total))

    results = [one for one in finish(workers, jobs, work, deadline=deadline, advance=advance) if one is not None]
    return Swept(
        effects=tuple(effect for result in results for effect in result.effects),
        non_finite=tuple(one for result in results for one in result.non_finite),
    )


def sweep_calls(outline: Outline, chosen: Sequence[tuple[Ablation, int]]) -> int:
    """Count the denoiser calls per sample that `run_sweep` makes."""
    return sum(job.calls for job in _batches(outline, chosen))


def recall_steps(kind: PeriodicTreatment, first: int) -> tuple[int, ...]:
    """List the last two steps before `first` that compute a component with this treatment; none if it is removed."""
    return tuple(step for step in range(first) if not kind.treats(step))[-2:]


def _batches(outline: Outline, chosen: Sequence[tuple[Ablation, int]]) -> list[Batch]:
    """Cut ablations into batches of one treatment and bin, in the order of the components.

    The order of the ablations has no part in the cuts: it differs with and without a time limit, and results of the
    same ablations are found again by the names of their batches.
    """
    index = {component.name: i for i, component in enumerate(outline.ablated)}

    def key(entry: tuple[Ablation, int]) -> tuple[int, str, int, bool]:
        ablation, b = entry
        return b, ablation.periodic.treatment.value, ablation.periodic.period, ablation.component == GUIDANCE

    size = outline.ablations_per_batch
    batches: list[tuple[int, Batch]] = []
    place = {entry: i for i, entry in enumerate(chosen)}
    ordered = sorted(chosen, key=lambda entry: (key(entry), index[entry[0].component]))
    for (b, *_), group in groupby(ordered, key):
        alike = [ablation for ablation, _ in group]
        periodic, first = alike[0].periodic, outline.steps_of(b)[0]
        calls = outline.table.steps - first + len(recall_steps(periodic, first))
        for start in range(0, len(alike), size):
            own = alike[start : start + size]
            names = tuple(ablation.component for ablation in own)
            batch = Batch(bin=b, periodic=periodic, names=names, calls=calls * len(names))
            batches.append((min(place[ablation, b] for ablation in own), batch))
    return [batch for _, batch in sorted(batches, key=lambda entry: entry[0])]


def _first_non_finite(sweep: Sweep, means: Array) -> str:
    """Name the first component of the network whose branch is not finite, given the means of all branches."""
    for component in sorted(sweep.in_graph, key=lambda component: component.index):
        own = means[component.offset : component.offset + component.channels]
        if component.kind in ("residual", "skip") and not np.isfinite(own).all():
            return f"first in {component.name}"
    return "in no component alone"


def _run(sweep: Sweep, base: FullTrajectory, job: Batch) -> Swept:
    count, steps = len(job.names), sweep.steps_of(job.bin)
    trajectory = base.states[steps[0]].repeat(count)
    treated = _treated(sweep, base, job)
    kept = sweep.denoiser.gates({}, count * sweep.samples)
    indices = sweep.indices(count).tolist()
    finite = np.ones(count, dtype=bool)
    for step in range(steps[0], sweep.table.steps):
        seen = trajectory.seen(sweep.table, step)
        if step in steps:
            prediction = treated.predict(seen, step)
        else:
            prediction = sweep.denoiser.predict(seen, sweep.timestep(step), gates=kept, means=base.means[job.bin])
        finite &= np.isfinite(prediction).reshape(count, -1).all(axis=1)  # clipping would hide infinity
        with np.errstate(over="ignore", invalid="ignore"):
            trajectory = trajectory.advance(sweep.table, step, prediction, seed=sweep.seed, indices=indices)
    finals = trajectory.sample.reshape(count, sweep.samples, *sweep.sample_shape)
    effects, non_finite = [], []
    treatment, period = job.periodic.treatment, job.periodic.period
    for name, final, own in zip(job.names, finals, finite, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            distances = relative_l2(base.final, final)
        if own and np.isfinite(distances).all():
            damage = estimate(distances)
            effects.append(
                Effect(
                    component=name, treatment=treatment, period=period, bin=job.bin, measured=True, relative_l2=damage
                )
            )
        else:
            non_finite.append(NonFinite(component=name, treatment=treatment, period=period, bin=job.bin))
    return Swept(effects=tuple(effects), non_finite=tuple(non_finite))


class _Treated(Protocol):
    """Predictions of a batch of ablations in their bin."""

    def predict(self, sample: Array, step: int) -> Array: ...


def _treated(sweep: Sweep, base: FullTrajectory, job: Batch) -> _Treated:
    if job.names == (GUIDANCE,):
        return _Guidance(sweep, base, job)
    return _Reused(sweep, base, job) if job.periodic.treatment.reuses else _Removed(sweep, base, job)


class _Removed:
    """Predictions of a batch in which each ablation removes one component."""

    def __init__(self, sweep: Sweep, base: FullTrajectory, job: Batch) -> None:
        self._sweep = sweep
        self._gates = sweep.gates(job.names, job.periodic.treatment)
        self._means = base.means[job.bin]

    def predict(self, sample: Array, step: int) -> Array:
        return self._sweep.denoiser.predict(sample, self._sweep.timestep(step), gates=self._gates, means=self._means)


class _Reused:
    """Predictions of a batch in which each ablation reuses one component, with regular refreshes."""

    def __init__(self, sweep: Sweep, base: FullTrajectory, job: Batch) -> None:
        self._sweep = sweep
        self._job = job
        self._cache = branches_at(sweep, base, recall_steps(job.periodic, sweep.steps_of(job.bin)[0]), len(job.names))

    def predict(self, sample: Array, step: int) -> Array:
        if self._job.periodic.treats(step):
            return self._sweep.recall(sample, step, self._cache, self._job.names, self._job.periodic.treatment)
        sweep = self._sweep
        return sweep.denoiser.compute_branches(sample, sweep.timestep(step), self._cache, log_snr=sweep.log_snr(step))


class _Guidance:
    """Predictions of an ablation that treats guidance: treated steps compute the samples' own conditions alone."""

    def __init__(self, sweep: Sweep, base: FullTrajectory, job: Batch) -> None:
        self._sweep = sweep
        self._periodic = job.periodic
        self._cache = guidance_at(sweep, base, recall_steps(job.periodic, sweep.steps_of(job.bin)[0]))

    def predict(self, sample: Array, step: int) -> Array:
        denoiser, timestep = self._sweep.denoiser, self._sweep.timestep(step)
        if self._periodic.treats(step):
            return denoiser.recall_guidance(sample, timestep, self._cache, self._periodic.treatment)
        return denoiser.compute_guidance(sample, timestep, self._cache)


def guidance_at(sweep: Sweep, base: FullTrajectory, steps: Iterable[int]) -> BranchCache:
    """Compute the difference that guidance amplifies at some steps of the full model's trajectory."""
    cache = BranchCache()
    for step in steps:
        sweep.denoiser.compute_guidance(base.seen(sweep, step), sweep.timestep(step), cache)
    return cache


def branches_at(sweep: Sweep, base: FullTrajectory, steps: Iterable[int], count: int) -> BranchCache:
    """Compute all branches at some steps of the full model's trajectory, for a batch of `count` ablations."""
    cache = BranchCache()
    for step in steps:
        sample = np.concatenate([base.seen(sweep, step)] * count)
        sweep.denoiser.compute_branches(sample, sweep.timestep(step), cache, log_snr=sweep.log_snr(step))
    return cache
