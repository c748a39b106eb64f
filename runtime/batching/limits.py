"""Limits of a batcher, and reports about its work."""

from __future__ import annotations

from dataclasses import dataclass

from unetc.arguments import plain_fields
from unetc.errors import SessionError

ROWS = 8
SEATS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How much a batcher does at once."""

    rows: int = ROWS
    """Most rows of a call, for engines that no measurement limits."""
    seats: int = SEATS
    """Most images that are on their way at once; the others wait, so that those on their way are soon finished."""
    queue: int = 256
    """Most images that wait."""
    captured: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Rows of calls on a device that prepares for every shape; others are rounded up to these."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            SessionError: If one has another type.
        """
        plain_fields(self, SessionError)

    @property
    def prepared(self) -> tuple[int, ...]:
        """Rows of the calls on such a device, rising: none has more than a call may have."""
        return (*sorted(size for size in self.captured if size < self.rows), self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """One engine call, for metrics."""

    level: str
    """Quality level of its first member."""
    engine: int
    """Engine in that level's plan; 0 for the full model."""
    phase: int | None
    """Phase of that member; None for the full model."""
    rows: int
    padding: int
    """Further rows, which only fill the call."""
    rollouts: int
    seconds: float
    switched: bool
    """Whether the call before ran another engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a batcher is."""

    waiting: int
    """Images that have no seat yet."""
    running: int
    """Images on their way."""
    seconds: float
    """Estimated time until all of them are finished."""
