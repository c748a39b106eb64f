"""The images API of OpenAI: models, generations, and streams with partial images.

Source:
    The types of the official client, openai 3.57.0; a test talks to the server through it.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from unetc.errors import UnetcError

from .bodies import ImageBody
from .door import Door, EventStream, answer_unless_gone, event
from .errors import Problem, problem_of
from .service import ImageAnswer, Running, Served, Service

_NO_TOKENS = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""Usage in tokens, which the client's type demands; nothing is billed."""
_MOST_PARTIAL_IMAGES = 16
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Types of errors by status."""


class GenerationBody(ImageBody):
    """Body of a request for images."""

    response_format: Literal["b64_json"] | None = None
    """Images come in the answer: the server keeps no files."""
    stream: bool | None = None
    """Send events while the images are made."""
    partial_images: Annotated[int, Field(ge=0, le=_MOST_PARTIAL_IMAGES)] | None = None
    """Previews to send, if the answer is a stream."""

    @field_validator("response_format", mode="before")
    @classmethod
    def _refuse_addresses(cls, value: object) -> object:
        """Say why there are no addresses of images."""
        if value == "url":
            raise ValueError("url is not offered, as the server keeps no images; expected b64_json")
        return value


def make_router(service: Service) -> APIRouter:
    """Make the routes of `/v1`."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    started = int(time.time())

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """List the served models."""
        return {"object": "list", "data": [_model(served, started) for served in service.models.values()]}

    @router.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """Describe a model: its quality levels, numbers of steps, size and prompts."""
        return _model(service.find(name), started)

    @router.post("/images/generations")
    async def generations(body: GenerationBody, request: Request) -> Response:
        """Make images."""
        partial = body.partial_images or 0
        with service.counting_refusals(body.model):
            wanted = body.to_request()
        running = await service.submit(wanted, watch=bool(body.stream and partial))
        if body.stream:
            return EventStream(_events(service, running, body, partial), running.cancel)
        answer = await answer_unless_gone(request, running)
        files = await service.encode(answer.images, body.form, quality=body.output_compression)
        return JSONResponse(
            {
                **_common(answer.level.name, answer.images.shape, body),
                "created": int(time.time()),
                "data": [
                    {"b64_json": b64encode(data).decode(), "seed": seed, "index": index}
                    for data, seed, index in zip(files, answer.seeds, answer.indices, strict=True)
                ],
                "unetc": answer.to_builtins(),
            }
        )

    return router


async def _events(service: Service, running: Running, body: GenerationBody, partial: int) -> AsyncIterator[bytes]:
    """Send previews at even distances, then one event per image."""
    try:
        if partial:
            async for previewed in _previews(service, running, body, partial):
                yield previewed
        answer = await running.result()
        files = await service.encode(answer.images, body.form, quality=body.output_compression)
        for k, data in enumerate(files):
            yield event("image_generation.completed", _completed(answer, k, data, body))
    except UnetcError as error:
        yield event("error", error_body(problem_of(error)))


async def _previews(service: Service, running: Running, body: GenerationBody, partial: int) -> AsyncIterator[bytes]:
    sent = 0
    async for progress in running.states():
        if progress is None or running.done or sent >= partial:
            continue
        due = min(partial, progress.done * (partial + 1) // max(1, progress.steps))
        if due <= sent or progress.done >= progress.steps:
            continue
        sent = due  # a slow reader skips previews
        samples = await running.preview()
        if samples is None:
            continue
        files = await service.encode(samples, body.form, quality=body.output_compression)
        for k, data in enumerate(files):
            yield event(
                "image_generation.partial_image",
                {
                    "type": "image_generation.partial_image",
                    "b64_json": b64encode(data).decode(),
                    "partial_image_index": due - 1,
                    "image_index": k,
                    "created_at": int(time.time()),
                    "step": progress.done,
                    "steps": progress.steps,
                    "phase": progress.phase,
                    **_common(running.level.name, samples.shape, body),
                },
            )


def _completed(answer: ImageAnswer, k: int, data: bytes, body: GenerationBody) -> dict[str, object]:
    return {
        "type": "image_generation.completed",
        "b64_json": b64encode(data).decode(),
        "image_index": k,
        "seed": answer.seeds[k],
        "created_at": int(time.time()),
        "usage": _NO_TOKENS,
        "unetc": answer.to_builtins(),
        **_common(answer.level.name, answer.images.shape, body),
    }


def _common(level: str, shape: tuple[int, ...], body: GenerationBody) -> dict[str, object]:
    """Describe images in the words of OpenAI."""
    return {
        "size": f"{shape[3]}x{shape[2]}",
        "quality": level,
        "output_format": body.form.value,
        "background": "opaque",
    }


def _model(served: Served, created: int) -> dict[str, Any]:
    (height, width), classes = served.size, served.prompts.classes
    return {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "unetc",
        "levels": [level.to_builtins() for level in served.levels.values()],
        "steps": list(served.steps),
        "default_steps": served.bundle.manifest.steps,
        "scheduler": served.bundle.scheduler.name,
        "size": f"{width}x{height}",
        "classes": None if classes is None else list(classes.words),
        "prompts": list(served.prompts.prompts),
        "free_prompts": served.prompts.free,
        "guidance_scale": served.prompts.guidance_scale,
    }


def error_body(problem: Problem) -> dict[str, Any]:
    """Write an error as OpenAI does."""
    kind = _TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    return {"error": {"message": problem.message, "type": kind, "param": problem.field, "code": problem.code}}


DOOR = Door(prefixes=("/v1",), router=make_router, error=error_body)
