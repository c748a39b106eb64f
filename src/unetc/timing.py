"""Measure time so that machine noise falls on all candidates alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

MORE = 4
"""How many times as many rounds are timed if they are short."""


def _nothing_is_pending() -> None:
    """Return at once: the call has done its work."""


def interleaved_ms(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    wait: Callable[[], object] = _nothing_is_pending,
    seconds: float = 0.0,
) -> NDArray[np.float64]:
    """Time calls in turns: A B C, A B C, ...

    Args:
        calls: What to time.
        rounds: Number of timed rounds, if they are not short.
        warmup: Number of rounds before, not timed.
        wait: Returns when the work of a call is done, if the call itself does not wait for it; timed with it.
        seconds: How long short rounds are timed: up to `MORE` times as many.

    Returns:
        [round, call] milliseconds.
    """
    for _ in range(warmup):
        for call in calls:
            call()
            wait()
    times: list[list[float]] = []
    first = time.perf_counter()
    while len(times) < rounds or (len(times) < MORE * rounds and time.perf_counter() - first < seconds):
        row = []
        for call in calls:
            start = time.perf_counter()
            call()
            wait()
            row.append(1e3 * (time.perf_counter() - start))
        times.append(row)
    return np.array(times)
