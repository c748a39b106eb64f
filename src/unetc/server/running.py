"""Requests that run, seen from the event loop: their result, their progress, and the way to give them up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

import numpy as np

from unetc.device import Array
from unetc.errors import UnetcError
from unetc.runtime.batching.request import Progress, SampleResult, Ticket

from .errors import RequestCancelled
from .image_request import ImageAnswer, ImageRequest, Level
from .latest import Latest

_PREVIEW_S = 0.3
"""Seconds for which clients get the same preview: each is decoded between two calls of sampling."""


class Running:
    """An accepted request. Its methods are for the thread of the event loop, unless they say otherwise."""

    def __init__(self, model: str, request: ImageRequest, level: Level) -> None:
        """Begin without tickets; `Service.submit` adds them.

        Args:
            model: Name of the model.
            request: The request.
            level: The level that the request asks for; `level` may be changed until the first ticket is added.
        """
        self.model = model
        self.request = request
        self.asked = level
        self.level = level
        self.submitted = time.monotonic()
        """When its time limit began."""
        self._loop = asyncio.get_running_loop()
        self._tickets: list[Ticket] = []
        self._answer: asyncio.Future[ImageAnswer] = self._loop.create_future()
        self._answer.add_done_callback(lambda done: done.exception())  # or asyncio complains if nobody asks
        self._change: asyncio.Future[None] = self._loop.create_future()
        self._notified = threading.Event()
        self._last: Progress | None = None
        self._preview = Latest(self._all_now, 0.0)  # a stream wants its images at certain steps
        self._picture: Latest[bytes | None] | None = None

    @property
    def done(self) -> bool:
        """Whether it has succeeded, failed or been cancelled."""
        return self._answer.done()

    async def result(self) -> ImageAnswer:
        """Wait for the images; if the waiting task is cancelled, the request is.

        Raises:
            RequestCancelled: If the request was cancelled in another way.
            UnetcError: If sampling fails.
        """
        try:
            return await asyncio.shield(self._answer)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give up: its places in the batch are free within one step. Does nothing to a finished request."""
        self.give_up(RequestCancelled("the request was cancelled."))

    def give_up(self, error: UnetcError) -> None:
        """Give up with another reason. Does nothing to a finished request."""
        if self._answer.done():
            return
        self._end(error)

    @property
    def position(self) -> int | None:
        """Requests that are served before this one; 0 while it runs, None when it is finished."""
        positions = [ticket.position() for ticket in self._tickets]
        unfinished = any(place is not None for place in positions)
        return min(place or 0 for place in positions) if unfinished else None

    @property
    def progress(self) -> Progress | None:
        """Progress of its slowest images; None before their first step."""
        if self.done:
            return self._last
        reports = [ticket.progress for ticket in self._tickets]
        return min((one for one in reports if one), key=lambda one: one.done) if all(reports) and reports else None

    @property
    def share(self) -> float:
        """Share of the steps of all its parts that are made, those of parts that wait included."""
        reports = [ticket.progress for ticket in self._tickets]
        made = [one.done / max(1, one.steps) if one else 0.0 for one in reports]
        return sum(made) / len(made) if made else 0.0

    async def preview(self) -> Array | None:
        """Decode all images as they are now, [image, channel, height, width]; None before all have begun, and after."""
        return await self._preview.get()

    async def picture(self, encode: Callable[[Array], Awaitable[list[bytes]]]) -> bytes | None:
        """Encode the first image as it is now; None before it has begun, and after.

        Args:
            encode: Encodes images; it must be the same in every call.
        """
        if self._picture is None:
            self._picture = Latest(partial(self._draw, encode), _PREVIEW_S)
        return await self._picture.get()

    async def so_far(self) -> dict[int, Array]:
        """Decode the images that have begun, [channel, height, width] each, by their number in the request."""
        tickets = tuple(self._tickets)
        starts = itertools.accumulate((ticket.request.count for ticket in tickets), initial=0)
        parts = await asyncio.gather(*(_now(ticket) for ticket in tickets))
        return {
            start + k: image
            for start, part in zip(starts, parts, strict=False)
            if part is not None
            for k, image in enumerate(part)
        }

    async def _all_now(self) -> Array | None:
        parts = await asyncio.gather(*(_now(ticket) for ticket in self._tickets))
        found = [part for part in parts if part is not None]
        return _joined(found) if found and len(found) == len(parts) else None

    async def _draw(self, encode: Callable[[Array], Awaitable[list[bytes]]]) -> bytes | None:
        first = await _now(self._tickets[0], 1) if self._tickets else None
        return None if first is None else (await encode(first[:1]))[0]

    @property
    def change(self) -> asyncio.Future[None]:
        """Future of the next step or the end; take it before reading the state, and do not cancel it."""
        return self._change

    async def states(self) -> AsyncIterator[Progress | None]:
        """Yield the progress now and after steps, until the request is finished.

        Progress between two reads are skipped: a slow reader gets the latest. Needs `watch=True` at submission.
        """
        while True:
            change = self._change
            yield self.progress
            if self.done:
                return
            await asyncio.wait({change})  # unlike `await change`, leaves it to other readers when this one is cancelled

    def on_step(self, _: Progress) -> None:
        """Wake readers up; called on the thread of the engines."""
        if not self._notified.is_set():  # one wake-up at a time, however slow the event loop is
            self._notified.set()
            _call(self._loop, self._notify)

    def _notify(self) -> None:
        self._notified.clear()
        change, self._change = self._change, self._loop.create_future()
        if not change.done():
            change.set_result(None)

    @property
    def degraded(self) -> bool:
        """Whether it is served below the level that it asks for."""
        return self.level is not self.asked

    def add(self, ticket: Ticket) -> None:
        """Add a part of the request; may be called from any thread."""
        self._tickets.append(ticket)
        if self.done:  # it was given up meanwhile
            ticket.cancel()

    def follow(self) -> None:
        """Finish when all parts have; call it once all parts are added."""
        for ticket in self._tickets:
            ticket.future.add_done_callback(lambda _: _call(self._loop, self._settle))

    def _settle(self) -> None:
        """Finish if all parts have, or if one has failed."""
        if self._answer.done():
            return
        futures = [ticket.future for ticket in self._tickets]
        failed = next((one for one in futures if one.done() and (one.cancelled() or one.exception())), None)
        if failed is not None:
            error = None if failed.cancelled() else failed.exception()
            self._end(error or RequestCancelled("the request was cancelled."))
        elif all(one.done() for one in futures):
            try:
                outcome: ImageAnswer | BaseException = self._answered([one.result() for one in futures])
            except Exception as error:  # such as a lack of memory; without an end, the client would wait forever
                outcome = error
            self._end(outcome)

    def _end(self, outcome: ImageAnswer | BaseException) -> None:
        """Finish. Parts that are not finished are cancelled, and all are let go: they hold samples on the device."""
        self._last = self.progress
        if isinstance(outcome, ImageAnswer):
            self._answer.set_result(outcome)
        else:
            self._answer.set_exception(outcome)
        tickets, self._tickets = self._tickets, []  # after the answer, so that `add` cancels what it adds from now on
        for ticket in tickets:
            ticket.cancel()
        self._preview, self._picture = Latest(self._all_now, 0.0), None
        self._notify()

    def _answered(self, results: list[SampleResult]) -> ImageAnswer:
        made = [
            (ticket.request.seed, ticket.request.first_index + k)
            for ticket in self._tickets
            for k in range(ticket.request.count)
        ]
        return ImageAnswer(
            model=self.model,
            images=_joined([result.images for result in results]),
            seeds=tuple(seed for seed, _ in made),
            indices=tuple(index for _, index in made),
            level=self.level,
            degraded=self.degraded,
            steps=results[0].steps,
            non_finite_steps=sum(result.non_finite_steps for result in results),
            waited=max(result.waited for result in results),
            took=max(result.took for result in results),
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        """List the warnings about prompts, each once."""
        conditions = [ticket.request.conditions for ticket in self._tickets]
        return tuple(dict.fromkeys(note for one in conditions if one is not None for note in one.notes))

    def release(self) -> None:
        """Let the images of a finished request go: afterwards, only its state can be read."""
        if self._answer.done():
            self._answer = self._loop.create_future()
            self._answer.cancel()

    def when_done(self, call: Callable[[asyncio.Future[ImageAnswer]], object]) -> None:
        """Call a function on the event loop when the request is finished; it gets the future of the answer."""
        self._answer.add_done_callback(call)


def _joined(parts: Sequence[Array]) -> Array:
    """Join images; a single part is returned as it is, as a copy would hold up the event loop."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


async def _now(ticket: Ticket, images: int | None = None) -> Array | None:
    """Decode the first images of a part as they are now; None before it has begun, and after a failure."""
    if ticket.future.done():
        failed = ticket.future.cancelled() or ticket.future.exception() is not None
        return None if failed else ticket.future.result().images[:images]
    try:
        return await asyncio.wrap_future(ticket.preview(images))
    except UnetcError:
        return None  # the request fails too, and says why


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call a function on an event loop; do nothing if it has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
