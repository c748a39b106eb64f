"""The measurements of a part of the benchmark, and their combination into one result for `tables.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unetc.errors import UnetcError

Goal = Mapping[str, float]
"""Bounds `at_least` and `at_most`, or one of them."""


class Absent(UnetcError):
    """A part cannot be measured here; the message gives the reason."""


@dataclass(slots=True)
class Measured:
    """Figures and tables of one part."""

    figures: list[dict[str, object]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)

    def figure(self, name: str, value: float, goal: Goal | None = None) -> None:
        """Add a figure."""
        self.figures.append({"figure": name, "value": value, **({"goal": dict(goal)} if goal else {})})

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table; tables with the same title are joined."""
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})


def joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Join the figures of all parts, and the rows of tables with the same title."""
    figures: list[dict[str, Any]] = []
    tables: dict[str, dict[str, Any]] = {}
    for part in parts:
        figures += part["figures"]
        for own in part["tables"]:
            table = tables.setdefault(own["title"], {**own, "rows": []})
            table["rows"] = table["rows"] + own["rows"]
    return {"figures": figures, "tables": list(tables.values())}
