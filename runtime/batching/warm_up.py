"""The first calls of engines, in which backends allocate memory, choose kernels and capture graphs."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from unetc.backend import Program
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.rollout import FULL_ENGINE
from unetc.runtime.session import Session

from .pace import Cost

CALLS = 3
"""Calls of every engine and size: the last one counts, as the first ones prepare the later ones."""
_TIMESTEPS = 550.0, 500.0


def warm_up(session: Session, sizes: Sequence[int], known: Collection[Program] = ()) -> Mapping[Program, Cost]:
    """Call the full model and every engine of a session, apart from those that another session has called.

    Args:
        session: The session.
        sizes: Numbers of samples of the calls, increasing.
        known: Programs to leave out.

    Returns:
        Cost of every program that was called.

    Raises:
        SessionError: If an engine fails.
    """
    programs = [one for one in dict.fromkeys((session.full, *session.programs)) if one not in known]
    times = [_call(programs, session, samples) for samples in sizes]
    return {program: Cost.through(times[0][program], times[-1][program]) for program in times[0]}


def _call(programs: Sequence[Program], session: Session, samples: int) -> dict[Program, tuple[float, float]]:
    """Return the units and seconds of a call of each program."""
    device, start = session.device, session.start(samples)
    conditions = start.conditions.on(device)
    inputs = conditions.widen(device.put(start.noise), _TIMESTEPS[1])
    prediction = device.empty((start.rows, session.predicted_channels, *start.noise.shape[2:]))
    cache = BranchCache(device=device)
    cache.store(session.programs[FULL_ENGINE](inputs, prediction), _TIMESTEPS[0])
    inputs |= cache.inputs(_TIMESTEPS[1], start.rows)
    units, times = start.units, {}
    for program in programs:
        for _ in range(CALLS):
            began = time.perf_counter()
            program(inputs, prediction)
            device.synchronize()
            times[program] = (units, time.perf_counter() - began)
    return times
