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
        self._predicted = self._taken = 0.0
        """Recent seconds, as predicted and as measured."""
        self._last = clock()

    def measured(self, program: Program, cost: Cost) -> None:
        """Take the cost of an engine."""
        self._costs[program] = cost

    def add(self, program: Program, units: float, seconds: float) -> None:
        """Add a call of an engine."""
        cost, slowness = self._costs.get(program), self._slowness()
        if cost is not None:
            before = MEMORY * self._predicted
            self._predicted, self._taken = before + cost.seconds(units), before * slowness + seconds
            self._last = self._clock()

    def call(self, program: Program, units: float) -> float:
        """Estimate the seconds of a call on an idle machine; 0 where the engine was not measured."""
        cost = self._costs.get(program)
        return 0.0 if cost is None else cost.seconds(units)

    def alone(self, calls: Mapping[Program, float], units: float) -> float:
        """Estimate the seconds of calls with nothing else in them.

        Args:
            calls: Number of calls by program.
            units: Units of each call.
        """
        return self._slowness() * self._sum(calls, units)

    def shared(self, calls: Mapping[Program, float], units: float, full: float) -> float:
        """Estimate the seconds that a member adds to calls that it shares.

        Args:
            calls: Number of calls by program.
            units: The member's units of each call.
            full: Units of the calls, with those of the others.
        """
        full = max(full, units)
        return self._slowness() * self._sum(calls, full) * units / full

    def _sum(self, calls: Mapping[Program, float], units: float) -> float:
        return sum(count * self.call(program, units) for program, count in calls.items())

    def _slowness(self) -> float:
        """Return recent seconds / predicted seconds; without calls it returns to 1."""
        if not self._predicted:
            return 1.0
        idle = self._clock() - self._last
        return 1 + (self._taken / self._predicted - 1) * math.exp2(-idle / HALF_LIFE_S)
