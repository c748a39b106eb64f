"""The sweep: damage of every component × treatment × noise-level bin, resumable.

For a bin, the ablated trajectories start from the full model's trajectory at the first step of the bin (the shared
prefix is computed once), carry their treatment through the bin, and are finished by the full model. Several ablations
ride in one batch, each with its own gates. One batch is one job; its result is one file, so a killed sweep continues
where it was. Batches are cut the same way however often the sweep was interrupted, so the numbers are the same bit by
bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.profile import Bin, Component, Effect, Treatment
from unetc.artifacts.record import read_bounded, write_atomically
from unetc.backend import Array
from unetc.errors import ArtifactError
from unetc.graph.gate import gate_values
from unetc.progress import OnProgress, Progress
from unetc.solver.noise import initial_noise
from unetc.solver.table import SolverTable
from unetc.solver.trajectory import Trajectory

from .damage import measure_damage
from .denoiser import GatedDenoiser

ABLATIONS = (Treatment.DROP, Treatment.MEAN)
"""What is tried on every component."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to ablate, on which trajectories."""

    denoiser: GatedDenoiser
    components: Sequence[Component]
    table: SolverTable
    bins: tuple[Bin, ...]
    sample_shape: tuple[int, int, int]
    samples: int
    seed: int
    rows: int
    """Most samples in one batch."""

    def first_step(self, bin_index: int) -> int:
        """Find the first step of a bin."""
        return sum(bin.steps for bin in self.bins[:bin_index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The full model's trajectory."""

    starts: tuple[Trajectory, ...]
    """State before the first step of every bin."""
    final: Array
    """[sample, channel, height, width]."""
    means: NDArray[np.float32]
    """[bin, channel of all components], mean of every branch over the steps of the bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    bin: int
    number: int
    ablations: tuple[tuple[str, Treatment], ...]


def make_bins(log_snr: NDArray[np.float64], count: int) -> tuple[Bin, ...]:
    """Cut a schedule into bins of equal numbers of steps (as nearly as possible), from high to low noise."""
    parts = [part for part in np.array_split(log_snr, count) if len(part)]
    edges = [float(parts[0][0])]
    edges += [float((left[-1] + right[0]) / 2) for left, right in pairwise(parts)]
    edges.append(float(parts[-1][-1]) + 1.0)
    return tuple(
        Bin(low=low, high=high, steps=len(part)) for low, high, part in zip(edges, edges[1:], parts, strict=False)
    )


def run_base(sweep: Sweep, on_progress: OnProgress) -> Base:
    """Sample with the full model, keeping the state before every bin and the mean of every branch."""
    indices = np.arange(sweep.samples)
    trajectory = Trajectory.start(sweep.table, initial_noise(sweep.seed, indices.tolist(), sweep.sample_shape))
    gates = sweep.denoiser.gates({}, sweep.samples)
    starts: list[Trajectory] = []
    means: list[Array] = []
    for b, bin in enumerate(sweep.bins):
        starts.append(trajectory)
        rows: list[Array] = []
        for step in range(sweep.first_step(b), sweep.first_step(b) + bin.steps):
            scaled = trajectory.sample * np.float32(sweep.table.input_scale[step])
            rows.append(sweep.denoiser.branch_means(scaled, float(sweep.table.timesteps[step])))
            trajectory = sweep.denoiser.advance(
                trajectory, sweep.table, step, gates=gates, means=rows[-1], seed=sweep.seed, indices=indices
            )
            on_progress(Progress(stage="full model", done=step + 1, total=sweep.table.steps))
        means.append(np.stack(rows).astype(np.float64).mean(axis=0).astype(np.float32))
    return Base(starts=tuple(starts), final=trajectory.sample, means=np.stack(means))


def run_sweep(sweep: Sweep, base: Base, work: Path, on_progress: OnProgress) -> tuple[Effect, ...]:
    """Measure every ablation, reading from `work` what was measured before.

    Raises:
        ArtifactError: If `work` cannot be written.
        ProfileError: If the denoiser produces NaN or infinity.
    """
    jobs = tuple(_jobs(sweep))
    weights = [sum(bin.steps for bin in sweep.bins[job.bin :]) * len(job.ablations) for job in jobs]
    effects: list[Effect] = []
    done = 0
    for job, weight in zip(jobs, weights, strict=True):
        path = work / f"bin{job.bin:02d}-job{job.number:04d}.json"
        result = _read(path, job)
        if result is None:
            result = _run(sweep, base, job)
            write_atomically(path, msgspec.json.encode(result))
        effects.extend(result)
        done += weight
        on_progress(Progress(stage="ablations", done=done, total=sum(weights)))
    return tuple(effects)


def _jobs(sweep: Sweep) -> Iterator[_Job]:
    ablations = [(component.name, treatment) for component in sweep.components for treatment in ABLATIONS]
    size = max(1, sweep.rows // sweep.samples)
    for b in range(len(sweep.bins)):
        for number, start in enumerate(range(0, len(ablations), size)):
            yield _Job(bin=b, number=number, ablations=tuple(ablations[start : start + size]))


def _read(path: Path, job: _Job) -> tuple[Effect, ...] | None:
    """Read a finished job; a missing or damaged file means that it has to run again."""
    try:
        result = msgspec.json.decode(read_bounded(path, 2**26), type=tuple[Effect, ...])
    except (ArtifactError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    measured = [(effect.component, effect.treatment, effect.bin) for effect in result]
    return result if measured == [(name, treatment, job.bin) for name, treatment in job.ablations] else None


def _run(sweep: Sweep, base: Base, job: _Job) -> tuple[Effect, ...]:
    count = len(job.ablations)
    trajectory = base.starts[job.bin].repeat(count)
    indices = np.tile(np.arange(sweep.samples), count)
    ablated = np.concatenate(
        [
            np.repeat(gate_values(sweep.components, {name: treatment})[None], sweep.samples, axis=0)
            for name, treatment in job.ablations
        ]
    )
    kept = sweep.denoiser.gates({}, len(indices))
    first = sweep.first_step(job.bin)
    last = first + sweep.bins[job.bin].steps
    for step in range(first, sweep.table.steps):
        gates = ablated if step < last else kept
        trajectory = sweep.denoiser.advance(
            trajectory, sweep.table, step, gates=gates, means=base.means[job.bin], seed=sweep.seed, indices=indices
        )
    finals = trajectory.sample.reshape(count, sweep.samples, *sweep.sample_shape)
    return tuple(
        Effect(component=name, treatment=treatment, bin=job.bin, damage=measure_damage(base.final, final))
        for (name, treatment), final in zip(job.ablations, finals, strict=True)
    )
