"""Summarise rounds of timings: a median with its percentiles, and the cost of switching engines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Number of bootstrap resamples."""


def spread(values: NDArray[np.float64]) -> list[float]:
    """Summarise rounds by their median and their 10th and 90th percentile."""
    return [float(value) for value in np.percentile(values, [50, 10, 90])]


def switch_cost(times: NDArray[np.float64]) -> list[float]:
    """Compute the extra cost of a call after another engine's call, compared with one after the same engine's.

    Args:
        times: Milliseconds `[round, 4]` of calls A A B B of the full model A and another engine B. Rounds follow each
            other directly, so the first call of each pair comes after a switch.

    Returns:
        The cost in calls of the full model, and the ends of its 95 % interval over resampled rounds.
    """

    def cost(times: NDArray[np.float64]) -> float:
        switched, full, other_switched, other = np.median(times, axis=0)
        return float((switched - full + other_switched - other) / 2 / full)

    generator, rounds = np.random.default_rng(0), len(times)
    drawn = [cost(times[generator.integers(rounds, size=rounds)]) for _ in range(RESAMPLES)]
    return [cost(times), *(float(end) for end in np.percentile(drawn, [2.5, 97.5]))]
