"""The process of the server: its socket, its signals, and the way it ends."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from unetc.errors import SessionError, brief

from .errors import NotReady
from .service import Service, State

_BACKLOG = 2048
"""Connections that wait to be accepted."""
_LAST_ANSWERS_S = 5
"""Seconds for answers that are being sent when the server ends."""


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address, so that a taken one is known before engines are loaded.

    Raises:
        SessionError: If the address is taken, or is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else brief(error)
        raise SessionError(
            f"cannot listen on {host}, port {port}: {reason}. Choose another --port or --host; port 0 stands for a "
            "free one."
        ) from error
    return listening


def address_of(listening: socket.socket) -> str:
    """Return the address of a listening socket, as http://127.0.0.1:8000."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The way a server ended."""

    given_up: int
    """Accepted requests that were not finished in time."""
    threads_left: bool
    """Whether an engine is still being loaded, or still makes a call."""

    @property
    def message(self) -> str:
        """Last line of the server."""
        if not self.given_up:
            return "accepted requests are finished; the server has ended."
        number = "1 accepted request was" if self.given_up == 1 else f"{self.given_up} accepted requests were"
        return f"{number} not finished in time and given up; the server has ended."


def run(app: FastAPI, listening: socket.socket, on_ready: Callable[[], object]) -> Ending:
    """Serve until a signal ends the process.

    After SIGTERM or SIGINT, the server is not ready, finishes accepted requests and ends, after some time in any case.
    A second signal ends it at once.

    Args:
        app: The application.
        listening: The socket to take connections from.
        on_ready: Called once all engines have made a call.

    Returns:
        The way it ended after a signal.

    Raises:
        SessionError: If engines cannot be loaded, or their thread crashes.
    """
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
        lifespan="on",
    )
    server = _Server(config, service, on_ready)
    server.run(sockets=[listening])
    if (failure := service.failure) is not None:
        if isinstance(failure, SessionError):
            raise failure
        raise SessionError(f"the server cannot go on: {brief(Exception(failure))}.") from failure
    return Ending(given_up=server.given_up, threads_left=app.state.threads_left)


def leave() -> NoReturn:
    """End the process with exit code 0 although threads are left.

    A library that still loads or calls an engine aborts the process if the interpreter ends under it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Server(uvicorn.Server):
    """Ends when accepted requests are finished, and when the service fails."""

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready
        self._announced = False
        self._ends: float | None = None
        self.given_up = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends the server at once."""
        if self._ends is not None:
            self._ends = time.monotonic()
            return
        self._service.drain()
        self._ends = time.monotonic() + self._service.settings.drain

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether to end."""
        if not self._announced and self._service.state is State.READY:
            self._announced = True
            self._on_ready()
        return await super().on_tick(counter) or self._over()

    def _over(self) -> bool:
        """Check whether nothing is left to do, or there is no time for it."""
        service = self._service
        if service.failure is not None:
            return True
        if self._ends is None:
            return False
        if time.monotonic() >= self._ends:
            self.given_up += service.give_up(
                NotReady("the server ended before the request was finished. Send it to another server, or again.")
            )
            return True
        return not service.unfinished and service.unfetched() == 0
