"""Controls: simpler ways to take the measured time of a plan, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.planner.restriction import Restriction
from unetc.compiler.schedulers.same_start import converged
from unetc.errors import ModelError, PlanError
from unetc.models.model import Model
from unetc.progress import OnProgress, Progress
from unetc.sampler.table import SchedulerTables

from .fit import fit_deep_hold, fit_random, fit_uniform
from .repair import RepairOptions
from .restricted import fit_restricted
from .schedules import Schedule, fewer_steps, other_solver
from .workbench import SAMPLING_ROUNDS, TUNED_BATCHES, Candidate, Workbench

MOST_REPAIR = RepairOptions(evaluations=20, patience=8)
"""Longest search for the schedule of a control."""

_DESCRIPTIONS = {
    "steps_only": "only whole steps reused, held or forecast, chosen by the planner",
    "chosen_steps": "only whole steps held: as many calls at timesteps that the planner chose",
    "removal_only": "only drop and mean, nothing reused, chosen by the planner",
    "uniform": "the same treatment at all noise levels, chosen by the planner",
    "deep-hold": "one level held in all phases with one period (DeepCache's rule), the best level and period",
    "random": "random treatments of random components at random noise levels",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeControl:
    """A control as the build makes it: a plan with its engines, or a schedule of the full model."""

    name: str
    description: str
    candidate: Candidate | None = None
    scheduler: SchedulerTables | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """All controls of a plan, and the converged trajectory; none of either unless made."""

    made: tuple[MadeControl, ...] = ()
    converged: SchedulerTables | None = None


def make_controls(
    workbench: Workbench,
    model: Model,
    candidate: Candidate,
    correction: float,
    notes: list[str],
    seed: int,
    on_progress: OnProgress,
    *,
    time_ratio: float,
    whole_steps: Candidate | None,
    limits: PlanOptions,
    repair: RepairOptions,
    random_plans: int,
) -> Controls:
    """Make the controls of a plan; one that cannot be made is noted and left out.

    Args:
        workbench: Where to measure.
        model: The model.
        candidate: The plan.
        correction: Measured / predicted saving that the plan was made with.
        notes: Receives a note for every control that cannot be made.
        seed: Seed of the noise that controls are chosen on.
        on_progress: Called as the work advances.
        time_ratio: Time of the plan's sampling / the full model's.
        whole_steps: The best plan of whole steps that the search for the plan has found; searched when not given.
        limits: Limits of the plan, which hold for controls too.
        repair: How long the plan was repaired; controls are repaired as long, up to `MOST_REPAIR`.
        random_plans: Number of random plans.
    """
    target, engines = candidate.saving, candidate.plan.max_engines
    short = replace(
        repair,
        evaluations=min(repair.evaluations, MOST_REPAIR.evaluations),
        patience=min(repair.patience, MOST_REPAIR.patience),
    )

    def restricted(restriction: Restriction) -> Callable[[], Candidate]:
        own = replace(short, tune=repair.tune and restriction is Restriction.STEPS_ONLY)  # the others tune nothing

        def fit() -> Candidate:
            made = whole_steps if restriction is Restriction.STEPS_ONLY else None
            if made is None:
                found = fit_restricted(workbench, restriction, target, correction, seed, limits=limits, options=own)
                made = found.candidate
            return _tuned(workbench, made, seed) if own.tune else made

        return fit

    def random(i: int) -> Callable[[], Candidate]:
        return lambda: fit_random(workbench, target, correction, i, max_engines=engines)

    makers: dict[str, Callable[[], Candidate | Schedule]] = {
        "fewer_steps": lambda: fewer_steps(workbench, model, candidate, time_ratio, seed),
        "other_solver": lambda: other_solver(workbench, model, candidate, time_ratio, seed),
        **{str(one): restricted(one) for one in Restriction if one is not Restriction.ALL},
        "uniform": lambda: fit_uniform(workbench, target, correction),
        "deep-hold": lambda: fit_deep_hold(workbench, target, seed),
        **{f"random-{i + 1}": random(i) for i in range(random_plans)},
    }
    made = []
    for done, (name, make) in enumerate(makers.items()):
        on_progress(Progress(stage="controls", done=done, total=len(makers)))
        try:
            made.append(_describe(name, make()))
        except (PlanError, ModelError) as error:
            notes.append(f"left out the control {name}: {error}")
    on_progress(Progress(stage="controls", done=len(makers), total=len(makers)))
    return Controls(made=tuple(made), converged=_converged(workbench, model, notes))


def _tuned(workbench: Workbench, candidate: Candidate, seed: int) -> Candidate:
    """Tune rows to a control as to the plan itself: on more batches, or not at all if that does less damage."""
    plain = workbench.plain(candidate)
    tuned, _ = workbench.tune(plain, seed=seed, batches=TUNED_BATCHES)
    judged = [workbench.damage(one, seed=seed + 1, batches=SAMPLING_ROUNDS).relative_l2.mean for one in (tuned, plain)]
    return tuned if judged[0] < judged[1] else plain


def _describe(name: str, made: Candidate | Schedule) -> MadeControl:
    if isinstance(made, Schedule):
        return MadeControl(name=name, description=made.description, scheduler=made.scheduler)
    kind = "random" if name.startswith("random-") else name
    return MadeControl(name=name, description=_DESCRIPTIONS[kind], candidate=made)


def _converged(workbench: Workbench, model: Model, notes: list[str]) -> SchedulerTables | None:
    """Make the schedule of the converged trajectory, or note why there is none."""
    scheduler = workbench.scheduler
    try:
        return converged(model, scheduler.name, scheduler.table(workbench.steps))
    except ModelError as error:
        notes.append(f"no comparison with the converged trajectory: {error}")
        return None
