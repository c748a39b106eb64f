"""What the engine thread has to do: requests that were accepted, and errands between two calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from unetc.backend import Program
from unetc.errors import UnetcError
from unetc.runtime.loop import Start
from unetc.runtime.session import Session

from .member import Member
from .request import Progress, Ticket


@dataclass(slots=True, kw_only=True, eq=False)
class Order:
    """A request on the engine thread's side."""

    ticket: Ticket
    session: Session
    starts: list[Start]
    """Starts of images without a seat, the next one last."""
    calls: int
    """Calls per image."""
    programs: Mapping[Program, float]
    """Calls per image by program; a call of half of the rows is half a call."""
    units: float
    """Units of a call per image, see `Pace`."""
    turn: int
    """Turn of the batcher at submission."""
    submitted: float
    deadline: float
    on_step: Callable[[Progress], None] | None
    members: list[Member] = field(default_factory=list)
    """Images with a seat or finished, in the order of their index."""
    began: float | None = None

    @property
    def owner(self) -> object:
        """Who gets the seats: the group of the request, or else the order."""
        group = self.ticket.request.group
        return self if group is None else group

    @property
    def running(self) -> int:
        """Number of images on their way."""
        return sum(1 for member in self.members if not member.finished)

    @property
    def left(self) -> float:
        """Work that is left, in images with all their calls."""
        return sum(1 - member.share for member in self.members) + len(self.starts)


class Errand:
    """Something that the engine thread does between two calls."""

    def __init__(self, work: Callable[[], Any]) -> None:
        """Prepare it."""
        self.future: Future[Any] = Future()
        self._work = work

    def run(self) -> None:
        """Do it; an error belongs to the one who asked."""
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self._work())
            except Exception as error:
                self.future.set_exception(error)

    def fail(self, error: UnetcError) -> None:
        """Give up."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def single_starts(start: Start) -> list[Start]:
    """Split the start of a batch into starts of single images."""
    images = []
    for row, index in enumerate(start.indices):
        conditions = start.conditions.take([row])
        noise, image = start.noise[row : row + 1], None if start.image is None else start.image[row : row + 1]
        images.append(replace(start, noise=noise, image=image, conditions=conditions, indices=[index]))
    return images


def fail(order: Order, error: UnetcError) -> None:
    """Hand over an error, unless the client has given up."""
    if not order.ticket.future.cancelled() and order.ticket.future.set_running_or_notify_cancel():
        order.ticket.future.set_exception(error)
