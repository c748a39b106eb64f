"""Doors: the APIs that the server speaks, one per file of this package.

A file of a door defines `DOOR`, and `unetc.server.app` lists it:

    DOOR = Door(prefixes=("/v2",), router=make_router, error=error_body)

    def make_router(service: Service) -> APIRouter: ...
    def error_body(problem: Problem) -> dict[str, object]: ...

Handlers raise; the app turns errors into the form of the door whose prefix begins the path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from .errors import ClientGone, Problem
from .service import ImageAnswer, Running, Service


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

    For answers in one piece, after the body has been read. Streams need no such watch: their generators cancel in a
    `finally`, where `Running.cancel` needs no await.

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
