"""Analyse a denoiser: the one public function of this stage."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

import unetc
from unetc.artifacts.profile import Component, ImageSource, ModelReference, Profile, with_guidance
from unetc.artifacts.record import read_bounded, write_atomically
from unetc.backend import Backend
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.measured_calls import CACHED_ROWS
from unetc.conditions import UNCONDITIONAL, Conditions, check_scale
from unetc.environment import cores
from unetc.errors import ArtifactError, ProfileError
from unetc.progress import OnProgress, Progress, ignore
from unetc.sampler.noise import initial_noise
from unetc.sampler.table import SchedulerTable

from .ablation import entry_of, select
from .cost import Costs, measure_costs
from .denoiser import GatedDenoiser
from .duration import entries_of, predict_duration
from .screen import choose, estimate_rest, run_screen
from .sweep import FullTrajectory, Sweep, Swept, make_bins, run_base, run_sweep, sweep_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisOptions:
    """Options of an analysis."""

    scheduler: str = "ddim"
    steps: int = 50
    samples: int = 16
    """Trajectories per ablation."""
    bins: int = 8
    """Number of noise levels in the damage map; not more than there are steps."""
    seed: int = 0
    target: str = "onnxruntime:cpu"
    threads: int = field(default_factory=cores)
    """CPU threads of the target."""
    batch: int = 8
    """Batch size of the cost measurement."""
    rounds: int = 15
    """Timed repetitions per component."""
    components: tuple[str, ...] = ()
    """Shell-style patterns of the components to ablate, in addition to the step and guidance; all when empty."""
    decisive: int | None = 7
    """Ablations per bin that are carried to the final output; the others are screened. None carries all of them."""
    time_limit_s: float = math.inf
    """Seconds after which no further ablation is carried to the final output; the rest is screened."""
    prompts: tuple[str, ...] = ()
    """Prompts for a model that takes some; the model's list when empty."""
    labels: tuple[str | int, ...] = ()
    """Labels, by number or by name, for a model that takes some; spread over all its classes when empty."""
    images: str | None = None
    """Folder of images for a model that takes some; drawn when not given."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance, dimensionless; 0 to 1 turn it off, None is the pipeline's usual scale."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ProfileError: If one is out of range.
            SessionError: If the guidance scale is out of range.
        """
        for name in ("steps", "samples", "bins", "threads", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise ProfileError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.decisive is not None and self.decisive < 0:
            raise ProfileError(f"decisive must be at least 0, or None for all, got {self.decisive}.")
        if not self.time_limit_s > 0:
            raise ProfileError(f"a time limit must be above 0 seconds, got {self.time_limit_s}.")
        if self.guidance_scale is not None:
            check_scale(self.guidance_scale)
        if self.prompts and self.labels:
            raise ProfileError("prompts and labels are given. Give labels to a model with classes, prompts to others.")
        if not 0 <= self.seed < 2**63:
            raise ProfileError(f"a seed lies in [0, 2^63), got {self.seed}.")

    @property
    def screens(self) -> bool:
        """Whether local errors are needed: unless every ablation reaches the final output."""
        return self.decisive is not None or self.time_limit_s < math.inf


BRANCH_BYTES = 2**29
"""Most bytes of all branches that one call emits. Screening holds the branches of two steps, and passes them on."""


def analyze(
    gated: GatedGraph,
    reference: ModelReference,
    table: SchedulerTable,
    backend: Backend,
    *,
    sample_shape: tuple[int, int, int],
    conditions: Conditions = UNCONDITIONAL,
    prompts: tuple[str, ...] = (),
    images: ImageSource | None = None,
    options: AnalysisOptions,
    work: Path,
    on_progress: OnProgress = ignore,
) -> Profile:
    """Measure damage and cost of every component.

    Args:
        gated: The denoiser's gated graph.
        reference: The model.
        table: The scheduler of `options.scheduler` at `options.steps`.
        backend: The target, opened.
        sample_shape: [channel, height, width].
        conditions: Conditions of the samples: sample k gets row k, modulo the number of rows.
        prompts: The conditions in words, and more prompts that are kept for `verify`.
        images: Images in the conditions; None if there are none.
        options: How to analyse.
        work: Folder for partial results. A second call with the same arguments continues from them: damages are equal
            bit by bit, and times already measured are not measured again.
        on_progress: Called as the work advances.

    Raises:
        ArtifactError: If `work` cannot be written.
        ProfileError: If the full model produces NaN or infinity, or a pattern matches no component.
    """
    deadline = time.monotonic() + options.time_limit_s
    components = with_guidance(gated.components) if conditions.paired else gated.components
    ablated = select(components, options.components)
    costs = _costs(gated, ablated, backend, conditions, sample_shape, options, work, on_progress)
    denoiser = GatedDenoiser(gated, backend, conditions.take(range(options.samples)), table.prediction_type)
    sweep = Sweep(
        denoiser=denoiser,
        components=components,
        ablated=ablated,
        table=table,
        bins=make_bins(table.log_snr, options.bins),
        sample_shape=sample_shape,
        samples=options.samples,
        seed=options.seed,
        rows=_rows(denoiser, sample_shape, table),
    )
    duration = predict_duration(
        sweep,
        screened=options.screens,
        decisive=options.decisive,
        limit_s=deadline - time.monotonic(),
        sample_ms=costs.full_ms.mean / options.batch,
    )
    on_progress(Progress(stage="full model", done=0, total=table.steps, note=str(duration)))
    base = run_base(sweep, on_progress)
    numbers = (options.steps, options.samples, options.bins, options.seed)
    folder = work / _key("damage", options.scheduler, options.target, *numbers, conditions.sha256())
    swept, calls = _damages(sweep, base, costs, options, deadline, folder, on_progress)
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
        images=images or msgspec.UNSET,
        notes=conditions.notes or msgspec.UNSET,
        used_prompts=conditions.rows or 0,
        guidance_scale=conditions.scale,
        control_images=msgspec.UNSET if conditions.control is None else conditions.control.measured,
        components=components,
        bins=sweep.bins,
        full_ms=costs.full_ms,
        full_bytes=costs.full_bytes,
        costs=costs.costs,
        effects=swept.effects,
        non_finite=swept.non_finite or msgspec.UNSET,
        samplings=(calls + 2 * table.steps) / table.steps,
        means=tuple(row.astype("<f4").tobytes() for row in base.means),
    )


def _rows(denoiser: GatedDenoiser, sample_shape: tuple[int, int, int], table: SchedulerTable) -> int:
    """Choose the most samples of a batch; the branches of a batch of a large model would fill the memory."""
    row = denoiser.branch_bytes(initial_noise(0, (0,), sample_shape), float(table.timesteps[0]))
    return max(1, min(CACHED_ROWS, BRANCH_BYTES // row))


def _damages(
    sweep: Sweep,
    base: FullTrajectory,
    costs: Costs,
    options: AnalysisOptions,
    deadline: float,
    folder: Path,
    on_progress: OnProgress,
) -> tuple[Swept, float]:
    """Screen all ablations and carry the decisive ones to the final output; also count denoiser calls per sample."""
    if not options.screens:
        everything = entries_of(sweep)
        return run_sweep(sweep, base, everything, folder, on_progress), sweep_calls(sweep, everything)
    screen = run_screen(sweep, base, folder, on_progress)
    chosen = choose(screen, costs.costs, costs.full_ms.mean, options.decisive)
    measured = run_sweep(sweep, base, chosen, folder, on_progress, deadline=deadline)
    calls = screen.calls + sweep_calls(sweep, [entry_of(one) for one in measured.all])
    effects = measured.effects + estimate_rest(screen, measured.effects, measured.non_finite)
    return Swept(effects=effects, non_finite=measured.non_finite + screen.non_finite), calls


def _costs(
    gated: GatedGraph,
    ablated: tuple[Component, ...],
    backend: Backend,
    conditions: Conditions,
    sample_shape: tuple[int, int, int],
    options: AnalysisOptions,
    work: Path,
    on_progress: OnProgress,
) -> Costs:
    """Measure costs, or read those an interrupted analysis has measured: time is the one thing that never repeats."""
    numbers = (options.threads, options.batch, options.rounds)
    names = tuple(component.name for component in ablated)
    path = work / _key("cost", options.target, *numbers, conditions.shapes(), names) / "timing.json"
    try:
        return msgspec.json.decode(read_bounded(path, 2**26), type=Costs)
    except (ArtifactError, msgspec.MsgspecError, UnicodeDecodeError):
        costs = measure_costs(
            gated,
            ablated,
            backend,
            conditions=conditions,
            batch=options.batch,
            sample_shape=sample_shape,
            rounds=options.rounds,
            on_progress=on_progress,
        )
    write_atomically(path, msgspec.json.encode(costs))
    return costs


def _key(what: str, *values: object) -> str:
    return f"{what}-{hashlib.sha256(repr(values).encode()).hexdigest()[:16]}"
