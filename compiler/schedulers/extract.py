"""Reading scheduler tables from diffusers schedulers; for compile time.

`probe` makes experiments, `solve` turns the answers into coefficients, and `replay` checks the table against diffusers
on a whole trajectory. A scheduler that the form cannot express fails this check and is refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unetc.errors import ModelError
from unetc.sampler.table import SchedulerTable, SchedulerTables

from .along import begin_along, begin_between
from .keys import check_values, keys_of
from .names import SCHEDULERS
from .probe import MOST, probe
from .replay import replay, stays_finite
from .solve import solve
from .walk import (
    LOG_SNR_LIMIT,
    Scheduler,
    asks_variance,
    at_first_order,
    begin,
    calls_of,
    is_flow,
    log_snr,
    rising,
    starts_late,
    trained_levels,
)

logger = logging.getLogger(__name__)

STEP_COUNTS = (*range(1, 101), 150, 200, 250, 500, 1000)
"""The step counts that a bundle offers, as far as the scheduler can do them."""

TOLERANCE = 1e-5
"""Largest accepted difference from diffusers anywhere on a trajectory, relative to the largest element of that step."""


def extract_all(
    scheduler: Scheduler,
    name: str,
    counts: Iterable[int] = STEP_COUNTS,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    asked: Collection[int] = (),
) -> SchedulerTables:
    """Read the tables for many step counts.

    Args:
        scheduler: As made by `make_scheduler`; it is not changed.
        name: Its key in `SCHEDULERS`.
        counts: The step counts to offer; those that the scheduler cannot do are left out.
        on_progress: Called with (done, total) after each step count.
        asked: Step counts that must not be left out; they come first.

    Returns:
        The tables of all step counts that the scheduler can do.

    Raises:
        ModelError: If the scheduler cannot do any of the step counts, or one that is asked for.
    """
    check_values(type(scheduler).__name__, scheduler.config)
    needed = {steps: _begin(scheduler, steps) for steps in sorted(set(asked))}
    wanted = sorted({*counts} - {*needed})
    offered = {steps: one for steps in wanted if (one := _proper(scheduler, steps)) is not None}
    if not needed and not offered:
        raise ModelError(f"{type(scheduler).__name__} can do none of the step counts {wanted}. Choose others.")
    if left_out := sorted(set(wanted) - set(offered)):
        logger.info("%s cannot do %s steps; left out", type(scheduler).__name__, left_out)
    tables: dict[int, SchedulerTable] = {}
    errors: list[ModelError] = []
    begun = needed | offered
    for done, (steps, one) in enumerate(begun.items(), start=1):
        try:
            tables[steps] = _extract(one, steps)
        except ModelError as error:
            if steps in needed:
                raise
            errors.append(error)
            logger.info("%d steps are left out: %s", steps, error)
        if on_progress is not None:
            on_progress(done, len(begun))
    if not tables:
        raise errors[0]
    timesteps, levels = trained_levels(scheduler)
    return SchedulerTables(
        name=name,
        tables=tuple(tables[steps] for steps in sorted(tables)),
        trained_timesteps=timesteps,
        trained_log_snr=levels,
        one_size=scheduler.config.get("mu") is not None,
    )


def supports(scheduler: Scheduler, steps: int) -> bool:
    """Check whether diffusers makes a proper schedule with a number of steps.

    Rounding sometimes makes it one of another length (61 steps with spacing "trailing"), one beyond the training
    timesteps, one with steps that do not change the noise level, or one of NaN. It may also make the first two
    timesteps equal, so that a pipeline would start one step late.

    Args:
        scheduler: Is not changed.
        steps: Number of steps wanted.
    """
    return _proper(scheduler, steps) is not None


def _proper(scheduler: Scheduler, steps: int) -> Any:
    """Begin a trajectory, if diffusers makes a proper schedule with a number of steps; otherwise return None."""
    trained = scheduler.config["num_train_timesteps"]
    if not 1 <= steps <= trained:
        return None
    try:
        begun = begin(scheduler, steps)
    except (ValueError, IndexError) as error:
        logger.debug("%s refuses %d steps: %s", type(scheduler).__name__, steps, error)
        return None
    last = trained if is_flow(scheduler) else trained - 1  # a flow begins at noise without any signal
    calls = calls_of(begun, steps)
    if len(begun.timesteps) != calls or begun.timesteps.max() > last or starts_late(begun):
        return None
    if not _is_continuous(begun) and begun.timesteps.min() < 0:
        return None
    levels = log_snr(begun)
    rises = np.all(np.diff(levels if calls == steps else rising(levels)) > 0)
    return begun if rises and np.isfinite(levels).all() else None


def _is_continuous(scheduler: Scheduler) -> bool:
    """Check whether timesteps are logarithms of noise levels, which may be negative."""
    return scheduler.config.get("timestep_type") == "continuous" or "sigma_data" in scheduler.config


def extract(scheduler: Scheduler, steps: int) -> SchedulerTable:
    """Read the table for one step count and check it against diffusers.

    Args:
        scheduler: As made by `make_scheduler`, or another one whose step takes a generator; it is not changed.
        steps: Number of steps.

    Returns:
        The table; diffusers and `update` agree to `TOLERANCE` on a whole random trajectory.

    Raises:
        ModelError: If the scheduler cannot do that many steps or cannot be expressed as a table.
    """
    return _extract(_begin(scheduler, steps), steps)


def _begin(scheduler: Scheduler, steps: int) -> Any:
    """Begin a trajectory with a proper schedule.

    Raises:
        ModelError: If diffusers makes none with this number of steps.
    """
    if (begun := _proper(scheduler, steps)) is not None:
        return begun
    trained = scheduler.config.get("num_train_timesteps")
    reason = f": it has {trained} timesteps" if isinstance(trained, int) and steps > trained else ""
    reason = reason or _twice(scheduler, steps)
    raise ModelError(
        f"{type(scheduler).__name__} makes no proper schedule of {steps} steps{reason}. Choose another number."
    )


def _twice(scheduler: Scheduler, steps: int) -> str:
    """Say that the first timestep comes twice, as the end of a message; empty if it does not."""
    try:
        begun = begin(scheduler, steps)
    except (ValueError, IndexError):
        return ""
    first = float(begun.timesteps[0])
    late = f": its first timestep {first:g} comes twice, so diffusers skips the first step or fails at the last one"
    return late if starts_late(begun) else ""


def extract_along(scheduler: Scheduler, timesteps: Sequence[int]) -> SchedulerTable:
    """Read the table along chosen timesteps and check it against diffusers.

    Args:
        scheduler: A scheduler for which `walks_along` holds; it is not changed.
        timesteps: Timesteps of the training, falling.

    Returns:
        The table, as `extract` returns it.

    Raises:
        ModelError: If the scheduler cannot follow the timesteps or cannot be expressed as a table.
    """
    return _extract(begin_along(scheduler, timesteps), len(timesteps))


def extract_between(scheduler: Scheduler, first: float, last: float, steps: int) -> SchedulerTable:
    """Read the table along noise levels that a scheduler spaces itself, and check it against diffusers.

    Args:
        scheduler: A scheduler for which `spaces_levels` holds; it is not changed.
        first: log-SNR of the first step.
        last: log-SNR of the last step.
        steps: Number of steps.

    Returns:
        The table, as `extract` returns it.

    Raises:
        ModelError: If the scheduler cannot be expressed as a table.
    """
    return _extract(begin_between(scheduler, math.exp(-first / 2), math.exp(-last / 2), steps), steps)


def _extract(begun: Any, steps: int) -> SchedulerTable:
    name = type(begun).__name__
    check_values(name, begun.config)
    try:
        answers = probe(begun)
        widest = probe(begun, MOST) if asks_variance(begun) else None
        simple = at_first_order(begun, steps)
        first = None if simple is None else probe(simple)
    except (ValueError, RuntimeError) as error:  # torch finds no solution of equations, or diffusers has no method
        raise ModelError(f"{name} cannot sample with this configuration: {error}. Change it, or choose another.") from (
            error
        )
    if not np.isfinite(answers.next_samples).all():
        raise ModelError(_not_finite(begun, steps))
    table = solve(begun, answers, widest, steps, first=first)
    difference = replay(begun, table)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{name} in {steps} steps is not a linear multistep update with fixed clipping: its table is off by "
            f"{difference:.1e} of the sample, more than {TOLERANCE:.0e}. Choose one of {', '.join(SCHEDULERS)}."
        )
    if table.start_prediction.any() and not _starts(begun, table):
        table = replace(table, start_sample=np.zeros(table.steps), start_prediction=np.zeros(table.steps))
    return table


def _not_finite(begun: Any, steps: int) -> str:
    """Say why the answers of a scheduler are not finite: diffusers fails too, or only the zeros of a probe do."""
    name = type(begun).__name__
    keys = keys_of(name)
    if not stays_finite(begun):
        return f"{name} gives NaN or infinity in {steps} steps, in diffusers too. {' '.join(_hints(keys))}"
    if "clip_sample" in keys and begun.config.get("clip_sample") and log_snr(begun).min() <= -LOG_SNR_LIMIT:
        return (
            f"{name} in {steps} steps starts from pure noise, where it divides by zero and clips the result "
            "(clip_sample). diffusers does this, but a table cannot express it. A model of such a schedule needs "
            "prediction_type v_prediction or sample. For another one, set rescale_betas_zero_snr to false, or choose "
            "another number of steps or another scheduler."
        )
    return (
        f"{name} in {steps} steps gives NaN or infinity for samples or predictions of zero, but not for others. A "
        "table cannot express this. Choose another scheduler."
    )


def _hints(keys: Collection[str]) -> list[str]:
    """Advise on settings that make diffusers divide by zero, as far as a class has them."""
    hints = []
    if "rescale_betas_zero_snr" in keys:
        hints.append(
            "If its schedule ends in pure noise (rescale_betas_zero_snr), it needs prediction_type v_prediction or "
            "sample."
        )
    defaults = [key for key in ("lower_order_final", "predict_x0", "solver_type") if key in keys]
    if "final_sigmas_type" in keys and defaults:
        hints.append(
            f"If it ends without any noise (final_sigmas_type zero), it needs the defaults of {', '.join(defaults)}."
        )
    return [*hints, "Otherwise choose another scheduler." if hints else "Choose another scheduler."]


def _starts(begun: Any, table: SchedulerTable) -> bool:
    """Check that trajectories that begin at a later step, without history, are those of diffusers."""
    return all(
        replay(begun, table.starting_at(first), first) <= TOLERANCE for first in {table.steps // 3, table.steps // 2}
    )
