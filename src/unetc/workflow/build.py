"""model + budget → bundle: run what is missing, measure the joint plan, write the bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from filelock import FileLock
from safetensors.numpy import save

import unetc
from unetc.analyzer.analysis import AnalysisOptions, analyze
from unetc.artifacts.manifest import SOLVER_ROWS, BundleEngine, Control, FileRecord, Manifest, Measurement
from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import Profile
from unetc.compiler.engines import check_plan
from unetc.compiler.planner import PlanOptions
from unetc.compiler.store import check_destination, write_bundle
from unetc.errors import PlanError, ProfileError, QualityGateError
from unetc.graph.gated import SerialisedGraph
from unetc.models import Model, find_model
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.backend import open_backend
from unetc.runtime.session import FULL_ENGINE
from unetc.solver.extract import extract, make_scheduler
from unetc.solver.table import SolverTables

from .fit import RANDOM_PLANS, fit_plan, fit_random, fit_uniform
from .gate import QualityGate
from .prepare import Prepared, prepare, prepare_solver
from .workbench import Candidate, Workbench

PROFILE_FILE = "profile.json"
WEIGHTS_FILE = "weights.safetensors"
SOLVER_FILE = "solver.safetensors"
GATE_SEARCH_STEPS = 5
"""Halvings of the interval in which the largest budget that passes a gate is searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to build."""

    plan: PlanOptions
    analysis: AnalysisOptions = field(default_factory=AnalysisOptions)
    steps: int = 50
    """Default number of steps of the bundle; time and damage are measured at it."""
    gate: QualityGate | None = None
    controls: bool = True
    """Whether to put control plans beside the plan, for `verify` and the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    candidate: Candidate
    correction: float
    measured: Measurement


def analyze_model(name: str, options: AnalysisOptions, *, cache: Path, on_progress: OnProgress = ignore) -> Profile:
    """Capture a model and measure it.

    Raises:
        ModelError: If there is no such model or it is not supported.
        ProfileError: If it cannot be analysed.
    """
    return _analyze(find_model(name), options, cache, on_progress)


def build(
    name: str,
    path: Path,
    options: BuildOptions,
    *,
    cache: Path,
    profile: Profile | None = None,
    plan: Plan | None = None,
    on_progress: OnProgress = ignore,
) -> Manifest:
    """Build a bundle.

    Args:
        name: Built-in model, diffusers folder or Hub id.
        path: Folder of the bundle; an older bundle there is replaced.
        options: What to build.
        cache: Folder for captures and partial results.
        profile: An analysis of this model; made when not given.
        plan: A plan of this profile to build as it is, whatever the budget; made and fitted when not given.
        on_progress: Told how far the work is.

    Returns:
        The manifest of the bundle.

    Raises:
        ModelError: If there is no such model or it is not supported.
        ProfileError: If the profile belongs to another model.
        PlanError: If no plan meets the budget.
        QualityGateError: If the gate fails; the message names the largest budget that passes.
        ArtifactError: If the bundle cannot be written.
    """
    check_destination(path)
    model = find_model(name)
    profile = profile or _analyze(model, options.analysis, cache, on_progress)
    _check_profile(profile, model)
    if plan is not None:
        check_plan(plan, profile)
    prepared = prepare(model, cache, on_progress)
    if profile.components != prepared.gated.components:
        raise ProfileError("the profile knows other components than this version finds. Analyse the model again.")
    solver = prepare_solver(model, profile.scheduler, (options.steps,), on_progress)
    backend = open_backend(profile.target, threads=profile.threads)
    workbench = Workbench(prepared.gated, profile, solver, backend, steps=options.steps)
    notes: list[str] = []
    seed = profile.seed + 1
    fitted = _fit(workbench, options.plan, notes, seed, on_progress) if plan is None else _take(workbench, plan, seed)
    if options.gate is not None and not options.gate.passes(fitted.measured.damage):
        asked = options.plan if plan is None else replace(options.plan, budget=plan.budget)
        raise _gate_failed(workbench, asked, options.gate, fitted, seed, on_progress)
    wanted = options.controls and fitted.candidate.saving > 0.01
    controls = _controls(workbench, fitted, notes, on_progress) if wanted else []
    return _write(path, prepared, profile, solver, options, fitted, controls, notes, seed)


def _analyze(model: Model, options: AnalysisOptions, cache: Path, on_progress: OnProgress) -> Profile:
    """Analyse, having refused what can be refused before the capture, which takes long."""
    table = extract(make_scheduler(options.scheduler, model.scheduler_config), options.steps)
    backend = open_backend(options.target, threads=options.threads)
    prepared = prepare(model, cache, on_progress)
    with FileLock(prepared.work / "analysis.lock"):  # a second process reads what the first has measured
        return analyze(
            prepared.gated,
            model.reference,
            table,
            backend,
            sample_shape=model.sample_shape,
            options=options,
            work=prepared.work,
            on_progress=on_progress,
        )


def _check_profile(profile: Profile, model: Model) -> None:
    reference = model.reference
    if profile.model.sha256 != reference.sha256:
        raise ProfileError(
            f"the profile is of {profile.model.name} ({profile.model.sha256[:12]}), not of {reference.name} "
            f"({reference.sha256[:12]}). Analyse this model: `unetc analyze {reference.name} -o profile.json`."
        )


def _fit(workbench: Workbench, options: PlanOptions, notes: list[str], seed: int, on_progress: OnProgress) -> _Fitted:
    """Fit by the engines' times, then check by sampling; if sampling misses the budget, aim higher once."""
    on_progress(Progress(stage="fitting the plan", done=0, total=2))
    candidate, correction = fit_plan(workbench, options, notes)
    on_progress(Progress(stage="fitting the plan", done=1, total=2))
    measured = workbench.measure(candidate, seed=seed)
    if 1 - measured.time_ratio < options.budget and options.budget > 0:  # without a budget noise is no shortfall
        shortfall = options.budget - (1 - measured.time_ratio)
        aim = replace(options, budget=min(0.99, options.budget + shortfall + 0.01 * options.budget))
        notes.append(f"sampling saved {1 - measured.time_ratio:.1%}, {shortfall:.1%} short; fitted to {aim.budget:.1%}")
        try:
            candidate, correction = fit_plan(workbench, aim, notes, correction=correction)
            candidate = replace(candidate, plan=msgspec.structs.replace(candidate.plan, budget=options.budget))
            measured = workbench.measure(candidate, seed=seed)
        except PlanError as error:
            notes.append(f"kept the plan that is {shortfall:.1%} short: {error}")
    on_progress(Progress(stage="fitting the plan", done=2, total=2))
    return _Fitted(candidate=candidate, correction=correction, measured=measured)


def _take(workbench: Workbench, plan: Plan, seed: int) -> _Fitted:
    """Measure a plan as it is."""
    candidate = workbench.compile(plan)
    return _Fitted(candidate=candidate, correction=1.0, measured=workbench.measure(candidate, seed=seed))


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
            passes = gate.passes(workbench.measure(candidate, seed=seed).damage)
        except PlanError:
            passes = False
        low, high = (middle, high) if passes else (low, middle)
    on_progress(Progress(stage="searching a budget that passes", done=GATE_SEARCH_STEPS, total=GATE_SEARCH_STEPS))
    advice = f"The largest budget that passes is about {low:.3f}" if low else f"No budget above {high:.3f} passes"
    return QualityGateError(
        f"the quality gate {gate} fails at budget {options.budget:g}: measured {gate.metric} is "
        f"{gate.value(failed.measured.damage):.4g}. {advice} (searched to ±{(high - low):.3f}). Nothing was written."
    )


def _controls(
    workbench: Workbench, fitted: _Fitted, notes: list[str], on_progress: OnProgress
) -> list[tuple[str, Candidate]]:
    """Make the controls, at the measured time of the plan; one that cannot be made is noted and left out."""
    target, total = fitted.candidate.saving, 1 + RANDOM_PLANS
    makers: list[tuple[str, Callable[[], Candidate]]] = [
        ("uniform", lambda: fit_uniform(workbench, target, fitted.correction))
    ]
    for i in range(RANDOM_PLANS):
        makers.append(
            (
                f"random-{i + 1}",
                lambda i=i: fit_random(workbench, target, fitted.correction, fitted.candidate.plan, i),  # type: ignore[misc]
            )
        )
    controls = []
    for done, (name, make) in enumerate(makers):
        on_progress(Progress(stage="controls", done=done, total=total))
        try:
            controls.append((name, make()))
        except PlanError as error:
            notes.append(f"left out the control {name}: {error}")
    on_progress(Progress(stage="controls", done=total, total=total))
    return controls


def _write(
    path: Path,
    prepared: Prepared,
    profile: Profile,
    solver: SolverTables,
    options: BuildOptions,
    fitted: _Fitted,
    controls: list[tuple[str, Candidate]],
    notes: list[str],
    seed: int,
) -> Manifest:
    header, rows = solver.to_array()
    contents: dict[str, bytes | Path] = {
        WEIGHTS_FILE: prepared.gated.weights,
        PROFILE_FILE: profile.to_json(),
        SOLVER_FILE: save({SOLVER_ROWS: rows}),
    }
    known = fitted.candidate.graphs[FULL_ENGINE].weights

    def add(prefix: str, candidate: Candidate) -> tuple[BundleEngine, ...]:
        engines = []
        for i, graph in enumerate(candidate.graphs):
            name = "engines/full.onnx" if i == FULL_ENGINE else f"{prefix}{i}.onnx"
            contents[name] = graph.graph
            engines.append(_record(name, candidate, i, graph, known))
        return tuple(engines)

    engines = add("engines/phase-", fitted.candidate)
    compared = tuple(
        Control(name=name, plan=candidate.plan, engines=add(f"controls/{name}-", candidate))
        for name, candidate in controls
    )

    def manifest(files: tuple[FileRecord, ...]) -> Manifest:
        return Manifest(
            unetc=unetc.__version__,
            model=profile.model,
            target=profile.target,
            threads=profile.threads,
            sample_shape=profile.sample_shape,
            batch=profile.batch,
            steps=options.steps,
            weights=WEIGHTS_FILE,
            profile=PROFILE_FILE,
            solver=header,
            solver_file=SOLVER_FILE,
            plan=fitted.candidate.plan,
            engines=engines,
            controls=compared,
            measured=fitted.measured,
            used_seeds=(profile.seed, seed),
            notes=tuple(notes),
            files=files,
        )

    return write_bundle(path, contents, manifest)


def _record(
    name: str, candidate: Candidate, engine: int, graph: SerialisedGraph, known: frozenset[str]
) -> BundleEngine:
    return BundleEngine(
        graph=name,
        unused_weights=tuple(sorted(known - graph.weights)),
        treatments=candidate.plan.engines[engine].treatments,
        step_ms=candidate.step_ms[engine],
    )
