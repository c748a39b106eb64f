"""Measure time so that machine noise falls on all candidates alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def interleaved_ms(calls: Sequence[Callable[[], object]], *, rounds: int, warmup: int = 2) -> NDArray[np.float64]:
    """Time calls in turns: A B C, A B C, ...

    Args:
        calls: What to time; each must return when its work is done.
        rounds: Number of timed rounds.
        warmup: Number of rounds before, not timed.

    Returns:
        [round, call] milliseconds.
    """
    for _ in range(warmup):
        for call in calls:
            call()
    times = np.empty((rounds, len(calls)))
    for row in times:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            row[i] = 1e3 * (time.perf_counter() - start)
    return times
