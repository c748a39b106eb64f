"""Write a schedule, one engine per step, as the phases of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from unetc.artifacts.plan import Phase

LONGEST_CYCLE = 8
_TURNS = 2
"""Repetitions that a cycle needs at least."""


def phases_of(schedule: Sequence[int], log_snr: Sequence[float], low: float, high: float) -> tuple[Phase, ...]:
    """Find phases that reproduce a schedule, as few as a greedy search finds.

    Args:
        schedule: Engine of every step.
        log_snr: Noise level of every step, rising; phases change half-way between two steps.
        low: Lower end of the first phase.
        high: Upper end of the last phase.
    """
    cycles: list[tuple[int, tuple[int, ...]]] = []
    start = 0
    while start < len(schedule):
        length, cycle = _longest(schedule[start:])
        cycles.append((start, cycle))
        start += length
    inner = [float(log_snr[at - 1] + log_snr[at]) / 2 for at, _ in cycles[1:]]
    edges = [min(low, float(log_snr[0])), *inner, max(high, float(log_snr[-1]) + 1)]
    return tuple(
        Phase(low=left, high=right, cycle=cycle)
        for (left, right), (_, cycle) in zip(pairwise(edges), cycles, strict=True)
    )


def _longest(schedule: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Find the cycle that the schedule follows longest from its first step."""
    best: tuple[int, tuple[int, ...]] = 0, ()
    for period in range(1, min(LONGEST_CYCLE, len(schedule)) + 1):
        cycle = tuple(schedule[:period])
        length = next((i for i, engine in enumerate(schedule) if engine != cycle[i % period]), len(schedule))
        if length > best[0] and (period == 1 or length >= _TURNS * period):
            best = length, cycle
    return best
