"""Pareto: time and damage of every plan that a search has sampled."""

from __future__ import annotations

from .plan import Plan
from .profile import Damage, ModelReference
from .record import Artifact, Record, finite, require


class Point(Record, frozen=True, kw_only=True):
    """One plan, sampled."""

    budget: float
    """The budget whose search met it."""
    time_ratio: float
    """Time of the plan's engine calls / as many of the full model."""
    damage: Damage
    plan: Plan

    def __post_init__(self) -> None:
        """Check the numbers."""
        require(finite(self.budget, self.time_ratio), "budget and time ratio must be finite")


class Pareto(Artifact, frozen=True, kw_only=True):
    """Every plan that was sampled, and thereby the curve of the least damage at any time."""

    unetc: str
    model: ModelReference
    profile_sha256: str
    target: str
    environment: dict[str, str]
    steps: int
    samples: int
    """Samples behind every point."""
    seed: int
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        """Check that there is a curve."""
        require(bool(self.points), "a curve needs a point")

    def front(self) -> tuple[Point, ...]:
        """List the points that no other beats in both time and relative L2 damage, fastest first."""
        front: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.time_ratio, p.damage.relative_l2.mean)):
            if not front or point.damage.relative_l2.mean < front[-1].damage.relative_l2.mean:
                front.append(point)
        return tuple(front)
