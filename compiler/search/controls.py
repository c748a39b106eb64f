"""Controls: simpler ways to take the measured time of a plan, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.planner.restriction import Restriction
from unetc.compiler.schedulers.same_start import converged
from unetc.errors import ModelError, PlanError
from unetc.models.model import Model
from unetc.progress import OnProgress, Progress, ignore
from unetc.sampler.table import SchedulerTables

from .bench import SAMPLING_ROUNDS
from .candidate import Candidate
from .fit import fit_deep_hold, fit_random, fit_uniform
from .repair import RepairOptions, Search, repair_all
from .restricted import fit_restricted
from .schedules import Schedule, fewer_steps, other_solver
from .workbench import TUNED_BATCHES, Workbench

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

    def restricted(restriction: Restriction) -> Callable[[], Candidate | Search]:
        own = replace(short, tune=repair.tune and restriction is Restriction.STEPS_ONLY)  # the others tune nothing
        if whole_steps is not None and restriction is Restriction.STEPS_ONLY:
            return lambda: whole_steps
        return lambda: fit_restricted(workbench, restriction, target, correction, seed, limits=limits, options=own)

    def random(i: int) -> Callable[[], Candidate]:
        return lambda: fit_random(workbench, target, correction, i, max_engines=engines)

    makers: dict[str, Callable[[], Candidate | Schedule | Search]] = {
        "fewer_steps": lambda: fewer_steps(workbench, model, time_ratio, seed),
        "other_solver": lambda: other_solver(workbench, model, time_ratio, seed),
        **{str(one): restricted(one) for one in Restriction if one is not Restriction.ALL},
        "uniform": lambda: fit_uniform(workbench, target, correction),
        "deep-hold": lambda: fit_deep_hold(workbench, target, seed),
        **{f"random-{i + 1}": random(i) for i in range(random_plans)},
    }
    fitted: dict[str, Candidate | Schedule | Search] = {}
    for done, (name, make) in enumerate(makers.items()):
        on_progress(Progress(stage="controls", done=done, total=len(makers)))
        try:
            fitted[name] = make()
        except (PlanError, ModelError) as error:
            notes.append(f"left out the control {name}: {error}")
    repair_all(workbench, [one for one in fitted.values() if isinstance(one, Search)], ignore)
    found = {name: one.repaired.candidate if isinstance(one, Search) else one for name, one in fitted.items()}
    of_steps = found.get(Restriction.STEPS_ONLY)
    if repair.tune and isinstance(of_steps, Candidate):
        found[Restriction.STEPS_ONLY] = _tuned(workbench, of_steps, seed)
    on_progress(Progress(stage="controls", done=len(makers), total=len(makers)))
    made = tuple(_describe(name, one) for name, one in found.items())
    return Controls(made=made, converged=_converged(workbench, model, notes))


def _tuned(workbench: Workbench, candidate: Candidate, seed: int) -> Candidate:
    """Tune rows to a control as to the plan itself: on more batches, or not at all if that does less damage."""
    plain = workbench.plain(candidate)
    tuned, _ = workbench.tune(plain, seed=seed, batches=TUNED_BATCHES)
    with_tuned, with_plain = workbench.damages((tuned, plain), seed=seed + 1, batches=SAMPLING_ROUNDS)
    return tuned if with_tuned.relative_l2.mean < with_plain.relative_l2.mean else plain


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
