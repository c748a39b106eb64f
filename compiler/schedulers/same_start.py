"""Schedules that start at the noise level of another one: fewer steps, another scheduler, or many steps.

With another number of steps, most spacings of diffusers begin at another noise level too. Samples then differ from the
first step on, whatever the model does. So each spacing is also stretched, to begin exactly where the other schedule
does, and the noise that enters the first call is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from unetc.errors import ModelError
from unetc.models.model import Model
from unetc.sampler.table import SchedulerTable, SchedulerTables

from .along import spaces_levels, walks_along
from .extract import extract, extract_along, extract_between
from .keys import keys_of
from .make import scheduler_for
from .walk import Scheduler

logger = logging.getLogger(__name__)

SPACINGS = ("leading", "trailing", "linspace")
"""Values of `timestep_spacing` in diffusers."""
CONVERGED_STEPS = 500
"""Steps of a trajectory that counts as converged."""
_CONVERGED = ("dpmsolver++", "edm-dpmsolver++", "flow-euler")
"""Schedulers for the converged trajectory where the model's own cannot make it."""


def from_same_start(model: Model, name: str, start: SchedulerTable, steps: int) -> Mapping[str, SchedulerTable]:
    """Make the schedules of a number of steps that begin at the noise level of another schedule.

    Args:
        model: The model.
        name: Name of the scheduler of the new schedules.
        start: The other schedule.
        steps: Number of steps of the new schedules.

    Returns:
        The schedules by the name of their spacing, each only once.

    Raises:
        ModelError: If the model cannot be sampled with this scheduler.
    """
    scheduler = scheduler_for(name, model)
    found: dict[str, SchedulerTable] = {}
    for spacing, one in _spaced(scheduler).items():
        _add(found, spacing, start, lambda one=one: extract(one, steps))
    if walks_along(scheduler) and _on_timesteps(start):
        for spacing, timesteps in _stretched(start, steps).items():
            _add(found, spacing, start, lambda own=timesteps: extract_along(scheduler, own))
    if spaces_levels(scheduler):
        first, last = start.log_snr.item(0), start.log_snr.item(-1)
        _add(found, "own noise levels, stretched", start, lambda: extract_between(scheduler, first, last, steps))
    return found


def converged(model: Model, name: str, start: SchedulerTable) -> SchedulerTables:
    """Make a schedule with enough steps that more would change little, from the start of another schedule.

    It has the same scheduler where possible, and otherwise one that solves the same equation. It has as many steps as
    the model has timesteps if these are fewer than `CONVERGED_STEPS`.

    Args:
        model: The model.
        name: Name of the scheduler of the other schedule.
        start: The other schedule.

    Raises:
        ModelError: If the scheduler adds noise, or there is no such schedule.
    """
    if start.adds_noise:
        raise ModelError(f"{name} adds noise in every step, so it converges to no trajectory. Choose ddim for one.")
    for own in dict.fromkeys((name, *_CONVERGED)):
        try:
            scheduler, found = scheduler_for(own, model), dict[str, SchedulerTable]()
        except ModelError as error:
            logger.debug("%s cannot sample this model: %s", own, error)
            continue
        if walks_along(scheduler) and _on_timesteps(start):
            count = min(CONVERGED_STEPS, int(start.timesteps[0]) + 1)
            timesteps = _falling(np.linspace(start.timesteps[0], 0, count))
            _add(found, "dense", start, lambda: extract_along(scheduler, timesteps))  # noqa: B023
        else:
            _add(found, "own", start, lambda: extract(scheduler, CONVERGED_STEPS))  # noqa: B023
        for table in found.values():
            if not table.adds_noise:
                return SchedulerTables(name=own, tables=(table,))
    raise ModelError(f"no scheduler follows {name} from the same noise level with {CONVERGED_STEPS} steps.")


def _spaced(scheduler: Scheduler) -> dict[str, Scheduler]:
    """Make the same scheduler with every spacing that its class offers; its own configuration comes first."""
    own = str(scheduler.config.get("timestep_spacing", "own"))
    if spaces_levels(scheduler):
        own = "own noise levels"
    result = {own: scheduler}
    if "timestep_spacing" in keys_of(type(scheduler).__name__):
        made: Any = type(scheduler)
        for spacing in SPACINGS:
            result.setdefault(spacing, made.from_config(scheduler.config, timestep_spacing=spacing))
    return result


def _on_timesteps(start: SchedulerTable) -> bool:
    """Check whether a schedule starts at a timestep of the training."""
    return float(start.timesteps[0]).is_integer() and start.timesteps[0] >= 0


def _stretched(start: SchedulerTable, steps: int) -> dict[str, tuple[int, ...]]:
    """Space timesteps evenly from the first one of another schedule.

    `leading` and `linspace` end where the other schedule does, or at 0. `trailing` leaves the last gap open. The rest
    are timesteps of the other schedule.
    """
    own = start.timesteps
    first, last = float(own[0]), max(0.0, float(own[-1]))
    rows = {
        "leading, stretched": np.linspace(first, last, steps),
        "trailing, stretched": np.linspace(first, -1, steps + 1)[:-1],
        "linspace, stretched": np.linspace(first, 0, steps),
    }
    if steps <= len(own):
        rows["own timesteps, thinned"] = own[np.linspace(0, len(own) - 1, steps).round().astype(int)]
        rows["own timesteps, thinned, last gap open"] = own[
            np.linspace(0, len(own), steps + 1)[:-1].round().astype(int)
        ]
    chosen = {spacing: _falling(row) for spacing, row in rows.items()}
    return {spacing: row for spacing, row in chosen.items() if len(row) == steps}


def _falling(timesteps: Any) -> tuple[int, ...]:
    """Round timesteps, and list each only once."""
    return tuple(dict.fromkeys(np.asarray(timesteps, dtype=np.float64).round().astype(int).tolist()))


def _add(found: dict[str, SchedulerTable], spacing: str, start: SchedulerTable, make: Any) -> None:
    """Add a schedule that diffusers can make, has the same start, and is not there yet."""
    try:
        table: SchedulerTable = make()
    except ModelError as error:
        logger.debug("no schedule with spacing %s: %s", spacing, error)
        return
    known = any(np.allclose(table.log_snr, other.log_snr, atol=1e-4) for other in found.values())
    if table.starts_like(start) and not known:
        scale = start.initial_scale * start.input_scale.item(0) / table.input_scale.item(0)
        found[spacing] = replace(table, initial_scale=scale)
