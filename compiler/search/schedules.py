"""Controls that run the full model along another schedule: fewer steps, or another scheduler.

All of them start at the noise level of the full model's own schedule, with the same noise. The best of several is
chosen on the build's seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unetc.compiler.schedulers.same_start import from_same_start
from unetc.errors import ModelError, PlanError
from unetc.models.model import Model
from unetc.sampler.table import SchedulerTable, SchedulerTables

from .workbench import Workbench

SOLVERS = {
    "dpmsolver++": "DPM-Solver++ 2M",
    "unipc": "UniPC",
    "edm-dpmsolver++": "DPM-Solver++ 2M (EDM)",
}
"""Schedulers that need few steps, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule of the full model."""

    scheduler: SchedulerTables
    """One scheduler with one number of steps."""
    description: str


def fewer_steps(workbench: Workbench, model: Model, time_ratio: float, seed: int) -> Schedule:
    """Find the best schedule of the same scheduler that takes the time of a plan.

    Args:
        workbench: Where to measure.
        model: The model.
        time_ratio: Measured time of the plan / the full model's.
        seed: Seed of the noise that damage is measured on.

    Raises:
        PlanError: If there is none.
    """
    full, name = workbench.scheduler.table(workbench.steps), workbench.scheduler.name
    steps = min(full.count - 1, max(1, round(time_ratio * full.count)))
    if steps < 1:
        raise PlanError("a schedule of one step has no shorter one.")
    choices = from_same_start(model, name, full, steps)
    if not choices:
        raise PlanError(f"no schedule of {name} in {steps} steps starts at the noise level of the full model's.")
    words = {name: f"fewer steps ({steps} of {full.count})"}
    return _best(workbench, {(name, spacing): one for spacing, one in choices.items()}, words, seed)


def other_solver(workbench: Workbench, model: Model, time_ratio: float, seed: int) -> Schedule:
    """Find the best schedule of another scheduler with as many calls of the full model as a plan's time allows.

    Args:
        workbench: Where to measure.
        model: The model.
        time_ratio: Measured time of the plan / the full model's.
        seed: Seed of the noise that damage is measured on.

    Raises:
        PlanError: If there is none.
    """
    full, own = workbench.scheduler.table(workbench.steps), workbench.scheduler.name
    if full.adds_noise:
        raise PlanError(f"{own} adds noise in every step, so another scheduler follows another trajectory.")
    calls = min(full.steps, max(1, round(time_ratio * full.steps)))
    choices: dict[tuple[str, str], SchedulerTable] = {}
    problems = []
    for name in SOLVERS:
        if name == own:
            continue
        try:
            choices |= {(name, spacing): one for spacing, one in from_same_start(model, name, full, calls).items()}
        except ModelError as error:
            problems.append(str(error))
    if not choices:
        raise PlanError(" ".join(problems) or f"none starts at the noise level of {own} in {calls} calls.")
    words = {name: f"{text} and {calls} calls" for name, text in SOLVERS.items()}
    return _best(workbench, choices, words, seed)


def _best(
    workbench: Workbench,
    choices: Mapping[tuple[str, str], SchedulerTable],
    words: Mapping[str, str],
    seed: int,
) -> Schedule:
    """Sample every schedule, and return the one that does the least damage.

    Args:
        workbench: Where to measure.
        choices: Tables by scheduler and spacing.
        words: Description of every scheduler.
        seed: Seed of the noise that damage is measured on.

    Raises:
        PlanError: If all of them give NaN or infinity.
    """
    schedules = {key: SchedulerTables(name=key[0], tables=(table,)) for key, table in choices.items()}
    damages = zip(schedules, workbench.damages_along([*schedules.values()], seed=seed), strict=True)
    finite = {key: damage.relative_l2.mean for key, damage in damages if damage is not None}
    if not finite:
        raise PlanError("every schedule gives NaN or infinity.")
    best = min(finite, key=lambda key: finite[key])
    name, spacing = best
    text = f"the full model with {words[name]}; spacing {spacing}, the best of {len(choices)}"
    return Schedule(scheduler=schedules[best], description=text)
