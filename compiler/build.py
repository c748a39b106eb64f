"""Profile + budget → bundle: fit a plan, measure it jointly, write the bundle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec

from unetc.artifacts.manifest import Control, EnginePair, Manifest, Measurement
from unetc.artifacts.pareto import Pareto
from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import Profile
from unetc.artifacts.scope import control_scope
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.additivity import check_pairs
from unetc.compiler.search.controls import make_controls
from unetc.compiler.search.fit import fit_plan
from unetc.compiler.search.pareto import ParetoOptions, fastest_passing, refine, trace
from unetc.compiler.search.quality_gate import QualityGate
from unetc.compiler.search.repair import RepairOptions, repair
from unetc.compiler.search.set_up import Setup, set_up
from unetc.compiler.search.workbench import Candidate, Workbench
from unetc.errors import CompileError, ModelError, PlanError, QualityGateError
from unetc.models.model import Model
from unetc.percent import percent
from unetc.progress import OnProgress, Progress, ignore

from .contents import Contents
from .prepare import prepare_encoder
from .store import check_destination, write_bundle
from .text import prepare_text

SEARCH_REPAIR = RepairOptions(evaluations=10, patience=5)
QUALITY_GATE_SEARCH_STEPS = 5
"""Halvings of the interval that holds the largest budget that passes a quality gate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of a build."""

    plan: PlanOptions
    steps: int = 50
    """Default number of steps of the bundle; time and damage are measured with it."""
    quality_gate: QualityGate | None = None
    at: QualityGate | None = None
    """Build the fastest plan of the curve that passes this, whatever the budget."""
    repair: RepairOptions = field(default_factory=RepairOptions)
    controls: bool = True
    """Whether to add control plans, for `verify` and the report."""
    random_plans: int = 5
    """Number of random control plans."""
    text: bool = True
    """Whether to add the text encoders, so that the bundle takes any prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    candidate: Candidate
    correction: float
    measured: Measurement
    evaluated: tuple[Measurement, ...]


def build(
    model: Model,
    profile: Profile,
    path: Path,
    options: BuildOptions,
    *,
    cache: Path,
    plan: Plan | None = None,
    on_progress: OnProgress = ignore,
) -> Manifest:
    """Build a bundle.

    Args:
        model: The model.
        profile: An analysis of this model.
        path: Folder of the bundle; an older bundle there is replaced.
        options: Saving, limits and extras.
        cache: Folder for captures and partial results.
        plan: A plan of this profile to build unchanged, whatever the budget; made and fitted when not given.
        on_progress: Called as the work advances.

    Returns:
        The manifest of the bundle.

    Raises:
        ModelError: If the model cannot be captured.
        ProfileError: If the profile belongs to another model.
        PlanError: If no plan meets the budget.
        QualityGateError: If the quality gate fails; the message names the largest budget that passes.
        ArtifactError: If the bundle cannot be written.
    """
    check_destination(path)
    setup = set_up(model, profile, steps=options.steps, cache=cache, plan=plan, on_progress=on_progress)
    workbench = setup.workbench
    if options.at is not None:
        tracing = ParetoOptions(
            steps=options.steps,
            max_engines=options.plan.max_engines,
            max_memory=options.plan.max_memory,
            planner=options.plan.planner,
        )
        curve = refine(setup, trace(setup, tracing, on_progress), options.at, tracing, on_progress)
        plan = _at(curve, options.at)
    scope = control_scope(profile.model, profile.control)
    notes = [*(setup.profile.notes or ()), *(() if scope is None else (scope,))]
    seed = setup.profile.seed + 1
    fitted = _fit(workbench, options, notes, seed, on_progress) if plan is None else _take(workbench, plan, seed)
    if options.quality_gate is not None and not options.quality_gate.passes(fitted.measured.damage):
        asked = options.plan if plan is None else replace(options.plan, budget=plan.budget)
        raise _quality_gate_failed(workbench, asked, options.quality_gate, fitted, seed, on_progress)
    wanted = options.controls and fitted.candidate.saving > 0.01
    controls: list[tuple[str, Candidate]] = []
    if wanted:
        controls = make_controls(
            workbench,
            fitted.candidate,
            fitted.correction,
            notes,
            seed,
            on_progress,
            random_plans=options.random_plans,
        )
    pairs = check_pairs(workbench, fitted.candidate, seed, on_progress) if wanted else ()
    return _write(path, setup, options, fitted, controls, pairs, notes, seed)


def _at(curve: Pareto, quality_gate: QualityGate) -> Plan:
    """Pick the fastest plan that passes; its saving becomes its budget."""
    point = fastest_passing(curve, quality_gate)
    return msgspec.structs.replace(point.plan, budget=max(0.0, min(0.99, 1 - point.time_ratio)))


def _fit(workbench: Workbench, options: BuildOptions, notes: list[str], seed: int, on_progress: OnProgress) -> _Fitted:
    """Fit by the engines' times and repair by sampling; aim higher once if the mean of both misses the budget.

    Both are noisy: alternating engine calls are not a sampling run, and sampling runs are few.
    """
    fitted = _fit_and_repair(workbench, options, options.plan, 1.0, notes, seed, on_progress)
    budget = options.plan.budget
    shortfall = budget - (fitted.candidate.saving + 1 - fitted.measured.time_ratio) / 2
    if shortfall > 0 and budget > 0:  # without a budget noise is no shortfall
        aim = replace(options.plan, budget=min(0.99, budget + shortfall + 0.01 * budget))
        notes.append(f"engines and sampling saved {percent(budget - shortfall)}; fitted again to {percent(aim.budget)}")
        try:
            fitted = _fit_and_repair(workbench, options, aim, fitted.correction, notes, seed, on_progress)
        except PlanError as error:
            notes.append(f"kept the plan that is {percent(shortfall)} short: {error}")
    plan = msgspec.structs.replace(fitted.candidate.plan, budget=budget)
    return replace(fitted, candidate=replace(fitted.candidate, plan=plan))


def _fit_and_repair(
    workbench: Workbench,
    options: BuildOptions,
    plan: PlanOptions,
    correction: float,
    notes: list[str],
    seed: int,
    on_progress: OnProgress,
) -> _Fitted:
    on_progress(Progress(stage="fitting the plan", done=0, total=1))
    candidate, correction = fit_plan(workbench, plan, notes, correction=correction)
    on_progress(Progress(stage="fitting the plan", done=1, total=1))
    repaired = repair(workbench, candidate, plan.budget, seed, options.repair, on_progress)
    first, last = (damage.relative_l2.mean for damage in (repaired.evaluated[0].damage, repaired.damage))
    notes.append(
        f"planned for a damage of {candidate.plan.prediction.relative_l2:.4f}, measured {first:.4f}; after sampling "
        f"{len(repaired.evaluated)} schedules {last:.4f}"
    )
    measured = workbench.measure(repaired.candidate, seed=seed)
    evaluated = tuple(Measurement(time_ratio=one.candidate.time_ratio, damage=one.damage) for one in repaired.evaluated)
    return _Fitted(candidate=repaired.candidate, correction=correction, measured=measured, evaluated=evaluated)


def _take(workbench: Workbench, plan: Plan, seed: int) -> _Fitted:
    """Measure a given plan without changing it."""
    candidate = workbench.compile(plan)
    return _Fitted(candidate=candidate, correction=1.0, measured=workbench.measure(candidate, seed=seed), evaluated=())


def _quality_gate_failed(
    workbench: Workbench,
    options: PlanOptions,
    quality_gate: QualityGate,
    failed: _Fitted,
    seed: int,
    on_progress: OnProgress,
) -> QualityGateError:
    """Search by halving for the largest budget that passes, and name it in the error."""
    low, high = 0.0, options.budget
    for step in range(QUALITY_GATE_SEARCH_STEPS):
        middle = (low + high) / 2
        on_progress(Progress(stage="searching a budget that passes", done=step, total=QUALITY_GATE_SEARCH_STEPS))
        try:
            candidate, _ = fit_plan(workbench, replace(options, budget=middle), [], correction=failed.correction)
            repaired = repair(workbench, candidate, middle, seed, SEARCH_REPAIR, ignore)
            passes = quality_gate.passes(workbench.measure(repaired.candidate, seed=seed).damage)
        except PlanError:
            passes = False
        low, high = (middle, high) if passes else (low, middle)
    on_progress(
        Progress(
            stage="searching a budget that passes", done=QUALITY_GATE_SEARCH_STEPS, total=QUALITY_GATE_SEARCH_STEPS
        )
    )
    advice = f"The largest budget that passes is about {low:.3f}" if low else f"No budget above {high:.3f} passes"
    return QualityGateError(
        f"the quality gate {quality_gate} fails at budget {options.budget:g}, which saves "
        f"{percent(options.budget)}: measured {quality_gate.metric} is "
        f"{quality_gate.value(failed.measured.damage):.4g}. {advice} (searched to ±{(high - low):.3f}). "
        "Nothing was written."
    )


def _write(
    path: Path,
    setup: Setup,
    options: BuildOptions,
    fitted: _Fitted,
    controls: list[tuple[str, Candidate]],
    pairs: tuple[EnginePair, ...],
    notes: list[str],
    seed: int,
) -> Manifest:
    contents = Contents(setup)
    _add_inputs(contents, setup, options, notes)
    manifest = partial(
        contents.manifest,
        steps=options.steps,
        full=contents.add_full(fitted.candidate.full_ms),
        candidate=fitted.candidate,
        engines=contents.add_engines("engines/", fitted.candidate),
        controls=tuple(
            Control(name=name, plan=own.plan, engines=contents.add_engines(f"controls/{name}-", own))
            for name, own in controls
        ),
        measured=fitted.measured,
        evaluated=fitted.evaluated,
        pairs=pairs,
        used_seeds=(setup.profile.seed, seed),
        notes=tuple(notes),
    )
    return write_bundle(path, contents.files, manifest)


def _add_inputs(contents: Contents, setup: Setup, options: BuildOptions, notes: list[str]) -> None:
    """Add the encoders of images and of prompts; a note describes an encoder that cannot be exported."""
    try:
        if (encoder := prepare_encoder(setup.prepared)) is not None:
            contents.add_encoder(encoder)
    except CompileError as error:
        notes.append(f"the bundle cannot start from images: {str(error).rstrip('.')}")
    if not options.text:
        return
    try:
        if (text := prepare_text(setup.prepared)) is not None:
            contents.add_text(text)
    except (CompileError, ModelError) as error:
        notes.append(f"the bundle takes only the prompts that it was built with: {str(error).rstrip('.')}")
