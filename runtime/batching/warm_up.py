"""The first calls of engines, in which backends allocate memory, choose kernels and capture graphs."""

from __future__ import annotations

import time

from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.rollout import FULL_ENGINE
from unetc.runtime.session import Session

CALLS = 3
"""Calls of every engine: the last one counts, as the first ones prepare the later ones."""
_TIMESTEPS = 550.0, 500.0


def warm_up(session: Session, samples: int) -> float:
    """Call the full model and every engine of a session.

    Args:
        session: The session.
        samples: Samples of every call.

    Returns:
        Mean seconds of the last calls.

    Raises:
        SessionError: If an engine fails.
    """
    device, start = session.device, session.start(samples)
    conditions = start.conditions.on(device)
    inputs = conditions.widen(device.put(start.noise), _TIMESTEPS[1])
    prediction = device.empty((start.rows, session.predicted_channels, *start.noise.shape[2:]))
    cache = BranchCache(device=device)
    cache.store(session.programs[FULL_ENGINE](inputs, prediction), _TIMESTEPS[0])
    inputs |= cache.inputs(_TIMESTEPS[1], start.rows)
    took = []
    for program in dict.fromkeys((session.full, *session.programs)):
        for _ in range(CALLS):
            began = time.perf_counter()
            program(inputs, prediction)
            device.synchronize()
            seconds = time.perf_counter() - began
        took.append(seconds)
    return sum(took) / len(took)
