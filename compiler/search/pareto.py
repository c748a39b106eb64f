"""model → curve: the least damage at any time, by planning, repairing and sampling at many budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

import unetc
from unetc.arguments import plain_fields
from unetc.artifacts.pareto import Pareto, Point
from unetc.artifacts.profile import Profile
from unetc.compiler.planner.planner import PlanOptions
from unetc.errors import PlanError, QualityGateError
from unetc.jobs import Cluster
from unetc.models.model import Model
from unetc.percent import percent
from unetc.progress import OnProgress, Progress, ignore

from .fit import fit_plan
from .quality_gate import QualityGate
from .repair import RepairOptions, Search, repair_all
from .set_up import Setup, set_up

LEAST, MOST = 0.1, 0.8
"""Budgets at the ends of the curve."""
REFINEMENTS = 4
"""Halvings of the gap behind the fastest point that passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoOptions:
    """Budgets and limits of a curve."""

    budgets: int = 8
    """Number of budgets between 0.1 and 0.8."""
    steps: int = 50
    max_engines: int = 4
    max_memory: float | None = None
    planner: str = "fast"
    """`fast` or `exact`, as in `PlanOptions`."""
    repair: RepairOptions = field(default_factory=lambda: RepairOptions(evaluations=12, patience=6))

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            PlanError: If one is no number, or out of range.
        """
        plain_fields(self, PlanError)
        if self.budgets < 1:
            raise PlanError(f"a curve needs at least 1 budget, got {self.budgets}.")
        self.plan(LEAST)

    def plan(self, budget: float) -> PlanOptions:
        """Make the options of the planner for one budget of the curve.

        Raises:
            PlanError: If a limit is out of range, or there is no such planner.
        """
        return PlanOptions(
            budget=budget, max_engines=self.max_engines, max_memory=self.max_memory, planner=self.planner
        )


def pareto(
    model: Model,
    profile: Profile,
    options: ParetoOptions,
    *,
    cache: Path,
    cluster: Cluster | None = None,
    on_progress: OnProgress = ignore,
) -> Pareto:
    """Measure the curve of a model.

    Args:
        model: The model.
        profile: An analysis of this model.
        options: Budgets and limits.
        cache: Folder for captures and partial results.
        cluster: Where to measure; None measures in this process.
        on_progress: Called as the work advances.

    Raises:
        ModelError: If the model cannot be captured.
        ProfileError: If the profile belongs to another model, or the cluster cannot measure it.
        PlanError: If no budget can be met.
        WorkerError: If the cluster cannot be joined or fails.
    """
    with set_up(model, profile, steps=options.steps, cache=cache, cluster=cluster, on_progress=on_progress) as setup:
        return trace(setup, options, on_progress)


def trace(setup: Setup, options: ParetoOptions, on_progress: OnProgress) -> Pareto:
    """Plan, repair and sample at every budget; keep everything that was sampled.

    Raises:
        PlanError: If no budget can be met.
    """
    searches: dict[float, Search] = {}
    failure: PlanError | None = None
    spacing = (MOST - LEAST) / max(1, options.budgets - 1)
    for number in range(options.budgets):
        on_progress(Progress(stage="fitting plans", done=number, total=options.budgets))
        budget = round(LEAST + number * spacing, 4)
        try:
            searches[budget] = _fit(setup, options, budget)
        except PlanError as error:
            failure = failure or error  # a larger budget may be met: one that is measured may fail by chance
    note = "" if failure is None else f"{options.budgets - len(searches)} budgets cannot be met: {failure}"
    on_progress(Progress(stage="fitting plans", done=options.budgets, total=options.budgets, note=note))
    if not searches:
        raise PlanError(f"no plan saves {percent(LEAST)} of the time or more: {failure}") from failure
    repair_all(setup.workbench, [*searches.values()], on_progress)
    return Pareto(
        unetc=unetc.__version__,
        model=setup.profile.model,
        profile_sha256=setup.profile.sha256(),
        target=setup.profile.target,
        environment=setup.workbench.machine(),
        steps=options.steps,
        samples=setup.profile.batch,
        seed=setup.profile.seed + 1,
        points=tuple(point for budget, search in searches.items() for point in _points(budget, search)),
    )


def refine(
    setup: Setup, curve: Pareto, quality_gate: QualityGate, options: ParetoOptions, on_progress: OnProgress
) -> Pareto:
    """Add points between the fastest one that passes a quality gate and the next budget, by halving.

    Raises:
        QualityGateError: If no point passes.
    """
    low = 1 - fastest_passing(curve, quality_gate).time_ratio
    high = min((point.budget for point in curve.points if point.budget > low), default=MOST)
    points = list(curve.points)
    for step in range(REFINEMENTS):
        on_progress(Progress(stage="fastest that passes", done=step, total=REFINEMENTS))
        middle = round((low + high) / 2, 4)
        found = []
        try:
            search = _fit(setup, options, middle)
        except PlanError:
            pass
        else:
            repair_all(setup.workbench, (search,), ignore)
            found = _points(middle, search)
        points.extend(found)
        low, high = (middle, high) if any(quality_gate.passes(point.damage) for point in found) else (low, middle)
    on_progress(Progress(stage="fastest that passes", done=REFINEMENTS, total=REFINEMENTS))
    return msgspec.structs.replace(curve, points=tuple(points))


def _fit(setup: Setup, options: ParetoOptions, budget: float) -> Search:
    """Fit a plan, and return the search for its schedule, which has not begun."""
    candidate, _ = fit_plan(setup.workbench, options.plan(budget), [])
    return Search(setup.workbench, candidate, budget, setup.profile.seed + 1, options.repair)


def _points(budget: float, search: Search) -> list[Point]:
    """List everything that was sampled for a budget."""
    return [
        Point(budget=budget, time_ratio=e.candidate.time_ratio, damage=e.damage, plan=e.candidate.plan)
        for e in search.repaired.evaluated
    ]


def fastest_passing(curve: Pareto, quality_gate: QualityGate) -> Point:
    """Pick the fastest point of a curve that passes a quality gate.

    Raises:
        QualityGateError: If none does; the message names the best value reached.
    """
    passing = passing_points(curve, quality_gate)
    if not passing:
        best = min(curve.points, key=lambda point: quality_gate.distance(point.damage))
        raise QualityGateError(
            f"no point of the curve passes {quality_gate}: the best has {quality_gate.metric} "
            f"{quality_gate.value(best.damage):.4g} at "
            f"{best.time_ratio:.3f} of the time. Ask for less, or build with a small --budget. Nothing was written."
        )
    return passing[0]


def passing_points(curve: Pareto, quality_gate: QualityGate) -> list[Point]:
    """List the points that pass a quality gate, the fastest first. The front has the least relative L2 only."""
    passing = (point for point in curve.points if quality_gate.passes(point.damage))
    return sorted(passing, key=lambda point: point.time_ratio)
