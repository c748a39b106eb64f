"""Failures of requests: one mapping from errors to HTTP statuses, and the error form of each API.

A door, as one API is called here, writes the body of its errors from a `Problem`. Where the request never reached a
door (wrong key, large body, unknown path), `unetc.server.app` picks the form by the path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from unetc.errors import (
    BatcherStopped,
    DeadlineExceeded,
    ModelError,
    OutOfMemory,
    QueueFull,
    RequestError,
    SessionError,
    ShapeMismatch,
    UnetcError,
)
from unetc.memory import lacks_memory, out_of_memory

CLIENT_GONE = 499
"""Status, never seen by its client, of a request whose client went away."""
_LEAST_WAIT, _LONGEST_WAIT = 1, 10
"""Range of Retry-After in seconds: official clients sleep for any value."""


class UnknownModel(UnetcError):
    """A request names a model that is not served."""


class UnknownJob(UnetcError):
    """A request names a job that does not exist, or that is no longer kept."""


class Unauthorized(UnetcError):
    """A request has no valid API key."""


class NotReady(UnetcError):
    """The server is loading engines, or finishes accepted requests before it ends."""


class RequestCancelled(UnetcError):
    """A request was cancelled, by its client or by another request."""


class ClientGone(UnetcError):
    """The client went away, so the request was given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A failure of a request, before it is written in the form of an API."""

    status: int
    """HTTP status."""
    code: str
    """Short name of the kind, such as `queue_full`."""
    message: str
    """Names the failure, the value found, the expected value and the next thing to do."""
    field: str | None = None
    """The first wrong field."""
    retry_after: int | None = None
    """Seconds after which it may work."""

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status >= 500 and self.retry_after is None:
            headers["x-should-retry"] = "false"  # or the client of OpenAI makes a request that is late two times more
        return headers


_PLAIN: tuple[tuple[type[UnetcError], int, str], ...] = (
    (UnknownModel, 404, "model_not_found"),
    (UnknownJob, 404, "job_not_found"),
    (Unauthorized, 401, "invalid_api_key"),
    (RequestCancelled, CLIENT_GONE, "cancelled"),
    (ClientGone, CLIENT_GONE, "client_gone"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (OutOfMemory, 500, "out_of_memory"),
    (ShapeMismatch, 400, "invalid_value"),
    (ModelError, 400, "invalid_value"),
)
"""Status and code by class of error, the first that fits."""
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
"""Codes of errors that the framework raises, by status."""


def problem_of(error: BaseException) -> Problem:
    """Describe an error as a failure of a request.

    Errors that only a bug raises keep their text to themselves; the log has it.
    """
    message = " ".join(str(error).split()).encode(errors="backslashreplace").decode()  # it may repeat half a character
    match error:
        case RequestError():
            return Problem(status=400, code="invalid_value", message=message, field=error.field)
        case RequestValidationError():
            return _of_fields(error.errors())
        case QueueFull():
            return Problem(status=429, code="queue_full", message=message, retry_after=seconds_to_wait(error.seconds))
        case NotReady() | BatcherStopped():
            return Problem(status=503, code="not_ready", message=message, retry_after=seconds_to_wait(2))
        case HTTPException():
            code = _CODES.get(error.status_code, "http_error")
            return Problem(status=error.status_code, code=code, message=str(error.detail))
    for kind, status, code in _PLAIN:
        if isinstance(error, kind):
            return Problem(status=status, code=code, message=message)
    if isinstance(error, Exception) and lacks_memory(error):
        return problem_of(out_of_memory(error))
    if isinstance(error, SessionError):
        return Problem(status=500, code="sampling_failed", message=message)
    return Problem(status=500, code="internal_error", message="the server failed; its log has the reason.")


def seconds_to_wait(seconds: float) -> int:
    """Round an estimate to whole seconds for Retry-After, from 1 to 10."""
    if not math.isfinite(seconds):
        return _LONGEST_WAIT
    return min(max(_LEAST_WAIT, math.ceil(seconds)), _LONGEST_WAIT)


def _of_fields(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Name every wrong field of a body, once."""
    wrong: dict[str, str] = {}
    for error in errors:
        name, text = _name(error["loc"]), _reason(error)
        wrong[name] = f"{wrong[name]}, or {text}" if name in wrong else text
    message = "; ".join(f"{name}: {text}" if name else text for name, text in wrong.items())
    return Problem(status=400, code="invalid_value", message=f"{message}.", field=next(iter(wrong)) or None)


def _name(location: Sequence[str | int]) -> str:
    """Name a field by its place, without the word `body`, and without the kinds of values that a field may have."""
    named = [str(part) for part in location[1:] if isinstance(part, int) or str(part).isidentifier()]
    return ".".join(named)


def _reason(error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "there is no such field"
        case "missing":
            return "it is missing"
        case "json_invalid" | "model_attributes_type" | "dict_type":
            return "the body must be a JSON object, with the header Content-Type: application/json"
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]
