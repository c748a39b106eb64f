"""How long calls take, for estimates of waiting times.

A call of an engine takes a + b * units seconds, where units are rows times the area of a sample. Warm-up measures both
numbers of every engine. Later calls show how much slower or faster the machine is now.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from unetc.backend import Program

MEMORY = 0.9
"""Weight of everything before, when a call is added."""
HALF_LIFE_S = 5.0
"""Time without a call after which half of the present slowness is forgotten, so that no old call refuses requests."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of a call of one engine."""

    call: float
    """Seconds of a call, whatever its size."""
    unit: float
    """Seconds per row and pixel of a sample."""

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> Cost:
        """Fit two measured calls, each with its units and seconds."""
        (few, quick), (many, slow) = small, large
        unit = max(0.0, (slow - quick) / (many - few)) if many > few else quick / few
        return cls(max(0.0, quick - unit * few), unit)

    def seconds(self, units: float) -> float:
        """Predict a call."""
        return self.call + self.unit * units


class Pace:
    """Costs of all engines, and the present slowness of the machine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Know nothing yet; every estimate is 0."""
        self._clock = clock
        self._costs: dict[Program, Cost] = {}
        self._taken = 1.0
        """Recent seconds / predicted seconds."""
        self._units = 0.0
        """Recent units per call."""
        self._last = clock()

    def measured(self, program: Program, cost: Cost) -> None:
        """Take the cost of an engine."""
        self._costs[program] = cost

    def add(self, program: Program, units: float, seconds: float) -> None:
        """Add a call of an engine."""
        cost = self._costs.get(program)
        self._units = MEMORY * self._units + (1 - MEMORY) * units
        if cost is not None and (predicted := cost.seconds(units)) > 0:
            slowness = self._slowness()
            self._taken = MEMORY * slowness + (1 - MEMORY) * seconds / predicted
            self._last = self._clock()

    def alone(self, calls: Mapping[Program, int], units: float) -> float:
        """Estimate the seconds of calls with nothing else in them.

        Args:
            calls: Number of calls by program.
            units: Units of each call.
        """
        return self._slowness() * self._sum(calls, units)

    def shared(self, calls: Mapping[Program, int], units: float) -> float:
        """Estimate the seconds that a member adds to calls as full as the recent ones; arguments as for `alone`."""
        full = max(self._units, units, 1.0)
        return self._slowness() * self._sum(calls, full) * units / full

    def _sum(self, calls: Mapping[Program, int], units: float) -> float:
        known = ((self._costs.get(program), count) for program, count in calls.items())
        return sum(count * cost.seconds(units) for cost, count in known if cost is not None)

    def _slowness(self) -> float:
        """Return recent seconds / predicted seconds; without calls it returns to 1."""
        idle = self._clock() - self._last
        return 1 + (self._taken - 1) * math.exp2(-idle / HALF_LIFE_S)
