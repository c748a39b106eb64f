"""Analyse a denoiser: the one public function of this stage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

import unetc
from unetc.artifacts.profile import Cost, Effect, Estimate, ModelReference, Profile
from unetc.artifacts.record import Record, read_bounded, write_atomically
from unetc.backend import Backend
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.environment import cores
from unetc.errors import ArtifactError, ProfileError
from unetc.graph.gated import GatedGraph
from unetc.progress import OnProgress, ignore
from unetc.solver.table import SolverTable

from .ablation import ablations_of
from .cost import measure_costs
from .denoiser import GatedDenoiser
from .screen import choose, estimate_rest, run_screen
from .sweep import Base, Sweep, make_bins, run_base, run_sweep, sweep_calls

_CACHED_ROWS = 32
"""Samples per batch on a CPU: larger batches fall out of its caches and gain nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisOptions:
    """How to analyse."""

    scheduler: str = "ddim"
    steps: int = 50
    samples: int = 16
    """Trajectories every ablation is measured on."""
    bins: int = 8
    """Noise levels the map distinguishes."""
    seed: int = 0
    target: str = "onnxruntime:cpu"
    threads: int = field(default_factory=cores)
    """CPU threads of the target."""
    batch: int = 8
    """Batch size of the cost measurement."""
    rounds: int = 15
    """Timed repetitions per component."""
    decisive: int | None = 10
    """Ablations of every bin that are carried to the final output; the others are screened. All are when None."""
    prompts: tuple[str, ...] = ()
    """What a model that takes prompts is measured on; its own list when empty."""
    guidance_scale: float | None = None
    """Of classifier-free guidance, dimensionless; what the pipeline usually has when None."""
    controlnet: bool = False
    """Whether engines are to take the residuals of a ControlNet; they are measured with zeros."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ProfileError: If one is out of range.
        """
        for name in ("steps", "samples", "bins", "threads", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise ProfileError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.decisive is not None and self.decisive < 1:
            raise ProfileError(f"decisive must be at least 1, or None for all, got {self.decisive}.")
        if self.bins > self.steps:
            raise ProfileError(f"cannot cut {self.steps} steps into {self.bins} bins; use fewer bins or more steps.")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < 1000:
            raise ProfileError(f"a guidance scale is at least 1, which is none; got {self.guidance_scale}.")
        if not 0 <= self.seed < 2**63:
            raise ProfileError(f"a seed lies in [0, 2^63), got {self.seed}.")


class _Timing(Record, frozen=True, kw_only=True):
    full_ms: Estimate
    costs: tuple[Cost, ...]


def analyze(
    gated: GatedGraph,
    reference: ModelReference,
    table: SolverTable,
    backend: Backend,
    *,
    sample_shape: tuple[int, int, int],
    conditions: Conditions = UNCONDITIONAL,
    prompts: tuple[str, ...] = (),
    options: AnalysisOptions,
    work: Path,
    on_progress: OnProgress = ignore,
) -> Profile:
    """Measure damage and cost of every component.

    Args:
        gated: The denoiser's gated graph.
        reference: Which model it is.
        table: The solver of `options.scheduler` at `options.steps`.
        backend: The target, opened.
        sample_shape: [channel, height, width].
        conditions: What the samples are conditioned on; sample k has row k, modulo the number of rows.
        prompts: The conditions in words, and further ones that are kept for `verify`.
        options: How to analyse.
        work: Folder for partial results. A second call with the same arguments continues from them: damages are equal
            bit by bit, and times already measured are not measured again.
        on_progress: Told how far the work is.

    Raises:
        ArtifactError: If `work` cannot be written.
        ProfileError: If the denoiser produces NaN or infinity.
    """
    timing = _timing(gated, backend, conditions, sample_shape, options, work, on_progress)
    sweep = Sweep(
        denoiser=GatedDenoiser(gated, backend, conditions.take(range(options.samples))),
        components=gated.components,
        table=table,
        bins=make_bins(table.log_snr, options.bins),
        sample_shape=sample_shape,
        samples=options.samples,
        seed=options.seed,
        rows=_CACHED_ROWS,
    )
    base = run_base(sweep, on_progress)
    numbers = (options.steps, options.samples, options.bins, options.seed)
    folder = work / _key("damage", options.scheduler, *numbers, conditions.sha256())
    effects, calls = _damages(sweep, base, timing, options.decisive, folder, on_progress)
    return Profile(
        unetc=unetc.__version__,
        model=reference,
        scheduler=options.scheduler,
        steps=options.steps,
        samples=options.samples,
        seed=options.seed,
        target=options.target,
        threads=options.threads,
        batch=options.batch,
        sample_shape=sample_shape,
        prompts=prompts,
        used_prompts=conditions.rows or 0,
        guidance_scale=conditions.scale,
        components=gated.components,
        bins=sweep.bins,
        full_ms=timing.full_ms,
        costs=timing.costs,
        effects=effects,
        samplings=(calls + 2 * table.steps) / table.steps,
        means=tuple(row.astype("<f4").tobytes() for row in base.means),
    )


def _damages(
    sweep: Sweep, base: Base, timing: _Timing, decisive: int | None, folder: Path, on_progress: OnProgress
) -> tuple[tuple[Effect, ...], int]:
    """Screen all ablations and carry the decisive ones to the final output; also count denoiser calls per sample."""
    if decisive is None:
        all_of_them = tuple(
            (ablation, b)
            for ablation in ablations_of(sweep.components)
            for b in range(len(sweep.bins))
            if any(map(ablation.kind.treats, sweep.steps_of(b)))
        )
        return run_sweep(sweep, base, all_of_them, folder, on_progress), sweep_calls(sweep, all_of_them)
    screen = run_screen(sweep, base, folder, on_progress)
    chosen = choose(screen, timing.costs, timing.full_ms.mean, decisive)
    measured = run_sweep(sweep, base, chosen, folder, on_progress)
    return measured + estimate_rest(screen, measured), screen.calls + sweep_calls(sweep, chosen)


def _timing(
    gated: GatedGraph,
    backend: Backend,
    conditions: Conditions,
    sample_shape: tuple[int, int, int],
    options: AnalysisOptions,
    work: Path,
    on_progress: OnProgress,
) -> _Timing:
    """Measure costs, or read those an interrupted analysis has measured: time is the one thing that never repeats."""
    numbers = (options.threads, options.batch, options.rounds)
    path = work / _key("cost", options.target, *numbers, conditions.shapes()) / "timing.json"
    try:
        return msgspec.json.decode(read_bounded(path, 2**26), type=_Timing)
    except (ArtifactError, msgspec.MsgspecError, UnicodeDecodeError):
        full_ms, costs = measure_costs(
            gated,
            backend,
            conditions=conditions,
            batch=options.batch,
            sample_shape=sample_shape,
            rounds=options.rounds,
            on_progress=on_progress,
        )
    timing = _Timing(full_ms=full_ms, costs=costs)
    write_atomically(path, msgspec.json.encode(timing))
    return timing


def _key(what: str, *values: object) -> str:
    return f"{what}-{hashlib.sha256(repr(values).encode()).hexdigest()[:16]}"
