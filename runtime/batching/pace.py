"""How fast the engines have been lately, for estimates of waiting times."""

from __future__ import annotations

from collections.abc import Sequence

MEMORY = 0.95
"""Weight of everything before, when a call is added."""


class Pace:
    """Moving averages of measured calls, by quality level."""

    def __init__(self) -> None:
        """Know nothing yet; every estimate is 0."""
        self._calls: dict[str, tuple[float, float, float]] = {}
        """Weight, rows and seconds by level."""

    def add(self, levels: Sequence[str], rows: int, seconds: float) -> None:
        """Add a call.

        Args:
            levels: Quality level of each member.
            rows: Rows of the call.
            seconds: Its time, with everything around it.
        """
        for level in dict.fromkeys(levels):
            before = self._calls.get(level, (0.0, 0.0, 0.0))
            weight, own_rows, own_seconds = (MEMORY * value for value in before)
            self._calls[level] = weight + 1, own_rows + rows, own_seconds + seconds

    def per_row(self, level: str) -> float:
        """Estimate the seconds per row in calls of a level."""
        _, rows, seconds = self._of(level)
        return seconds / rows if rows else 0.0

    def per_call(self, level: str) -> float:
        """Estimate the seconds per call of a level."""
        weight, _, seconds = self._of(level)
        return seconds / weight if weight else 0.0

    def _of(self, level: str) -> tuple[float, float, float]:
        """Return the level's averages; those of any level if it has made no call."""
        return self._calls.get(level) or next(iter(self._calls.values()), (0.0, 0.0, 0.0))
