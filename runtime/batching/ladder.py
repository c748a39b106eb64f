"""The ladder of quality levels: which level serves a request, given how long each would take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unetc.errors import SessionError

from .estimates import Estimate
from .request import FULL

AUTO = "auto"
"""Leaves the level to the server: the bundle's default, and faster ones under load where the server may step down."""

HEADROOM = 0.75
"""Share of the target that an estimate may take; the rest is for errors, and for requests that come later."""
CROWD = 0.5
"""Share of the queue above which it is crowded; the rest is for bursts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A level for a request."""

    level: str
    seconds: float
    """Estimated seconds until the request is finished."""
    in_time: bool
    """Whether the estimate lies within the deadline."""


def saving_of(level: str) -> float:
    """Read the share of the time that a level saves from its name: "full" saves 0, "27%" and "0.27" save 0.27.

    Raises:
        SessionError: If the name is none of these.
    """
    if level == FULL:
        return 0.0
    try:
        saving = float(level.removesuffix("%")) / (100 if level.endswith("%") else 1)
    except ValueError:
        saving = math.nan
    if not 0 <= saving < 1:
        raise SessionError(f"{level!r} is not a quality level. Expected {FULL}, or a saving such as 27%.")
    return saving


def find_level(levels: Sequence[str], wanted: str, *, automatic: bool = True) -> str:
    """Look up a level by its name, or by its saving written in another way.

    Args:
        levels: The levels of a bundle.
        wanted: The level.
        automatic: Whether the message may offer `auto`.

    Raises:
        SessionError: If there is no such level; the message lists all.
    """
    if wanted in levels:
        return wanted
    known = (AUTO, *levels) if automatic else levels
    problem = SessionError(f"there is no quality level {wanted!r}. Expected one of: {', '.join(known)}.")
    try:
        saving = saving_of(wanted)
    except SessionError:
        raise problem from None
    for level in levels:
        if math.isclose(saving_of(level), saving, abs_tol=5e-4):
            return level
    raise problem


def steps_down(levels: Sequence[str], start: str, floor: str | None) -> tuple[str, ...]:
    """List the levels that may serve a request, from the best one.

    Args:
        levels: The levels of a bundle, in any order.
        start: The level that serves it without load, one of `levels`.
        floor: The fastest level that may serve it, which need not be one of `levels`; None forbids stepping down.
    """
    best = saving_of(start)
    fastest = best if floor is None else saving_of(floor)
    between = [level for level in levels if level != start and best < saving_of(level) <= fastest + 5e-4]
    return (start, *sorted(between, key=saving_of))


def choose_level(estimates: Mapping[str, Estimate], *, target: float, deadline: float, crowded: bool = False) -> Choice:
    """Choose the best level that is fast enough.

    Without a level within the target, the fastest one serves: under load, a request is degraded rather than refused.
    It also serves where the queue is crowded, because requests would soon be refused for want of room. A level that is
    not faster than a better one is never chosen. The target is for all requests, so it is compared with the time that
    the request takes if others keep coming. The deadline is for this one.

    Args:
        estimates: When the request would be finished, by level, from the best one.
        target: Seconds in which most requests are to be finished.
        deadline: Seconds after which its answer is of no use.
        crowded: Whether more than `CROWD` of the queue is taken.
    """
    fits = (name for name, own in estimates.items() if own.under_load <= HEADROOM * target and own.seconds <= deadline)
    level = None if crowded else next(fits, None)
    if level is None:
        level = min(estimates, key=lambda name: estimates[name].seconds)  # the first of equals, which is the best one
    seconds = estimates[level].seconds
    return Choice(level=level, seconds=seconds, in_time=seconds <= deadline)
