"""What rounds of timings say: a median with its percentiles, and what a switch of engines costs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Draws of the bootstrap."""


def spread(values: NDArray[np.float64]) -> list[float]:
    """Summarise rounds by median, 10th and 90th percentile."""
    return [float(value) for value in np.percentile(values, [50, 10, 90])]


def switch_cost(times: NDArray[np.float64]) -> list[float]:
    """Tell what a call costs more behind a call of another engine than behind one of its own.

    Args:
        times: [round, 4], milliseconds of calls A A B B of the full model A and another engine B, one round directly
            behind the other: the first of each two has switched.

    Returns:
        The cost in calls of the full model, and the ends of its 95 % interval over resampled rounds.
    """

    def cost(times: NDArray[np.float64]) -> float:
        switched, full, other_switched, other = np.median(times, axis=0)
        return float((switched - full + other_switched - other) / 2 / full)

    generator, rounds = np.random.default_rng(0), len(times)
    drawn = [cost(times[generator.integers(rounds, size=rounds)]) for _ in range(RESAMPLES)]
    return [cost(times), *(float(end) for end in np.percentile(drawn, [2.5, 97.5]))]
