"""The screening: rank all ablations by their local error, at one step of every bin.

An ablation's *local error* is the change of the denoiser's prediction at a step of the full model's trajectory. It
takes one call, for a few of the samples; an ablation that is carried to the final output takes half a sampling run. The
*error amplification* of a bin, from local error to final damage, is learned from the bin's ablations that were carried
to the final output.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unetc.artifacts.profile import GUIDANCE, STEP, Cost, Effect, Estimate, NonFinite
from unetc.artifacts.record import Record, read_cached
from unetc.backend import Array
from unetc.jobs import Advance, Workers, finish
from unetc.metrics.distances import relative_l2
from unetc.progress import OnProgress, Progress
from unetc.runtime.branch_cache import BranchCache
from unetc.treatments import Treatment

from .ablation import TRIED, Ablation, PeriodicTreatment, entry_of, treatments_for
from .sweep import Course, FullTrajectory, Outline, Sweep, branches_at, guidance_at

Z_95 = 1.96

SCREENED_SHARE, LEAST_SCREENED = 4, 2
"""The screening takes one of so many samples, and at least so many. Local errors differ little between samples: those
of 4 of 16 samples rank like the means of all, see benchmarks/results/screened.json."""
_LEAST_SPREAD = 0.1
"""Standard deviation of the logarithm that an estimate has at least, however well few measurements agree."""

TYPICAL_LOG_AMPLIFICATION, TYPICAL_SPREAD = -2.22, 1.23
"""Mean and standard deviation of log(damage / local error), for an analysis without measured ablations: from random
ablations in all bins of `digits` at 50 steps, see benchmarks/results/amplification.json."""


_PERIODS = tuple(sorted({kind.period for kind in TRIED}, key=lambda period: (period == 1, period)))
"""Periods in the order in which they are probed: removals, which save least for their damage, come last."""


class _Local(Record, frozen=True, kw_only=True):
    component: str
    treatment: Treatment
    period: int
    error: float | None
    """None if the prediction is NaN or infinity."""


class _Screened(Record, frozen=True, kw_only=True):
    errors: tuple[_Local, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Local errors, and their cost."""

    errors: dict[tuple[Ablation, int], float]
    """By ablation and bin: relative change of the prediction × treated steps in the bin."""
    non_finite: tuple[NonFinite, ...] = ()
    """Ablations whose prediction is NaN or infinity."""
    calls: float
    """Denoiser calls per sample of the analysis."""
    complete: bool = True
    """Whether there was time for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The job of a bin and of the treatments of one period."""

    bin: int
    period: int
    samples: int
    key: str
    """Hash of what is probed."""
    calls: int
    """Denoiser calls per sample that is screened."""

    @property
    def name(self) -> str:
        """Name of the result's file."""
        return f"bin{self.bin:02d}-local{self.period}-{self.key}.json"

    def read(self, path: Path) -> _Screened | None:
        """Read the result; None if the file is missing or damaged."""
        return read_cached(path, _Screened)

    def run(self, course: Course, advance: Advance) -> _Screened:
        """Measure the local errors."""
        return _probe(course.sweep.of_first(self.samples), course.base, self.bin, self.period, advance)


def run_screen(
    workers: Workers[Course], outline: Outline, work: Path, on_progress: OnProgress, *, deadline: float = math.inf
) -> Screen:
    """Measure the local error of every ablation in every bin where it treats a step.

    After the deadline, a time of the monotonic clock, no further bin is probed with treatments of a further period;
    finished ones are still read.

    Raises:
        ArtifactError: If `work` cannot be written.
    """
    few = _few(outline)
    jobs = _probes(few)
    total = sum(job.calls for job in jobs)

    def advance(done: int) -> None:
        on_progress(Progress(stage="screen", done=done, total=total))

    errors: dict[tuple[Ablation, int], float] = {}
    non_finite: list[NonFinite] = []
    made = 0
    for job, screened in zip(jobs, finish(workers, jobs, work, deadline=deadline, advance=advance), strict=True):
        if screened is None:
            continue
        made += job.calls
        for local in screened.errors:
            kind = PeriodicTreatment(treatment=local.treatment, period=local.period)
            if not (treated := sum(map(kind.treats, outline.steps_of(job.bin)))):
                continue
            if local.error is None:
                non_finite.append(
                    NonFinite(component=local.component, treatment=local.treatment, period=local.period, bin=job.bin)
                )
            else:
                errors[Ablation(component=local.component, periodic=kind), job.bin] = local.error * treated
    return Screen(
        errors=errors,
        non_finite=tuple(non_finite),
        calls=made * few.samples / outline.samples,
        complete=made == total,
    )


def _probes(few: Outline) -> list[Probe]:
    """List the jobs of a screening of a few samples."""
    names = tuple(component.name for component in few.ablated)
    tried = {tried for component in few.ablated for tried in treatments_for(component, denoises=few.denoises)}
    key = hashlib.sha256(repr((few.samples, names, sorted(map(str, tried)))).encode()).hexdigest()[:16]
    return [
        Probe(bin=b, period=period, samples=few.samples, key=key, calls=_calls(few, b, period))
        for period in _PERIODS
        for b in range(len(few.bins))
    ]


def screen_calls(outline: Outline) -> float:
    """Count the denoiser calls that `run_screen` makes, per sample of the analysis."""
    few = _few(outline)
    return sum(job.calls for job in _probes(few)) * few.samples / outline.samples


def _few(outline: Outline) -> Outline:
    """Take the samples that are screened."""
    return outline.of_first(min(outline.samples, max(LEAST_SCREENED, outline.samples // SCREENED_SHARE)))


def _calls(few: Outline, b: int, period: int) -> int:
    """Count the denoiser calls of a bin with treatments of a period, per sample that is screened."""
    size, step = few.ablations_per_batch, _probed(few, b)
    probed = _probed_kinds(few, step, period)
    sources = {source for kind, names in probed if names for source in _sources(kind, step)}
    calls = size * len(sources) + sum(-(-len(names) // size) * size for _, names in probed)
    return calls + sum(1 + len(_sources(kind, step)) for kind in _of_guidance(few, step, period))


def _probed_kinds(outline: Outline, step: int, period: int) -> list[tuple[PeriodicTreatment, list[str]]]:
    """List the treatments of a period that a probe of a step can try, each with its components in the graph."""
    components = [component for component in outline.ablated if component.kind != "guidance"]
    return [
        (kind, [one.name for one in components if kind in treatments_for(one, denoises=outline.denoises)])
        for kind in TRIED
        if kind.period == period and (not kind.treatment.reuses or _sources(kind, step))
    ]


def choose(
    screen: Screen, costs: Sequence[Cost], full_ms: float, per_bin: int | None
) -> tuple[tuple[Ablation, int], ...]:
    """Choose the ablations of every bin that a plan is most likely to want: those with the least error per time saved.

    Where the step can be reused in two forms, the best of each form comes first. Their local errors do not compare: an
    error of the prediction that only lacks the latest noise does less damage than others. The best one of guidance is
    always among them too: it saves more than most components, and its error is amplified by the guidance scale, so the
    error amplification of other components is a poor guess for it.

    Returns:
        Ablations with their bins: the best of every bin first, then the second best.
    """
    share = {cost.component: max(0.0, cost.saved_ms.mean) / full_ms for cost in costs}
    worth: dict[int, list[tuple[float, int, Ablation]]] = {}
    for position, ((ablation, b), error) in enumerate(screen.errors.items()):
        saved = share.get(ablation.component, 0.0) * ablation.periodic.share
        if saved > 0:
            worth.setdefault(b, []).append((error / saved, position, ablation))
    ranked = [
        (rank, b, ablation)
        for b, entries in sorted(worth.items())
        for rank, ablation in enumerate(
            _best(_both_forms_first([ablation for _, _, ablation in sorted(entries)]), per_bin)
        )
    ]
    return tuple((ablation, b) for _, b, ablation in sorted(ranked, key=lambda entry: entry[:2]))


def _both_forms_first(ranked: Sequence[Ablation]) -> list[Ablation]:
    """Put the best reuse of the prediction and of the denoised sample first, if there are both."""
    best: dict[bool, Ablation] = {}
    for ablation in ranked:
        if ablation.component == STEP:
            best.setdefault(ablation.periodic.treatment.row.of_x0, ablation)
    first = list(best.values()) if len(best) == 2 else []
    return first + [ablation for ablation in ranked if ablation not in first]


def _best(ordered: Sequence[Ablation], count: int | None) -> Sequence[Ablation]:
    """Take the first ablations, and the first one of guidance; all without a count."""
    if not count:
        return ordered[:count]
    taken, rest = ordered[:count], ordered[count:]
    if any(ablation.component == GUIDANCE for ablation in taken):
        return taken
    return [*taken, *[ablation for ablation in rest if ablation.component == GUIDANCE][:1]]


def estimate_rest(screen: Screen, measured: Sequence[Effect], broken: Sequence[NonFinite] = ()) -> tuple[Effect, ...]:
    """Estimate the final damage of the other ablations, from their local errors and the measured ones of their bins.

    In a bin, damage = error amplification x local error. The amplification is the geometric mean over the ablations
    measured there. Intervals are the scatter of all measured ablations around their bins' amplifications. Where
    nothing was measured, amplification and scatter come from another model.
    """
    known = {entry_of(effect): effect.relative_l2.mean for effect in measured}
    without = {*known, *map(entry_of, broken)}
    ratios: dict[int, list[float]] = {}
    for (ablation, b), damage in known.items():
        if damage > 0 and (error := screen.errors.get((ablation, b), 0.0)) > 0:
            ratios.setdefault(b, []).append(float(np.log(damage / error)))
    everywhere = float(np.mean([np.mean(own) for own in ratios.values()])) if ratios else TYPICAL_LOG_AMPLIFICATION
    amplifications = {b: float(np.mean(own)) for b, own in ratios.items()}
    scatter = [ratio - amplifications[b] for b, own in ratios.items() for ratio in own]
    spread = max(_LEAST_SPREAD, float(np.std(scatter))) if ratios else TYPICAL_SPREAD
    factor = float(np.exp(Z_95 * spread))
    effects = []
    for (ablation, b), error in screen.errors.items():
        if (ablation, b) not in without:
            mean = float(np.exp(amplifications.get(b, everywhere))) * error
            effects.append(
                Effect(
                    component=ablation.component,
                    treatment=ablation.periodic.treatment,
                    period=ablation.periodic.period,
                    bin=b,
                    measured=False,
                    relative_l2=Estimate(mean=mean, low=mean / factor, high=mean * factor),
                )
            )
    return tuple(effects)


def _probed(outline: Outline, b: int) -> int:
    steps = outline.steps_of(b)
    return steps[len(steps) // 2]


def _sources(kind: PeriodicTreatment, step: int) -> list[int]:
    """List the steps whose branches a probe reuses; none before the first step."""
    if not kind.treatment.reuses:
        return []
    latest = max(0, step - kind.period // 2)
    return [at for at in (latest - kind.period, latest) if 0 <= at < step]


def _probe(sweep: Sweep, base: FullTrajectory, b: int, period: int, advance: Advance) -> _Screened:
    """Probe the middle step of a bin with treatments of a period; held branches are as old as they are on average."""
    step = _probed(sweep, b)
    size = sweep.ablations_per_batch
    sample = np.concatenate([base.seen(sweep, step)] * size)
    expected = base.states[step + 1].predictions[0][: sweep.samples]
    errors: list[_Local] = []
    branches: BranchCache | None = None
    calls = 0
    for kind, names in _probed_kinds(sweep, step, period):
        if names and kind.treatment.reuses and branches is None:
            branches = branches_at(sweep, base, _sources(kind, step), size)
            calls += size * len(_sources(kind, step))
        for start in range(0, len(names), size):
            own = names[start : start + size]
            padded = [*own, *[own[-1]] * (size - len(own))]  # all branches have one batch size
            if branches is not None:
                predicted = sweep.recall(sample, step, branches, padded, kind.treatment)
            else:
                gates = sweep.gates(padded, kind.treatment)
                predicted = sweep.denoiser.predict(sample, sweep.timestep(step), gates=gates, means=base.means[b])
            predicted = predicted[:, : expected.shape[1]]  # a predicted variance is not compared
            for name, prediction in zip(own, np.split(predicted, size), strict=False):
                errors.append(_local(name, kind, expected, prediction))
            calls += size
            advance(calls)
    for kind in _of_guidance(sweep, step, period):
        seen, cache = base.seen(sweep, step), guidance_at(sweep, base, _sources(kind, step))
        predicted = sweep.denoiser.recall_guidance(seen, sweep.timestep(step), cache, kind.treatment)
        errors.append(_local(GUIDANCE, kind, expected, predicted[:, : expected.shape[1]]))
    return _Screened(errors=tuple(errors))


def _local(name: str, kind: PeriodicTreatment, expected: Array, predicted: Array) -> _Local:
    """Compare a prediction with the full model's."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(relative_l2(expected, predicted).mean())
    finite = np.isfinite(predicted).all() and math.isfinite(error)
    return _Local(component=name, treatment=kind.treatment, period=kind.period, error=error if finite else None)


def _of_guidance(outline: Outline, step: int, period: int) -> list[PeriodicTreatment]:
    """List the treatments of guidance, of a period, that a probe of a step can try; none without guidance."""
    return [
        kind
        for component in outline.ablated
        if component.kind == "guidance"
        for kind in treatments_for(component, denoises=outline.denoises)
        if kind.period == period and (not kind.treatment.reuses or _sources(kind, step))
    ]
