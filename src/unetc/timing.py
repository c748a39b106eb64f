"""Timing that exposes all candidates to the same machine noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

MORE = 4
"""Factor by which the number of rounds may grow if they are short."""


WARMUP = 2
"""Usual number of untimed rounds."""


def _nothing_is_pending() -> None:
    """Return at once, because the call has finished its work."""


def interleaved_ms(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warmup: int = WARMUP,
    wait: Callable[[], object] = _nothing_is_pending,
    seconds: float = 0.0,
) -> NDArray[np.float64]:
    """Time calls in turns: A B C, A B C, ...

    Args:
        calls: The calls to time.
        rounds: Minimum number of timed rounds.
        warmup: Number of untimed rounds before them.
        wait: Waits for the work of a call that returns early. Its time counts as part of the call.
        seconds: Time in seconds for which rounds are repeated, up to `MORE` times `rounds`.

    Returns:
        Milliseconds, [round, call].
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
