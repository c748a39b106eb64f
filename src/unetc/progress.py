"""Progress of long work, reported as data; only the command line draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far one stage has come."""

    stage: str
    done: int
    total: int
    note: str = ""
    """Something to say before it goes on."""


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Report progress to nobody."""
