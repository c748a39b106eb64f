"""Estimates of when a request would be finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unetc.backend import Program
from unetc.runtime.batching.estimates import Estimates, Work
from unetc.runtime.batching.orders import Order
from unetc.runtime.batching.pace import Cost, Pace

UNITS = 64.0
CALLS = 10


def engine(inputs: object, output: object) -> dict[str, Any]:
    return {}


PROGRAM = cast(Program, engine)


@dataclass
class Accepted:
    """What estimates read of an order: images on their way, the share that is left of them, and those that wait."""

    running: int = 0
    share: float = 1.0
    waiting: int = 0
    programs: dict[Program, int] = field(default_factory=lambda: {PROGRAM: CALLS})
    units: float = UNITS

    @property
    def left(self) -> float:
        return self.running * self.share + self.waiting

    @property
    def starts(self) -> range:
        return range(self.waiting)


def orders(*accepted: Accepted) -> list[Order]:
    return cast("list[Order]", accepted)


def estimates(seats: int = 16, call: float = 0.5, unit: float = 0.01) -> Estimates:
    pace = Pace()
    pace.measured(PROGRAM, Cost(call, unit))
    return Estimates(pace, seats)


def new(images: int = 1) -> Work:
    return Work(programs={PROGRAM: CALLS}, units=UNITS, images=images)


def test_alone_a_request_takes_the_time_of_its_calls() -> None:
    ours = estimates()
    own = CALLS * (0.5 + 0.01 * UNITS)
    assert ours.finished([], new()) == pytest.approx(own)
    assert ours.both([], new()).under_load == pytest.approx(own)
    assert ours.backlog() == 0


def test_all_images_of_a_request_come_after_those_that_were_accepted() -> None:
    ours = estimates(seats=4, call=0.0)
    accepted = orders(Accepted(running=2, share=0.5), Accepted(waiting=8))
    image = CALLS * 0.01 * UNITS
    assert ours.finished([], new(8)) == pytest.approx(8 * image)
    assert ours.finished(accepted, new(8)) == pytest.approx(17 * image)


def test_calls_are_shared_by_half_of_those_on_their_way() -> None:
    call = 0.5 + 0.01 * 4 * UNITS
    assert estimates(seats=16).backlog(new(8)) == pytest.approx(8 * CALLS * call / 4)
    assert estimates(seats=8).backlog(new(100)) == pytest.approx(100 * CALLS * call / 4)


def test_a_crowd_that_is_half_done_counts_twice_under_load() -> None:
    """Others take the seats of those that are finished."""
    ours = estimates(seats=200, call=0.0)
    crowd = orders(Accepted(running=100, share=0.5))
    assert ours.both(crowd, new()).under_load == pytest.approx(2 * ours.finished(crowd, new()), rel=0.02)
    ours = estimates(seats=100, call=0.0)
    full = orders(Accepted(running=100, share=0.5), Accepted(waiting=50))
    seat, shared = 50 * CALLS * 0.01 * UNITS, 100 * CALLS * 0.01 * UNITS
    assert ours.both(full, new()).under_load == pytest.approx(seat + shared)


@given(
    st.lists(st.builds(Accepted, running=st.integers(0, 8), share=st.floats(0, 1), waiting=st.integers(0, 40))),
    st.integers(1, 40),
    st.integers(1, 32),
)
def test_more_requests_never_finish_sooner(accepted: list[Accepted], images: int, seats: int) -> None:
    ours = estimates(seats)
    before, after = orders(*accepted), orders(*accepted, Accepted(waiting=1))
    sooner, later = ours.both(before, new(images)), ours.both(after, new(images))
    assert sooner.seconds <= 1.0001 * later.seconds + 1e-9
    assert sooner.under_load <= 1.0001 * later.under_load + 1e-9
    assert ours.both(before, new(images)).under_load >= ours.finished(before, new(images))
