"""Profile + budget → bundle: fit a plan, measure it jointly, write the bundle."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import msgspec

from unetc.arguments import plain_fields, wrong_type
from unetc.artifacts.manifest import Control, EnginePair, Level, Manifest, Measurement, level_name
from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import Damage, Profile
from unetc.artifacts.scope import control_scope
from unetc.compiler.planner.emissions import share_engines
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.additivity import check_pairs
from unetc.compiler.search.bench import SAMPLING_ROUNDS
from unetc.compiler.search.candidate import Candidate
from unetc.compiler.search.controls import Controls, MadeControl, make_controls
from unetc.compiler.search.find_plan import Found, choose_again, find_plan
from unetc.compiler.search.fit import aim_again, budget_of, fit_plan
from unetc.compiler.search.pareto import ParetoOptions, passing_points, refine, trace
from unetc.compiler.search.quality_gate import QualityGate
from unetc.compiler.search.repair import RepairOptions, repair
from unetc.compiler.search.set_up import Setup, set_up
from unetc.compiler.search.workbench import TUNED_BATCHES, Workbench
from unetc.errors import CompileError, ModelError, PlanError, QualityGateError
from unetc.jobs import Cluster
from unetc.models.model import Model
from unetc.percent import percent
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.rollout import FULL_ENGINE

from .contents import Contents
from .prepare import prepare_encoder
from .store import check_destination, write_bundle
from .text import prepare_text

SEARCH_REPAIR = RepairOptions(evaluations=10, patience=5)
MOST_CORRECTIONS = 2
"""Most times that another plan is chosen because the measured one misses the budget or lies at its edge."""
QUALITY_GATE_SEARCH_STEPS = 5
"""Halvings of the interval that holds the largest budget that passes a quality gate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of a build."""

    plan: PlanOptions
    """Budget of the default quality level, and limits of every level."""
    ladder: tuple[float, ...] = ()
    """Budgets of further quality levels, rising from the default level's."""
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

    def __post_init__(self) -> None:
        """Check the numbers and the ladder.

        Raises:
            PlanError: If a value has another type, a number or a budget is out of range, two levels would have the same
                name, or budgets do not rise.
        """
        plain_fields(self, PlanError)
        if self.random_plans < 0:
            raise PlanError(f"the number of random plans must be at least 0, got {self.random_plans}.")
        if not isinstance(self.ladder, tuple | list):
            raise wrong_type("ladder", self.ladder, "a tuple or a list of budgets, as (0.4, 0.55)", PlanError)
        ladder = tuple(replace(self.plan, budget=budget).budget for budget in self.ladder)
        object.__setattr__(self, "ladder", ladder)
        if not ladder:
            return
        got = ", ".join(f"{budget:g}" for budget in self.budgets)
        if self.at is not None:
            raise PlanError(
                f"{self.at} chooses one plan itself, but several budgets are given: {got}. Give one of them."
            )
        if not all(level_name(low) != level_name(high) and low < high for low, high in pairwise((0.0, *self.budgets))):
            raise PlanError(
                f"the budgets of quality levels must rise in steps of at least 0.001, from above 0; got {got}. "
                "Try 0.27,0.4,0.55. The full model is a level of every bundle."
            )

    @property
    def budgets(self) -> tuple[float, ...]:
        """Budgets of all quality levels, the default level's first."""
        return (self.plan.budget, *self.ladder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    candidate: Candidate
    correction: float
    measured: Measurement
    plain: Damage | None
    """Damage with the scheduler's plain rows, if others are tuned to the plan."""
    evaluated: tuple[Measurement, ...]
    whole_steps: Candidate | None = None
    """The best plan of whole steps alone that the search has found."""

    @property
    def saved(self) -> float:
        """Mean of the savings by the engines' times and while it sampled.

        Both are noisy: alternating engine calls are not a sampling run, and sampling runs are few.
        """
        return (self.candidate.saving + 1 - self.measured.time_ratio) / 2

    def aim_again(self, budget: float) -> float | None:
        """Return the saving to ask for next, see `aim_again` of the search."""
        return aim_again(budget, self.candidate.saving, self.saved)


def build(
    model: Model,
    profile: Profile,
    path: Path,
    options: BuildOptions,
    *,
    cache: Path,
    plan: Plan | None = None,
    cluster: Cluster | None = None,
    on_progress: OnProgress = ignore,
) -> Manifest:
    """Build a bundle.

    Args:
        model: The model.
        profile: An analysis of this model.
        path: Folder of the bundle; an older bundle there is replaced.
        options: Saving, limits and extras.
        cache: Folder for captures and partial results.
        plan: A plan of this profile to build unchanged, whatever the budget; made and fitted when not given. It is
            the only quality level then.
        cluster: Where to measure; None measures in this process.
        on_progress: Called as the work advances.

    Returns:
        The manifest of the bundle.

    Raises:
        ModelError: If the model cannot be captured.
        ProfileError: If the profile belongs to another model, or the cluster cannot measure it.
        PlanError: If no plan meets a budget, or a plan is given along with several budgets.
        QualityGateError: If a quality level fails the gate; the message names the largest budget that passes.
        ArtifactError: If the bundle cannot be written.
        WorkerError: If the cluster cannot be joined or fails.
    """
    check_destination(path)
    check_options(options, plan)
    with set_up(
        model, profile, steps=options.steps, cache=cache, plan=plan, cluster=cluster, on_progress=on_progress
    ) as setup:
        return _build(setup, path, options, plan, on_progress)


def check_options(options: BuildOptions, plan: Plan | None) -> None:
    """Refuse options that contradict a given plan.

    Raises:
        PlanError: If they do.
    """
    if plan is not None and options.ladder:
        raise PlanError(
            f"one plan is given, and {len(options.budgets)} budgets. Give the plan alone, or the budgets alone."
        )
    if plan is not None and options.at is not None:
        raise PlanError(f"a plan is given, and {options.at} to choose one by. Give one of them.")


def _build(setup: Setup, path: Path, options: BuildOptions, plan: Plan | None, on_progress: OnProgress) -> Manifest:
    workbench, model = setup.workbench, setup.prepared.model
    scope = control_scope(setup.profile.model, setup.profile.control)
    notes = [*(setup.profile.notes or ()), *(() if scope is None else (scope,)), *workbench.workers.notes]
    seed = setup.profile.seed + 1
    if options.at is not None:
        levels = [_search(setup, options, options.at, notes, seed, on_progress)]
    elif plan is not None:
        levels = [_take(workbench, options, plan, notes, seed, on_progress)]
    else:
        levels = _fit_ladder(workbench, options, notes, seed, on_progress)
    default = levels[0]
    wanted = options.controls and default.candidate.saving > 0.01
    controls = Controls()
    if wanted:
        controls = make_controls(
            workbench,
            model,
            default.candidate,
            default.correction,
            notes,
            seed,
            on_progress,
            time_ratio=default.measured.time_ratio,
            whole_steps=default.whole_steps,
            limits=options.plan,
            repair=options.repair,
            random_plans=options.random_plans,
        )
    pairs = check_pairs(workbench, default.candidate, seed, on_progress) if wanted else ()
    return _write(path, setup, options, levels, controls, pairs, notes, seed, on_progress)


def _search(
    setup: Setup, options: BuildOptions, gate: QualityGate, notes: list[str], seed: int, on_progress: OnProgress
) -> _Fitted:
    """Find the fastest plan that passes a gate on the samples of a search, and then on fresh ones.

    Raises:
        QualityGateError: If there is none.
    """
    traced = ParetoOptions(
        steps=options.steps,
        max_engines=options.plan.max_engines,
        max_memory=options.plan.max_memory,
        planner=options.plan.planner,
    )
    evaluations = min(traced.repair.evaluations, options.repair.evaluations)
    traced = replace(traced, repair=replace(traced.repair, tune=options.repair.tune, evaluations=evaluations))
    curve = refine(setup, trace(setup, traced, on_progress), gate, traced, on_progress)
    gates = [gate] if options.quality_gate is None else [gate, options.quality_gate]
    asked = " and ".join(map(str, gates))
    failed: list[Damage] = []
    for point in passing_points(curve, gate):
        if not all(one.passes(point.damage) for one in gates):
            continue
        if failed and all(one.distance(point.damage) >= one.distance(failed[-1]) for one in gates):
            continue  # no better than one that fails
        own: list[str] = []
        plan = msgspec.structs.replace(point.plan, budget=max(0.0, min(0.99, 1 - point.time_ratio)))
        fitted = _measure(setup.workbench, setup.workbench.compile(plan), options, seed, own)
        if all(one.passes(fitted.measured.damage) for one in gates):
            notes.extend(own)
            return fitted
        failed.append(point.damage)
    if not failed:
        raise QualityGateError(f"no plan of the curve passes {asked}. Ask for less. Nothing was written.")
    values = " and ".join(f"{one.metric} {one.value(fitted.measured.damage):.4g}" for one in gates)
    raise QualityGateError(
        f"{len(failed)} plans pass {asked} on the samples of the search, but none does on fresh ones: the last has "
        f"{values}. Ask for less, or build with a small --budget. Nothing was written."
    )


def _fit_ladder(
    workbench: Workbench, options: BuildOptions, notes: list[str], seed: int, on_progress: OnProgress
) -> list[_Fitted]:
    """Fit all quality levels, from the largest budget to the smallest.

    Levels share engine 0. It runs more often at small budgets, so these are fitted last, when most of the branches that
    it has to emit are known.

    Returns:
        The levels, from the smallest budget to the largest.
    """
    levels: list[_Fitted] = []
    emits: frozenset[str] = frozenset()
    noted: list[str] = []
    for budget in reversed(options.budgets):
        name, own = level_name(budget), list[str]()
        asked, report = replace(options.plan, budget=budget), on_progress
        if options.ladder:
            report = _labelled(on_progress, name)
        fitted = _fit(workbench, options, asked, own, seed, report, emits)
        _check_gate(workbench, options, asked, fitted, seed, report)
        levels.insert(0, fitted)
        emits |= {*fitted.candidate.plan.engines[FULL_ENGINE].emits}
        noted = [*(f"{name}: {note}" if options.ladder else note for note in own), *noted]
    notes.extend(noted)
    return _share(workbench, options, levels, notes, seed, on_progress)


def _share(
    workbench: Workbench,
    options: BuildOptions,
    levels: list[_Fitted],
    notes: list[str],
    seed: int,
    on_progress: OnProgress,
) -> list[_Fitted]:
    """Let quality levels share their engines, and measure again every level whose engines change."""
    shared: list[_Fitted] = []
    for fitted, plan in zip(levels, share_engines([one.candidate.plan for one in levels]), strict=True):
        if plan != fitted.candidate.plan:
            name = level_name(plan.budget)
            on_progress(Progress(stage="sharing engines", done=len(shared), total=len(levels), note=name))
            again = _measure(workbench, workbench.compile(plan), options, seed, notes)
            notes.append(
                f"{name}: with engines that other levels share, saves {percent(1 - again.measured.time_ratio)} instead "
                f"of {percent(1 - fitted.measured.time_ratio)}"
            )
            fitted = replace(
                again, correction=fitted.correction, evaluated=fitted.evaluated, whole_steps=fitted.whole_steps
            )
            _check_gate(
                workbench,
                options,
                replace(options.plan, budget=plan.budget),
                fitted,
                seed,
                _labelled(on_progress, name),
            )
        shared.append(fitted)
    if len(levels) > 1:
        on_progress(Progress(stage="sharing engines", done=len(levels), total=len(levels)))
    return shared


def _labelled(on_progress: OnProgress, name: str) -> OnProgress:
    """Add the name of a quality level to every stage."""
    return lambda progress: on_progress(replace(progress, stage=f"{progress.stage} ({name})"))


def _fit(
    workbench: Workbench,
    options: BuildOptions,
    asked: PlanOptions,
    notes: list[str],
    seed: int,
    on_progress: OnProgress,
    emits: Collection[str],
) -> _Fitted:
    """Fit by the engines' times, repair by sampling, and aim higher while too little is saved; keep the best try.

    A higher aim is met by another schedule that was sampled. If none saves enough, another search is made.
    """
    repair = options.repair
    found = find_plan(workbench, asked, repair, notes, seed, on_progress, emits=emits)
    tries = [_measure_found(workbench, found, options, seed, notes)]
    while len(tries) <= MOST_CORRECTIONS and (aim := tries[-1].aim_again(asked.budget)) is not None:
        aim = min(0.99, aim)
        notes.append(f"engines and sampling saved {percent(tries[-1].saved)}; chosen again for {percent(aim)}")
        again = choose_again(workbench, found, aim, repair, notes, seed, on_progress, emits=emits)
        if again is None:
            further, correction = replace(asked, budget=budget_of(aim)), found.correction
            try:
                again = find_plan(
                    workbench, further, repair, notes, seed, on_progress, correction=correction, emits=emits
                )
            except PlanError as error:
                notes.append(f"no other plan was found: {error}")
                break
        found = again
        tries.append(_measure_found(workbench, found, options, seed, notes))
    fitted = min(tries, key=partial(_rank, budget=asked.budget))
    if fitted is not tries[-1]:
        notes.append(f"kept the plan that saves {percent(fitted.saved)}")
    plan = msgspec.structs.replace(fitted.candidate.plan, budget=asked.budget)
    return replace(fitted, candidate=replace(fitted.candidate, plan=plan))


def _rank(fitted: _Fitted, budget: float) -> tuple[bool, bool, float]:
    """Order tries: first those that save enough, then those at the edge of the budget, each by their distance to it."""
    return fitted.aim_again(budget) is not None, fitted.saved < budget, abs(fitted.saved - budget)


def _measure_found(workbench: Workbench, found: Found, options: BuildOptions, seed: int, notes: list[str]) -> _Fitted:
    measured = _measure(workbench, found.candidate, options, seed, notes)
    evaluated = tuple(Measurement(time_ratio=one.candidate.time_ratio, damage=one.damage) for one in found.evaluated)
    return replace(measured, correction=found.correction, evaluated=evaluated, whole_steps=found.whole_steps)


def _measure(workbench: Workbench, candidate: Candidate, options: BuildOptions, seed: int, notes: list[str]) -> _Fitted:
    """Measure a plan with rows tuned to it, or with the plain ones if they do less damage."""
    fresh = seed + 1
    plain = workbench.plain(candidate)
    if options.repair.tune:
        candidate, _ = workbench.tune(plain, seed=seed, batches=TUNED_BATCHES)
    sampled = workbench.measure(candidate, seed=fresh)
    measured = sampled.measurement
    if sampled.non_finite_steps:
        notes.append(
            f"engines of the plan gave NaN or infinity {sampled.non_finite_steps} times while it was measured; the "
            "full model made these steps again, which costs more than they save"
        )
    if candidate.tuned is None:
        return _Fitted(candidate=candidate, correction=1.0, measured=measured, plain=None, evaluated=())
    damage = workbench.damage(plain, seed=fresh, batches=SAMPLING_ROUNDS)
    if measured.damage.relative_l2.mean >= damage.relative_l2.mean:
        notes.append(
            f"kept the scheduler's plain rows: their damage is {damage.relative_l2.mean:.4f}, with rows tuned to the "
            f"plan {measured.damage.relative_l2.mean:.4f}"
        )
        measured = msgspec.structs.replace(measured, damage=damage)
        return _Fitted(candidate=plain, correction=1.0, measured=measured, plain=None, evaluated=())
    notes.append(
        f"rows of the scheduler tuned to the plan: a damage of {measured.damage.relative_l2.mean:.4f}, with the plain "
        f"rows {damage.relative_l2.mean:.4f}"
    )
    return _Fitted(candidate=candidate, correction=1.0, measured=measured, plain=damage, evaluated=())


def _take(
    workbench: Workbench, options: BuildOptions, plan: Plan, notes: list[str], seed: int, on_progress: OnProgress
) -> _Fitted:
    """Measure a given plan without changing it."""
    fitted = _measure(workbench, workbench.compile(plan), options, seed, notes)
    _check_gate(workbench, options, replace(options.plan, budget=plan.budget), fitted, seed, on_progress)
    return fitted


def _check_gate(
    workbench: Workbench,
    options: BuildOptions,
    asked: PlanOptions,
    fitted: _Fitted,
    seed: int,
    on_progress: OnProgress,
) -> None:
    """Refuse a plan that fails the quality gate.

    Raises:
        QualityGateError: If it does; the message names the largest budget that passes.
    """
    gate = options.quality_gate
    if gate is not None and not gate.passes(fitted.measured.damage):
        raise _quality_gate_failed(
            workbench, asked, gate, fitted, seed, on_progress, tune=options.repair.tune, ladder=bool(options.ladder)
        )


def _quality_gate_failed(
    workbench: Workbench,
    options: PlanOptions,
    quality_gate: QualityGate,
    failed: _Fitted,
    seed: int,
    on_progress: OnProgress,
    *,
    tune: bool,
    ladder: bool = False,
) -> QualityGateError:
    """Search by halving for the largest budget that passes, and name it in the error."""
    low, high = 0.0, options.budget
    for step in range(QUALITY_GATE_SEARCH_STEPS):
        middle = (low + high) / 2
        on_progress(Progress(stage="searching a budget that passes", done=step, total=QUALITY_GATE_SEARCH_STEPS))
        try:
            candidate, _ = fit_plan(workbench, replace(options, budget=middle), [], correction=failed.correction)
            repaired = repair(workbench, candidate, middle, seed, replace(SEARCH_REPAIR, tune=tune), ignore)
            measured = workbench.measure(repaired.candidate, seed=seed + 1)
            passes = quality_gate.passes(measured.measurement.damage)
        except PlanError:
            passes = False
        low, high = (middle, high) if passes else (low, middle)
    on_progress(
        Progress(
            stage="searching a budget that passes", done=QUALITY_GATE_SEARCH_STEPS, total=QUALITY_GATE_SEARCH_STEPS
        )
    )
    advice = f"The largest budget that passes is about {low:.3f}" if low else f"No budget above {high:.3f} passes"
    level = f"quality level {level_name(options.budget)}: " if ladder else ""
    return QualityGateError(
        f"{level}the quality gate {quality_gate} fails at budget {options.budget:g}, which saves "
        f"{percent(options.budget)}: measured {quality_gate.metric} is "
        f"{quality_gate.value(failed.measured.damage):.4g}. {advice} (searched to ±{(high - low):.3f}). "
        "Nothing was written."
    )


def _write(
    path: Path,
    setup: Setup,
    options: BuildOptions,
    levels: list[_Fitted],
    controls: Controls,
    pairs: tuple[EnginePair, ...],
    notes: list[str],
    seed: int,
    on_progress: OnProgress,
) -> Manifest:
    on_progress(Progress(stage="timing batches", done=0, total=1))
    contents = Contents(setup, setup.workbench.batch_ms([level.candidate for level in levels]))
    on_progress(Progress(stage="timing batches", done=1, total=1))
    _add_inputs(contents, setup, options, notes)
    manifest = partial(
        contents.manifest,
        steps=options.steps,
        full=contents.add_full(levels[0].candidate.full_ms),
        levels=tuple(_add_level(contents, fitted, default=fitted is levels[0]) for fitted in levels),
        controls=tuple(_add_control(contents, one) for one in controls.made),
        converged=None if controls.converged is None else contents.add_table("converged", controls.converged),
        pairs=pairs,
        used_seeds=(setup.profile.seed, seed, seed + 1),
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


def _add_control(contents: Contents, made: MadeControl) -> Control:
    """Add the engines or the schedule of a control."""
    own, scheduler = made.candidate, made.scheduler
    return Control(
        name=made.name,
        description=made.description,
        plan=None if own is None else own.plan,
        engines=() if own is None else contents.add_engines(f"controls/{made.name}-", own),
        table=contents.add_tuned(made.name, own) if scheduler is None else contents.add_table(made.name, scheduler),
    )


def _add_level(contents: Contents, fitted: _Fitted, *, default: bool) -> Level:
    """Add the engines of a quality level, and its rows; every level but the default one has a folder."""
    name = level_name(fitted.candidate.plan.budget)
    prefix = "engines/" if default else f"engines/{name.removesuffix('%')}/"
    return Level(
        name=name,
        plan=fitted.candidate.plan,
        engines=contents.add_engines(prefix, fitted.candidate),
        measured=fitted.measured,
        tuned=contents.add_tuned(f"level-{name.removesuffix('%')}", fitted.candidate),
        plain_damage=fitted.plain,
        evaluated=fitted.evaluated,
    )
