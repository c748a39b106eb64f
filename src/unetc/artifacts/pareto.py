"""Pareto: time and damage of every plan sampled by a search."""

from __future__ import annotations

from .plan import Plan
from .profile import Damage, ModelReference
from .record import Artifact, Record, finite, require


class Point(Record, frozen=True, kw_only=True):
    """One sampled plan."""

    budget: float
    """Budget of the search that sampled the plan."""
    time_ratio: float
    """Time of the plan's engine calls / time of as many calls of the full model."""
    damage: Damage
    plan: Plan

    def __post_init__(self) -> None:
        """Check the numbers."""
        require(finite(self.budget, self.time_ratio), "budget and time ratio must be finite")


class Pareto(Artifact, frozen=True, kw_only=True):
    """All sampled plans; the best of them form the curve of least damage at each time."""

    unetc: str
    model: ModelReference
    profile_sha256: str
    target: str
    environment: dict[str, str]
    steps: int
    samples: int
    """Number of samples per point."""
    seed: int
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        """Check that the curve is not empty."""
        require(bool(self.points), "a curve needs a point")

    def front(self) -> tuple[Point, ...]:
        """List the points that no other point beats in both time and relative L2 damage, fastest first."""
        front: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.time_ratio, p.damage.relative_l2.mean)):
            if not front or point.damage.relative_l2.mean < front[-1].damage.relative_l2.mean:
                front.append(point)
        return tuple(front)
