"""Doors: the APIs that the server speaks, one per file of this package.

A file of a door defines `DOOR`, and `unetc.server.app` lists it:

    DOOR = Door(prefixes=("/v2",), router=make_router, error=error_body)

    def make_router(service: Service) -> APIRouter: ...
    def error_body(problem: Problem) -> dict[str, object]: ...

Handlers raise; the app turns errors into the form of the door whose prefix begins the path.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import ClientGone, Problem
from .service import ImageAnswer, Running, Service

_COMMENT_EVERY_S = 15.0
"""Seconds without an event after which a stream sends a comment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """One API."""

    prefixes: tuple[str, ...]
    """Beginnings of its paths; the longest prefix of a path decides about the form of errors."""
    router: Callable[[Service], APIRouter]
    """Makes its routes."""
    error: Callable[[Problem], dict[str, Any]]
    """Writes the JSON body of an error."""
    open: tuple[str, ...] = ()
    """Paths that need no API key."""


async def answer_unless_gone(request: Request, running: Running) -> ImageAnswer:
    """Wait for the images of a request, and cancel it when its client goes away.

    For answers in one piece, after the body has been read; streams are `EventStream`s.

    Raises:
        ClientGone: If the client has gone.
        UnetcError: If sampling fails.
    """
    watch = asyncio.ensure_future(_gone(request))
    work = asyncio.ensure_future(running.result())
    try:
        await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientGone("the client has gone, so the request was given up.")
    finally:
        watch.cancel()
        if not work.done():
            running.cancel()
            work.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A stream of server-sent events; whatever ends it calls `on_end`.

    Clean-up rests on no `finally` of the generator: Starlette cancels an `await` there, and a generator that was never
    started has no `finally`.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], object]) -> None:
        """Stream events; `on_end` must not block, and may find its work done."""
        super().__init__(_with_comments(events), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _with_comments(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Send a comment when there is no event for a while: proxies close connections on which nothing is sent."""
    waited: asyncio.Future[bytes] | None = None
    try:
        while True:
            waited = waited or asyncio.ensure_future(anext(events))
            await asyncio.wait({waited}, timeout=_COMMENT_EVERY_S)
            if not waited.done():
                yield b": still here\n\n"
                continue
            try:
                yield waited.result()
            except StopAsyncIteration:
                return
            waited = None
    finally:
        if waited is not None:
            waited.cancel()


def event(name: str, data: Mapping[str, object]) -> bytes:
    """Write a server-sent event with JSON data."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
