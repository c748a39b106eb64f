"""Progress of long work, reported as data; only the command line draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress of one stage."""

    stage: str
    done: int
    total: int
    note: str = ""
    """Message to show before the stage goes on."""


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Discard the progress."""
