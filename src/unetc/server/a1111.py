"""The API of the A1111 web UI: txt2img, img2img, progress, and lists of models and samplers.

Progress and interruption name no request in this API. Here they concern all requests with the client's API key, or all
requests of a server without keys.

Source:
    https://github.com/AUTOMATIC1111/stable-diffusion-webui, modules/api/api.py and modules/api/models.py.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request

from unetc.device import Array
from unetc.errors import RequestError, brief

from .a1111_fields import A1111Request, read_fields
from .door import Door, answer_unless_gone
from .errors import Problem, RequestCancelled
from .images import decode_base64, encode_base64
from .keys import key_of
from .limits import DRAWN_SEEDS
from .service import ImageAnswer, ImageRequest, Running, Served, Service

_NAMES: Mapping[str, str] = {
    "model": "override_settings.sd_model_checkpoint",
    "guidance_scale": "cfg_scale",
    "count": "batch_size",
    "image": "init_images",
    "strength": "denoising_strength",
}
"""Fields of this API where `ImageRequest` has other names."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Task:
    """A request that runs."""

    client: str
    """Its API key, or nothing."""
    running: Running
    began: float = field(default_factory=time.time)
    """Seconds since 1970."""
    with_image: bool
    """Whether it starts from an image."""
    interrupted: bool = False
    so_far: Mapping[int, Array] = field(default_factory=dict)
    """The images that had begun when it was interrupted, by their number."""


class _Tasks:
    """Requests of all clients, oldest first."""

    def __init__(self, *, keys: bool) -> None:
        self._keys = keys
        self._tasks: list[_Task] = []

    @contextmanager
    def added(self, request: Request, running: Running, *, with_image: bool) -> Iterator[_Task]:
        """Keep a request in the list while it runs."""
        task = _Task(client=self.client(request), running=running, with_image=with_image)
        self._tasks.append(task)
        try:
            yield task
        finally:
            self._tasks.remove(task)

    def of(self, request: Request) -> list[_Task]:
        """List the unfinished requests of a client."""
        client = self.client(request)
        return [task for task in self._tasks if task.client == client and not task.running.done]

    def client(self, request: Request) -> str:
        """Return the key of a client, however it is sent; nothing on a server without keys."""
        return key_of(request.headers.get("Authorization", "")) if self._keys else ""


def make_router(service: Service) -> APIRouter:
    """Make the routes of the API."""
    router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    tasks = _Tasks(keys=service.settings.api_keys is not None)
    chosen: dict[str, str] = {}
    """Models that clients have set in `options`."""

    def usual(request: Request) -> str:
        """Return the model of a client's requests that name none."""
        return chosen.get(tasks.client(request), next(iter(service.models)))

    def read(request: Request, data: bytes, *, with_image: bool) -> tuple[Served, A1111Request]:
        """Read the fields of a request for images."""
        body = _object(data)
        served = service.find(_model_of(body) or usual(request), field=_NAMES["model"])
        wanted, problems = read_fields(body, _sampler(served), with_image=with_image)
        if len(wanted.images) > 1:
            problems["init_images"] = f"has {len(wanted.images)} images; expected one"
        if wanted.count > service.settings.images:
            limit = service.settings.images
            problems["batch_size"] = f"and n_iter ask for {wanted.count} images; expected at most {limit}"
        if problems:
            text = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
            raise RequestError(f"{text}.", next(iter(problems)))
        return served, wanted

    async def make(request: Request, *, with_image: bool) -> dict[str, Any]:
        data = await request.body()
        with service.counting_refusals():
            served, wanted = read(request, data, with_image=with_image)
            seed = secrets.randbelow(DRAWN_SEEDS) if wanted.seed is None else wanted.seed
            seeds = tuple(seed + k for k in range(wanted.count))
            asked = _image_request(served, wanted, seeds)
        running = await service.submit(asked)
        answer: ImageAnswer | None = None
        with tasks.added(request, running, with_image=with_image) as task:
            try:
                answer = await answer_unless_gone(request, running)
                images = answer.images
            except RequestCancelled:
                if not task.so_far:
                    raise
                images = np.stack(list(task.so_far.values()))
                seeds = tuple(seeds[number] for number in task.so_far)
        shown = await service.in_thread(encode_base64, images) if wanted.send_images else []
        size = service_size(served, wanted)
        info = _info(served, wanted, seeds, size, answer, interrupted=task.interrupted)
        return {"images": shown, "parameters": dict(wanted.parameters), "info": json.dumps(info)}

    @router.post("/txt2img")
    async def text_to_image(request: Request) -> dict[str, Any]:
        """Make images from a text."""
        return await make(request, with_image=False)

    @router.post("/img2img")
    async def image_to_image(request: Request) -> dict[str, Any]:
        """Make images from an image."""
        return await make(request, with_image=True)

    @router.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        """Report on the oldest request of the client."""
        mine = tasks.of(request)
        if not mine:
            return _progress(0.0, 0.0, {"job": "", "job_count": 0, "sampling_step": 0, "sampling_steps": 0}, None)
        task = mine[0]
        steps = task.running.progress
        share = task.running.share
        elapsed = time.time() - task.began
        state = {
            "job": "img2img" if task.with_image else "txt2img",
            "job_count": len(mine),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(task.began)),
            "sampling_step": steps.done if steps else 0,
            "sampling_steps": steps.steps if steps else 0,
        }
        image = None
        if not skip_current_image and (file := await task.running.picture(service.encode)) is not None:
            image = base64.b64encode(file).decode()
        return _progress(share, elapsed / share - elapsed if share else 0.0, state, image)

    @router.post("/interrupt")
    async def interrupt(request: Request) -> dict[str, Any]:
        """End all requests of the client; they answer with the images that have begun, as they are.

        A request none of whose images has begun fails.
        """
        for task in tasks.of(request):
            so_far = await task.running.so_far()
            if task.running.done:
                continue
            task.so_far, task.interrupted = so_far, True
            task.running.give_up(
                RequestCancelled("the request was interrupted before its first image had begun. Send it again.")
            )
        return {}

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """List the schedulers of the models: each has one."""
        names = dict.fromkeys(_sampler(served) for served in service.models.values())
        return [{"name": name, "aliases": [], "options": {}} for name in names]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """List the noise schedules: a bundle holds the one of its scheduler."""
        one = {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1, "need_inner_model": False}
        return [one]

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """List the models."""
        return [
            {
                "title": name,
                "model_name": name,
                "hash": _hash(served)[:10],
                "sha256": _hash(served),
                "filename": name,
                "config": None,
            }
            for name, served in service.models.items()
        ]

    @router.get("/options")
    async def options(request: Request) -> dict[str, Any]:
        """Describe the settings that clients look at."""
        return _options(service.models[usual(request)])

    @router.post("/options")
    async def set_options(request: Request) -> dict[str, Any]:
        """Choose the model of the client's requests that name none; clients may send all settings back."""
        wanted = _object(await request.body())
        name = wanted.get("sd_model_checkpoint", usual(request))
        if not isinstance(name, str):
            raise RequestError("sd_model_checkpoint: expected a string.", "sd_model_checkpoint")
        service.find(name, field="sd_model_checkpoint")
        known = [_options(served) for served in service.models.values()]
        for setting, value in wanted.items():
            if setting != "sd_model_checkpoint" and not any(value == own.get(setting, ...) for own in known):
                raise RequestError(f"{setting}: cannot be set here. Only sd_model_checkpoint can.", setting)
        chosen[tasks.client(request)] = name
        return {}

    return router


def error_body(problem: Problem) -> dict[str, Any]:
    """Write an error in the form of the web UI."""
    return {"error": problem.code, "detail": problem.message, "body": problem.field or "", "errors": problem.message}


DOOR = Door(prefixes=("/sdapi",), router=make_router, error=error_body)


def _object(data: bytes) -> dict[str, Any]:
    """Read the body of a request."""
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()  # the answer repeats it
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {brief(error)}.") from error
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object.")
    return body


def _model_of(body: Mapping[str, Any]) -> str | None:
    """Return the model that a request names."""
    settings = body.get("override_settings")
    name = settings.get("sd_model_checkpoint") if isinstance(settings, Mapping) else None
    return name if isinstance(name, str) and name else None


def _options(served: Served) -> dict[str, Any]:
    """Write the settings of a client that uses a model."""
    return {
        "sd_model_checkpoint": served.name,
        "sd_checkpoint_hash": _hash(served),
        "samples_format": "png",
        "show_progress_every_n_steps": 1,
        "CLIP_stop_at_last_layers": 1,
    }


def _sampler(served: Served) -> str:
    return served.bundle.manifest.scheduler.name


def _hash(served: Served) -> str:
    """Return the SHA-256 of the weights."""
    manifest = served.bundle.manifest
    return next(record.sha256 for record in manifest.files if record.path == manifest.weights)


def _scale_of(served: Served, wanted: A1111Request) -> float | None:
    """Return the guidance scale, if the model is guided: clients send one to every model."""
    return wanted.guidance_scale if served.prompts.guided else None


def _image_request(served: Served, wanted: A1111Request, seeds: tuple[int, ...]) -> ImageRequest:
    """Turn the fields into a request; image k has seed + k, as in the web UI."""
    return ImageRequest(
        model=served.name,
        prompt=wanted.prompt if wanted.prompt or served.prompts.free else None,
        negative_prompt=wanted.negative_prompt or None,
        guidance_scale=_scale_of(served, wanted),
        seeds=seeds,
        steps=wanted.steps,
        height=wanted.height,
        width=wanted.width,
        quality=wanted.quality or "auto",
        image=decode_base64(wanted.images[0], "init_images") if wanted.images else None,
        stretch=not wanted.crop,
        strength=wanted.strength if wanted.strength is not None or not wanted.images else 0.75,
        names=_NAMES,
    )


def service_size(served: Served, wanted: A1111Request) -> tuple[int, int]:
    """Return height and width of the images in pixels."""
    height, width = served.size
    return wanted.height or height, wanted.width or width


def _progress(share: float, seconds: float, state: Mapping[str, Any], image: str | None) -> dict[str, Any]:
    fixed = {"skipped": False, "interrupted": False, "stopping_generation": False, "job_no": 0}
    return {
        "progress": share,
        "eta_relative": seconds,
        "state": {**fixed, "job_timestamp": "0", **state},
        "current_image": image,
        "textinfo": None,
    }


def _info(
    served: Served,
    wanted: A1111Request,
    seeds: tuple[int, ...],
    size: tuple[int, int],
    answer: ImageAnswer | None,
    *,
    interrupted: bool,
) -> dict[str, Any]:
    """Describe the images as the web UI does, and how they were made."""
    height, width = size
    count, sampler = len(seeds), _sampler(served)
    steps = wanted.steps or served.bundle.manifest.steps
    sent = _scale_of(served, wanted)
    scale = served.prompts.guidance_scale if sent is None else sent
    negative = f"\nNegative prompt: {wanted.negative_prompt}" if wanted.negative_prompt else ""
    texts = [
        f"{wanted.prompt}{negative}\nSteps: {steps}, Sampler: {sampler}, CFG scale: {scale:g}, Seed: {seed}, "
        f"Size: {width}x{height}, Model hash: {_hash(served)[:10]}, Model: {served.name}"
        for seed in seeds
    ]
    return {
        "prompt": wanted.prompt,
        "all_prompts": [wanted.prompt] * count,
        "negative_prompt": wanted.negative_prompt,
        "all_negative_prompts": [wanted.negative_prompt] * count,
        "seed": seeds[0],
        "all_seeds": list(seeds),
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": sampler,
        "cfg_scale": scale,
        "steps": steps,
        "batch_size": wanted.batch_size,
        "restore_faces": False,
        "sd_model_name": served.name,
        "sd_model_hash": _hash(served)[:10],
        "denoising_strength": wanted.strength,
        "extra_generation_params": {} if answer is None else answer.to_builtins(),
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "clip_skip": 1,
        "interrupted": interrupted,
    }
