"""Spread the names of lines in a picture, so that none overlap."""

from __future__ import annotations

from collections.abc import Sequence


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Move falling heights as little as needed, so that neighbours have a gap: groups that touch keep their mean."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-1], gap) > _bottom(groups[-2], gap) - gap:
            last = groups.pop()
            groups[-1] += last
    return [_top(group, gap) - place * gap for group in groups for place in range(len(group))]


def _top(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2
