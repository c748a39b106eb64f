"""Controls that run the full model along another schedule: fewer steps, or another scheduler.

All of them start at the noise level of the full model's own schedule, with the same noise. The best of several is
chosen on the build's seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from unetc.compiler.schedulers.same_start import from_same_start
from unetc.errors import ModelError, NonFiniteError, PlanError
from unetc.models.model import Model
from unetc.sampler.table import SchedulerTable, SchedulerTables

from .workbench import Candidate, Workbench

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


def fewer_steps(workbench: Workbench, model: Model, candidate: Candidate, time_ratio: float, seed: int) -> Schedule:
    """Find the best schedule of the same scheduler that takes the time of a plan.

    Args:
        workbench: Where to measure.
        model: The model.
        candidate: The plan.
        time_ratio: Its measured time / the full model's.
        seed: Seed of the noise that damage is measured on.

    Raises:
        PlanError: If there is none.
    """
    full, name = workbench.scheduler.table(workbench.steps), workbench.scheduler.name
    steps = min(full.count - 1, max(1, round(time_ratio * full.count)))
    if steps < 1:
        raise PlanError("a schedule of one step has no shorter one.")
    choices = {(name, spacing): one for spacing, one in _choices(model, name, full, steps).items()}
    _, spacing, table = _best(workbench, candidate, choices, seed)
    text = f"the full model with fewer steps ({steps} of {full.count}); spacing {spacing}, the best of {len(choices)}"
    return Schedule(scheduler=SchedulerTables(name=name, tables=(table,)), description=text)


def other_solver(workbench: Workbench, model: Model, candidate: Candidate, time_ratio: float, seed: int) -> Schedule:
    """Find the best schedule of another scheduler with as many calls of the full model as a plan's time allows.

    Args:
        workbench: Where to measure.
        model: The model.
        candidate: The plan.
        time_ratio: Its measured time / the full model's.
        seed: Seed of the noise that damage is measured on.

    Raises:
        PlanError: If there is none.
    """
    full, own = workbench.scheduler.table(workbench.steps), workbench.scheduler.name
    if full.adds_noise:
        raise PlanError(f"{own} adds noise in every step, so another scheduler follows another trajectory.")
    calls = max(1, round(time_ratio * full.steps))
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
    name, spacing, table = _best(workbench, candidate, choices, seed)
    text = f"the full model with {SOLVERS[name]} and {calls} calls; spacing {spacing}, the best of {len(choices)}"
    return Schedule(scheduler=SchedulerTables(name=name, tables=(table,)), description=text)


def _choices(model: Model, name: str, full: SchedulerTable, steps: int) -> Mapping[str, SchedulerTable]:
    """List the schedules of a number of steps with the same start.

    Raises:
        PlanError: If there is none.
    """
    found = from_same_start(model, name, full, steps)
    if not found:
        raise PlanError(f"no schedule of {name} in {steps} steps starts at the noise level of the full model's.")
    return found


def _best(
    workbench: Workbench, candidate: Candidate, choices: Mapping[tuple[str, str], SchedulerTable], seed: int
) -> tuple[str, str, SchedulerTable]:
    """Sample every schedule, and return scheduler, spacing and table of the one that does the least damage.

    Raises:
        PlanError: If all of them give NaN or infinity.
    """
    best: tuple[str, str, SchedulerTable] | None = None
    least = inf
    for (name, spacing), table in choices.items():
        scheduler = SchedulerTables(name=name, tables=(table,))
        try:
            damage = workbench.damage_along(candidate, scheduler, seed=seed).relative_l2.mean
        except NonFiniteError:
            continue
        if damage < least:
            best, least = (name, spacing, table), damage
    if best is None:
        raise PlanError("every schedule gives NaN or infinity.")
    return best
