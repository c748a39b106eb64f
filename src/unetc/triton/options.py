"""Options of an export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Where the engines run, and the name of the model."""

    target: str | None = None
    """A key of `PLACEMENTS`; the target that the bundle was built for if None."""
    name: str | None = None
    """Name of the model that samples, with which the names of the others begin; the model's own if None."""
