"""The application: all doors over one service, with API keys, limits of bodies and one place for errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import unetc
from unetc.errors import BatcherStopped, UnetcError
from unetc.progress import OnProgress, ignore

from . import a1111, health, jobs, kserve, openai, page
from .door import Door
from .errors import Problem, Unauthorized, problem_of
from .keys import key_of
from .limits import MOST_DIGITS
from .service import Service, State
from .settings import ServerSettings

logger = logging.getLogger(__name__)

DOORS: tuple[Door, ...] = (health.DOOR, openai.DOOR, jobs.DOOR, kserve.DOOR, a1111.DOOR, page.DOOR)
"""Every API that is served."""

REQUEST_ID = "X-Request-Id"
"""Header that names a request in answers and, when it fails by a fault of the server, in logs."""
_CRASH_CHECK_S = 0.2
"""Seconds between two looks at the threads of the engines."""
_CLOSE_S = 5.0
"""Seconds for engines to finish a call, or their loading, when the server ends."""
_LONGEST_ID = 64


def make_app(
    served: Service | ServerSettings, *, doors: Sequence[Door] = DOORS, on_progress: OnProgress = ignore
) -> FastAPI:
    """Make the application; its start loads the engines in the background, its end closes them.

    Args:
        served: The service, or settings to open one.
        doors: The APIs.
        on_progress: Called, on another thread, as engines are loaded.

    Raises:
        UnetcError: If a bundle cannot be opened.
    """
    service = served if isinstance(served, Service) else Service.open(served)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loader = threading.Thread(target=_load, args=(service, on_progress), name="unetc-load", daemon=True)
        try:
            loader.start()
        except RuntimeError as error:  # no room for its stack
            service.fail(error)
        watch = asyncio.create_task(_watch(service))
        try:
            yield
        finally:
            service.drain()
            watch.cancel()
            app.state.threads_left = not await _close(service, loader)

    app = FastAPI(
        title="unetc",
        version=unetc.__version__,
        docs_url=None,  # they load scripts from another server
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.state.threads_left = False
    for door in doors:
        app.include_router(door.router(service))

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError) and request.method == "POST":
            service.count_refused(error, _model_of(error.body))
        problem = problem_of(error)
        name = request.state.request_id
        if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("%s failed, request %s", request.url.path, name, exc_info=error)
        answer = answer_of(problem, doors, request.url.path)
        answer.headers[REQUEST_ID] = name  # the answer to an error that nobody expects does not pass through `Gate`
        return answer

    for kind in (UnetcError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)
    app.add_middleware(Gate, service=service, doors=doors)
    return app


def _model_of(body: object) -> str | None:
    """Return the model that a body with wrong fields names."""
    model = body.get("model") if isinstance(body, dict) else None
    return model if isinstance(model, str) else None


def _load(service: Service, on_progress: OnProgress) -> None:
    try:
        service.load(on_progress)
    except BaseException as error:
        if service.state is State.DRAINING and isinstance(error, BatcherStopped):
            return  # the server ended during the warm-up
        service.fail(error)
        if not isinstance(error, UnetcError):
            logger.exception("loading the engines failed")


async def _close(service: Service, loader: threading.Thread) -> bool:
    """End the threads of the engines; return whether all have ended within some seconds."""

    def close() -> None:
        service.close()
        if loader.ident is not None:
            loader.join()
            service.close()  # an engine that was loaded meanwhile

    closing = threading.Thread(target=close, name="unetc-close", daemon=True)
    try:
        closing.start()
        await asyncio.to_thread(closing.join, _CLOSE_S)
    except RuntimeError:  # no room for the stack of a thread
        return False
    return not closing.is_alive()


async def _watch(service: Service) -> None:
    """Mark the service as failed when the thread of an engine has crashed."""
    while True:
        await asyncio.sleep(_CRASH_CHECK_S)
        if (error := service.crashed()) is not None:
            service.fail(error)
            return


def answer_of(problem: Problem, doors: Sequence[Door], path: str) -> Response:
    """Write an error in the form of the door that a path belongs to."""
    fitting = [(len(prefix), door) for door in doors for prefix in door.prefixes if path.startswith(prefix)]
    _, door = max(fitting, key=lambda one: one[0], default=(0, health.DOOR))
    return JSONResponse(door.error(problem), problem.status, headers=problem.headers)


class Gate:
    """Checks the API key and the size of the body, and names the request, before a door sees it."""

    def __init__(self, app: ASGIApp, *, service: Service, doors: Sequence[Door]) -> None:
        """Wrap an application."""
        self._app = app
        self._doors = doors
        self._keys = service.settings.api_keys
        self._limit = service.settings.body_bytes
        self._open = {path for door in doors for path in door.open}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        name = _request_id(headers.get(REQUEST_ID, ""))
        scope.setdefault("state", {})["request_id"] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        try:
            self._check(scope["path"], headers)
        except (UnetcError, HTTPException) as error:
            await answer_of(problem_of(error), self._doors, scope["path"])(scope, receive, named)
            return
        await self._app(scope, self._bounded(receive), named)

    def _check(self, path: str, headers: Headers) -> None:
        key = key_of(headers.get("Authorization", ""))
        if self._keys is not None and path not in self._open and not self._keys.allow(key):
            raise Unauthorized("the API key is missing or wrong. Send one as `Authorization: Bearer KEY`.")
        length = headers.get("Content-Length", "0")
        if length.isdecimal() and (len(length) > MOST_DIGITS or int(length) > self._limit):
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """Count the bytes of a body, as a client may send more than it has announced, or announce nothing."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> HTTPException:
        """Make an error that FastAPI passes on where it reads a body."""
        return HTTPException(413, f"the body exceeds the limit of {self._limit} bytes. Send less.")


def _request_id(given: str) -> str:
    """Keep the name that a client has given, if it is harmless in logs."""
    if 0 < len(given) <= _LONGEST_ID and given.isascii() and given.replace("-", "").isalnum():
        return given
    return secrets.token_hex(8)
