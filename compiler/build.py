"""model + budget → bundle: run what is missing, measure the joint plan, write the bundle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from safetensors.numpy import save

import unetc
from unetc.artifacts.manifest import (
    SCHEDULER_ROWS,
    BundleDecoder,
    BundleEngine,
    Conditioning,
    Control,
    EnginePair,
    FileRecord,
    LoweredGraph,
    Manifest,
    Measurement,
)
from unetc.artifacts.pareto import Pareto
from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import Profile
from unetc.backend import WEIGHTS, SerialisedGraph
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.additivity import check_pairs
from unetc.compiler.search.controls import make_controls
from unetc.compiler.search.fit import fit_plan
from unetc.compiler.search.pareto import ParetoOptions, fastest_passing, refine, trace
from unetc.compiler.search.quality_gate import QualityGate
from unetc.compiler.search.repair import RepairOptions, repair
from unetc.compiler.search.set_up import Setup, set_up
from unetc.compiler.search.workbench import Candidate, Workbench
from unetc.errors import PlanError, QualityGateError
from unetc.models.model import Model
from unetc.precision import Precision
from unetc.progress import OnProgress, Progress, ignore
from unetc.treatments import Treatment

from .store import check_destination, write_bundle

PROFILE_FILE = "profile.json"
SCHEDULER_FILE = "scheduler.safetensors"
CONDITIONS_FILE = "conditions.safetensors"
DECODER_FILE = "decoder.onnx"
SEARCH_REPAIR = RepairOptions(evaluations=10, patience=5)
GATE_SEARCH_STEPS = 5
"""Halvings of the interval in which the largest budget that passes a gate is searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to build."""

    plan: PlanOptions
    steps: int = 50
    """Default number of steps of the bundle; time and damage are measured at it."""
    quality_gate: QualityGate | None = None
    at: QualityGate | None = None
    """Build the fastest plan of the curve that passes this, whatever the budget."""
    repair: RepairOptions = field(default_factory=RepairOptions)
    controls: bool = True
    """Whether to put control plans beside the plan, for `verify` and the report."""
    random_plans: int = 5
    """Random ones among them."""


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
        options: What to build.
        cache: Folder for captures and partial results.
        plan: A plan of this profile to build as it is, whatever the budget; made and fitted when not given.
        on_progress: Told how far the work is.

    Returns:
        The manifest of the bundle.

    Raises:
        ModelError: If the model cannot be captured.
        ProfileError: If the profile belongs to another model.
        PlanError: If no plan meets the budget.
        QualityGateError: If the gate fails; the message names the largest budget that passes.
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
    notes: list[str] = []
    seed = setup.profile.seed + 1
    fitted = _fit(workbench, options, notes, seed, on_progress) if plan is None else _take(workbench, plan, seed)
    if options.quality_gate is not None and not options.quality_gate.passes(fitted.measured.damage):
        asked = options.plan if plan is None else replace(options.plan, budget=plan.budget)
        raise _gate_failed(workbench, asked, options.quality_gate, fitted, seed, on_progress)
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


def _at(curve: Pareto, gate: QualityGate) -> Plan:
    """Pick the fastest plan that passes; what it saves becomes its budget."""
    point = fastest_passing(curve, gate)
    return msgspec.structs.replace(point.plan, budget=max(0.0, min(0.99, 1 - point.time_ratio)))


def _fit(workbench: Workbench, options: BuildOptions, notes: list[str], seed: int, on_progress: OnProgress) -> _Fitted:
    """Fit by the engines' times and repair by sampling; if both together say it misses the budget, aim higher once.

    Each of the two is noisy in its own way: a rotation of engines is not a sampling run, and sampling runs are few.
    """
    fitted = _fit_and_repair(workbench, options, options.plan, 1.0, notes, seed, on_progress)
    budget = options.plan.budget
    shortfall = budget - (fitted.candidate.saving + 1 - fitted.measured.time_ratio) / 2
    if shortfall > 0 and budget > 0:  # without a budget noise is no shortfall
        aim = replace(options.plan, budget=min(0.99, budget + shortfall + 0.01 * budget))
        notes.append(
            f"engines and sampling saved {100 * (budget - shortfall):.1f} %; fitted again to {100 * aim.budget:.1f} %"
        )
        try:
            fitted = _fit_and_repair(workbench, options, aim, fitted.correction, notes, seed, on_progress)
        except PlanError as error:
            notes.append(f"kept the plan that is {100 * shortfall:.1f} % short: {error}")
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
    """Measure a plan as it is."""
    candidate = workbench.compile(plan)
    return _Fitted(candidate=candidate, correction=1.0, measured=workbench.measure(candidate, seed=seed), evaluated=())


def _gate_failed(
    workbench: Workbench,
    options: PlanOptions,
    gate: QualityGate,
    failed: _Fitted,
    seed: int,
    on_progress: OnProgress,
) -> QualityGateError:
    """Search by halving for the largest budget that passes, and say it."""
    low, high = 0.0, options.budget
    for step in range(GATE_SEARCH_STEPS):
        middle = (low + high) / 2
        on_progress(Progress(stage="searching a budget that passes", done=step, total=GATE_SEARCH_STEPS))
        try:
            candidate, _ = fit_plan(workbench, replace(options, budget=middle), [], correction=failed.correction)
            repaired = repair(workbench, candidate, middle, seed, SEARCH_REPAIR, ignore)
            passes = gate.passes(workbench.measure(repaired.candidate, seed=seed).damage)
        except PlanError:
            passes = False
        low, high = (middle, high) if passes else (low, middle)
    on_progress(Progress(stage="searching a budget that passes", done=GATE_SEARCH_STEPS, total=GATE_SEARCH_STEPS))
    advice = f"The largest budget that passes is about {low:.3f}" if low else f"No budget above {high:.3f} passes"
    return QualityGateError(
        f"the quality gate {gate} fails at budget {options.budget:g}: measured {gate.metric} is "
        f"{gate.value(failed.measured.damage):.4g}. {advice} (searched to ±{(high - low):.3f}). Nothing was written."
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
    header, rows = setup.scheduler.to_array()
    profile = setup.profile
    contents: dict[str, bytes | Path] = {
        WEIGHTS: setup.prepared.gated.weights,
        PROFILE_FILE: profile.to_json(),
        SCHEDULER_FILE: save({SCHEDULER_ROWS: rows}),
    }
    if setup.conditions.rows:
        contents[CONDITIONS_FILE] = save(setup.conditions.to_arrays())
    if setup.decoder is not None:
        contents[DECODER_FILE] = setup.decoder
    full = setup.workbench.full
    names: dict[bytes, str] = {}
    lowered: dict[str, LoweredGraph | None] = {}

    def add(name: str, graph: SerialisedGraph, treatments: dict[str, Treatment], step_ms: float) -> BundleEngine:
        """Give a graph a file, equal ones the same."""
        path = names.setdefault(graph.graph, name)
        if path not in contents:
            contents[path] = graph.graph
            lowered[path] = lower(path, graph)
        return BundleEngine(
            graph=path,
            unused_weights=tuple(sorted(full.weights - graph.weights)),
            lowered=lowered[path],
            treatments=treatments,
            step_ms=step_ms,
        )

    def lower(path: str, graph: SerialisedGraph) -> LoweredGraph | None:
        """Put a graph beside it in the precision of the target, if that is less than float32."""
        if setup.lowering is None:
            return None
        low = setup.lowering.lower(graph)
        contents[own := f"{setup.lowering.precision}/{path}"] = low.graph
        return LoweredGraph(graph=own, weights=tuple(sorted(low.weights)))

    def add_all(prefix: str, candidate: Candidate) -> tuple[BundleEngine, ...]:
        made = zip(candidate.graphs, candidate.plan.engines, candidate.step_ms, strict=True)
        return tuple(add(f"{prefix}{i}.onnx", graph, own.treatments, ms) for i, (graph, own, ms) in enumerate(made))

    model = add("engines/full.onnx", full, {}, fitted.candidate.full_ms)
    engines = add_all("engines/", fitted.candidate)
    compared = tuple(
        Control(name=name, plan=candidate.plan, engines=add_all(f"controls/{name}-", candidate))
        for name, candidate in controls
    )

    def manifest(files: tuple[FileRecord, ...]) -> Manifest:
        return Manifest(
            unetc=unetc.__version__,
            model=profile.model,
            target=profile.target,
            precision=setup.lowering.precision if setup.lowering else Precision.FP32,
            threads=profile.threads,
            sample_shape=profile.sample_shape,
            denoiser_config=setup.prepared.model.denoiser_config,
            predicted_channels=setup.prepared.gated.predicted_channels,
            conditioning=Conditioning(
                file=CONDITIONS_FILE,
                prompts=profile.prompts,
                used=profile.used_prompts,
                guidance_scale=profile.guidance_scale,
            )
            if setup.conditions.rows
            else None,
            decoder=BundleDecoder(graph=DECODER_FILE, scale=setup.prepared.model.decoder_scale)
            if setup.decoder is not None
            else None,
            batch=profile.batch,
            steps=options.steps,
            weights=WEIGHTS,
            profile=PROFILE_FILE,
            scheduler=header,
            scheduler_file=SCHEDULER_FILE,
            full=model,
            plan=fitted.candidate.plan,
            engines=engines,
            controls=compared,
            measured=fitted.measured,
            evaluated=fitted.evaluated,
            pairs=pairs,
            used_seeds=(profile.seed, seed),
            notes=tuple(notes),
            files=files,
        )

    return write_bundle(path, contents, manifest)
