"""When a request would be finished, given what is on its way."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from unetc.backend import Program

from .orders import Order
from .pace import Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Images of one request that are to be sampled."""

    programs: Mapping[Program, float]
    """Calls per image by program; a call of half of the rows is half a call."""
    units: float
    """Units of a call per image, see `Pace`."""
    images: float
    """Number of images; one that is half done counts as a half."""

    @classmethod
    def left(cls, order: Order) -> Work:
        """Return what is left of an order."""
        return cls(programs=order.programs, units=order.units, images=order.left)


@dataclass(frozen=True, slots=True)
class Estimate:
    """When a request would be finished, in seconds from now."""

    seconds: float
    """If no more requests come."""
    under_load: float
    """If others keep coming as fast as images are finished."""


class Estimates:
    """Estimates seconds from the pace of the engines; 0 for engines that were never measured."""

    def __init__(self, pace: Pace, seats: int) -> None:
        """Keep the pace, and the number of images that are on their way at once."""
        self._pace = pace
        self._seats = seats

    def backlog(self, *work: Work) -> float:
        """Estimate the seconds until all work is finished, if no more comes."""
        crowd = self._crowd((one.units, one.images) for one in work)
        return sum(one.images * self._shared(one, crowd) for one in work)

    def finished(self, orders: Collection[Order], new: Work) -> float:
        """Estimate the seconds until new work is finished along with what was accepted, if no more comes."""
        return max(self.backlog(*map(Work.left, orders), new), self._pace.alone(new.programs, new.units))

    def both(self, orders: Collection[Order], new: Work) -> Estimate:
        """Estimate as `finished` does, and under load.

        Under load, new work waits for a seat, and all its calls are shared by as many as now. It takes up to twice as
        long: those that are on their way are half done on average, but others take their seats.
        """
        heads = [(order.units, order.running + len(order.starts)) for order in orders]
        crowd = self._crowd([*heads, (new.units, new.images)])
        before = sum(len(order.starts) * self._shared(Work.left(order), crowd) for order in orders)
        turns = math.ceil(new.images / self._seats)
        shared = turns * self._shared(new, crowd) * crowd / new.units
        seconds = self.finished(orders, new)
        return Estimate(seconds, max(before + shared, seconds))

    def _crowd(self, images: Iterable[tuple[float, float]]) -> float:
        """Compute the units of all images that have a seat at once, from units and numbers of images."""
        images = list(images)
        largest = max((units for units, _ in images), default=0.0)
        return min(self._seats * largest, sum(units * min(count, self._seats) for units, count in images))

    def _shared(self, work: Work, crowd: float) -> float:
        """Estimate the seconds that an image adds to the calls that it shares.

        Those on their way wait for two engines, more or less, so half of them share a call.
        """
        return self._pace.shared(work.programs, work.units, min(crowd, self._seats * work.units) / 2)
