"""Analyse a denoiser: the one public function of this stage."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

import unetc
from unetc.arguments import plain_fields
from unetc.artifacts.profile import ImageSource, ModelReference, Profile, with_guidance
from unetc.artifacts.record import read_cached, write_atomically
from unetc.compiler.graph.forms import removals_of
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.measured_calls import CACHED_ROWS
from unetc.conditions import UNCONDITIONAL, Conditions, read_scale
from unetc.environment import cores
from unetc.errors import ProfileError
from unetc.jobs import Advance, Workers, run_one
from unetc.progress import OnProgress, Progress, ignore
from unetc.sampler.table import SchedulerTable

from .ablation import entry_of, select
from .bench import Bench, TryCall
from .cost import Costs, MeasureCosts, forms_of, predict_timing
from .denoiser import FirstCall
from .duration import entries_of, predict_duration
from .screen import choose, estimate_rest, run_screen
from .sweep import Course, Outline, RunBase, SharedCourse, Swept, make_bins, run_sweep, sweep_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisOptions:
    """Options of an analysis."""

    scheduler: str = "ddim"
    steps: int = 50
    samples: int = 16
    """Trajectories per ablation."""
    bins: int = 8
    """Number of noise levels in the damage map; not more than there are denoiser calls."""
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
    """Seconds after which nothing more is measured; what was screened is estimated, the rest is never planned."""
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
            ProfileError: If one is no number, or out of range.
            SessionError: If the guidance scale is out of range.
        """
        plain_fields(self, ProfileError)
        for name in ("steps", "samples", "bins", "threads", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise ProfileError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.decisive is not None and self.decisive < 0:
            raise ProfileError(f"decisive must be at least 0, or None for all, got {self.decisive}.")
        if not self.time_limit_s > 0:
            raise ProfileError(f"a time limit must be above 0 seconds, got {self.time_limit_s}.")
        if self.guidance_scale is not None:
            read_scale(self.guidance_scale)
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
    workers: Workers[Bench],
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
        workers: Who measures; their benches have this graph, these conditions and the target.
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
        WorkerError: If workers fail.
    """
    deadline = time.monotonic() + options.time_limit_s
    components = with_guidance(gated.components) if conditions.paired else gated.components
    ablated = select(components, options.components)
    first = workers.run_alone(
        TryCall(batch=options.batch, sample_shape=sample_shape, timestep=float(table.timesteps[0]))
    )
    outline = Outline(
        components=components,
        ablated=ablated,
        table=table,
        bins=make_bins(table.log_snr, options.bins),
        sample_shape=sample_shape,
        samples=options.samples,
        seed=options.seed,
        rows=max(1, min(CACHED_ROWS, BRANCH_BYTES // first.branch_bytes)),
    )
    timing = _Timing(forms=len(forms_of(ablated, removals_of(gated, sample_shape))), first=first, options=options)
    numbers = (options.target, options.threads, options.batch, options.rounds)
    names = tuple(one.name for one in ablated)
    timed = work / _key("cost", workers.machine, *numbers, conditions.shapes(), names)
    costs = _read_costs(timed, timing.files)
    duration = predict_duration(
        outline,
        screened=options.screens,
        decisive=options.decisive,
        limit_s=deadline - time.monotonic(),
        sample_ms=1e3 * first.call_s / options.batch,
        forms=0 if costs else timing.forms,
        timing_s=0.0 if costs else timing.seconds(timing.rounds),
    )
    timed_before = 0 if costs is None else len(ablated)
    on_progress(Progress(stage="timing", done=timed_before, total=len(ablated), note=str(duration)))
    if costs is None:
        measure = MeasureCosts(components=ablated, batch=options.batch, sample_shape=sample_shape, rounds=timing.rounds)
        with _stage("timing", len(ablated), on_progress) as advance:
            costs = workers.run_alone(measure, advance)
        write_atomically(timed / timing.files[-1], msgspec.json.encode(costs))
    with _stage("full model", table.steps, on_progress) as advance:
        base = run_one(workers, RunBase(outline=outline), advance)
    drawn = (options.steps, options.samples, options.bins, options.seed)
    folder = work / _key("damage", workers.machine, options.scheduler, options.target, *drawn, conditions.sha256())
    course = workers.sharing(SharedCourse(outline=outline, base=base))
    swept, calls, notes = _damages(course, outline, costs, options, deadline, folder, on_progress)
    return Profile(
        unetc=unetc.__version__,
        model=reference,
        scheduler=options.scheduler,
        steps=options.steps,
        samples=options.samples,
        seed=options.seed,
        target=options.target,
        timed_on=workers.machine,
        threads=options.threads,
        batch=options.batch,
        sample_shape=sample_shape,
        prompts=prompts,
        images=images or msgspec.UNSET,
        notes=(*conditions.notes, *workers.notes, *notes) or msgspec.UNSET,
        used_prompts=conditions.rows or 0,
        guidance_scale=conditions.scale,
        control_images=msgspec.UNSET if conditions.control is None else conditions.control.measured,
        components=components,
        bins=outline.bins,
        full_ms=costs.full_ms,
        full_bytes=costs.full_bytes,
        costs=costs.costs,
        effects=swept.effects,
        non_finite=swept.non_finite or msgspec.UNSET,
        samplings=(calls + 2 * table.steps) / table.steps,
        means=tuple(row.astype("<f4").tobytes() for row in base.means),
    )


_TIMING_SHARE = 3
"""The timing may take one of so many parts of a time limit."""
_LEAST_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timing:
    """The timing of an analysis, as far as its time limit allows."""

    forms: int
    first: FirstCall
    options: AnalysisOptions

    def seconds(self, rounds: int) -> float:
        """Predict how long it takes."""
        return predict_timing(self.forms, call_s=self.first.call_s, load_s=self.first.load_s, rounds=rounds)

    @property
    def rounds(self) -> int:
        """Most rounds of each form."""
        rounds, limit_s = self.options.rounds, self.options.time_limit_s / _TIMING_SHARE
        while rounds > _LEAST_ROUNDS and self.seconds(rounds) > limit_s:
            rounds -= 1
        return rounds

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that may hold its results; the last one is written."""
        return ("timing.json",) if self.rounds == self.options.rounds else ("timing.json", "short-timing.json")


def _damages(
    workers: Workers[Course],
    outline: Outline,
    costs: Costs,
    options: AnalysisOptions,
    deadline: float,
    folder: Path,
    on_progress: OnProgress,
) -> tuple[Swept, float, tuple[str, ...]]:
    """Screen all ablations and carry the decisive ones to the final output; count calls per sample, and take notes."""
    if not options.screens:
        everything = entries_of(outline)
        return run_sweep(workers, outline, everything, folder, on_progress), sweep_calls(outline, everything), ()
    screen = run_screen(workers, outline, folder, on_progress, deadline=deadline)
    chosen = choose(screen, costs.costs, costs.full_ms.mean, options.decisive)
    if options.decisive is None:  # with no local error or nothing saved, last
        chosen = tuple(dict.fromkeys((*chosen, *entries_of(outline))))
    measured = run_sweep(workers, outline, chosen, folder, on_progress, deadline=deadline)
    calls = screen.calls + sweep_calls(outline, [entry_of(one) for one in measured.all])
    effects = measured.effects + estimate_rest(screen, measured.effects, measured.non_finite)
    notes = () if screen.complete else (_CUT_SHORT,)
    known = {one.key for one in measured.all}
    screened = tuple(one for one in screen.non_finite if one.key not in known)
    return Swept(effects=effects, non_finite=measured.non_finite + screened), calls, notes


_CUT_SHORT = (
    "the time limit came before the end of the screening: treatments that were not tried are never planned. Analyse "
    "again with more time, which continues, or analyse less with --components, --bins or --samples"
)


def _read_costs(folder: Path, files: Iterable[str]) -> Costs | None:
    """Read the costs that an interrupted analysis has measured: time is the one thing that never repeats."""
    found = (read_cached(folder / file, Costs) for file in files)
    return next((costs for costs in found if costs is not None), None)


@contextmanager
def _stage(stage: str, total: int, on_progress: OnProgress) -> Iterator[Advance]:
    """Report the progress of one job; on other machines it is known only when the job ends."""

    def advance(done: int) -> None:
        on_progress(Progress(stage=stage, done=done, total=total))

    yield advance
    advance(total)


def _key(what: str, *values: object) -> str:
    """Name a folder of results by all that they depend on, apart from the model: `work` belongs to one."""
    return f"{what}-{hashlib.sha256(repr((unetc.__version__, *values)).encode()).hexdigest()[:16]}"
