"""Which contenders took a plan's time, so that their damages are compared with the plan's.

A damage is compared with another only if both took the same measured time: within 5 % more or less. A faster contender
counts too where the plan misses the goal even so. Where none counts, a figure gives the nearest time in place of the
damages, without a goal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SAME_TIME = 0.05
"""Largest difference between two times that count as the same, relative to the plan's."""


def in_time(plan: Mapping[str, float], other: Mapping[str, float], goal: float) -> bool:
    """Check whether a contender took the plan's time, or took less and the plan misses the goal even so.

    Args:
        plan: Time and damage of the plan.
        other: Time and damage of the contender.
        goal: Most damage of the plan / damage of the contender.
    """
    more = other["time"] / plan["time"] - 1
    return abs(more) <= SAME_TIME or (more < 0 and plan["damage"] > goal * other["damage"])


def nearest_time(plan: Mapping[str, float], others: Iterable[Mapping[str, float]]) -> float:
    """Return the time of the contender that is nearest to the plan's, relative to the plan's."""
    return min((other["time"] / plan["time"] for other in others), key=lambda ratio: abs(ratio - 1))
