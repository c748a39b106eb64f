"""Percentages in messages, tables and pages."""

from __future__ import annotations


def percent(share: float) -> str:
    """Write a share as a percentage with at most one decimal: 0.27 is 27 %, 0.2812 is 28.1 %."""
    return f"{round(100 * share, 1) + 0.0:.1f}".removesuffix(".0") + " %"  # + 0.0 turns -0.0 into 0.0
