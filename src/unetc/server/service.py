"""The service behind all doors: admission, choice of a level, and submission to the batcher.

A door turns the body of its API into an `ImageRequest`, awaits `Service.submit`, and gets a `Running`:

    running = await service.submit(ImageRequest(prompt="a three", count=2))
    answer = await running.result()      # an ImageAnswer; cancelling the task cancels the request

Every problem is an error of `unetc.server.errors`, or a `UnetcError` that `problem_of` maps to a status. The engines
run on the thread of the batcher. asyncio never waits for it: blocking work goes through `Service.in_thread`.
"""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any, ParamSpec, TypeVar

import numpy as np

from unetc.call import EXTRA_CHANNELS
from unetc.device import Array
from unetc.errors import BatcherStopped, DeadlineExceeded, QueueFull, RequestError, SessionError, UnetcError
from unetc.progress import OnProgress, ignore
from unetc.runtime.batching.ladder import AUTO, CROWD, choose_level, find_level, saving_of, steps_down
from unetc.runtime.batching.request import FULL, SampleRequest
from unetc.runtime.bundle import Bundle

from .calls import Calls
from .errors import NotReady, RequestCancelled, UnknownModel, problem_of
from .image_request import ImageAnswer, ImageRequest, Level
from .images import Format, encode
from .limits import DRAWN_SEEDS, LARGEST_SCALE, LARGEST_SEED
from .metrics import Metrics, Outcome
from .names import NAME, short_name
from .prompts import Wanted
from .running import Running
from .served import Served
from .settings import ServerSettings

__all__ = ["ImageAnswer", "ImageRequest", "Level", "Running", "Served", "Service", "State"]

_HALF = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
_FEW_VALUES = 2**14
"""Most values of noise that are drawn on the event loop, in less than a millisecond."""
_STRENGTH = 0.8
"""Share of the steps that change an image, where the request does not say."""

P = ParamSpec("P")
T = TypeVar("T")


class State(Enum):
    """Where a service is between its start and its end."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """All served models."""

    def __init__(self, settings: ServerSettings, models: Mapping[str, Served]) -> None:
        """Keep verified bundles; `open` makes them."""
        self.settings = settings
        self.models = dict(models)
        self.state = State.LOADING
        self.failure: BaseException | None = None
        """Why the service failed."""
        self.metrics = Metrics()
        self.metrics.show_ready(lambda: self.state is State.READY)
        self.running: set[Running] = set()
        """Accepted requests for images that are not finished."""
        self.calls = Calls()
        """Accepted calls of the denoiser that are not finished."""
        self.unfetched: Callable[[], int] = lambda: 0
        """Counts the jobs whose results wait for their clients; the jobs API replaces it."""
        self.settled: Callable[[str], Awaitable[None]] = _at_once
        """Waits until nothing is left to do for a job; the jobs API replaces it."""
        self.job_prefix = ""
        """Begins the names of jobs, where requests about a job must find this process among others."""
        self.scrape: Callable[[], Awaitable[bytes]] = self._scrape
        """Writes the metrics; replaced where several processes serve together."""
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="unetc-door")

    @classmethod
    def open(cls, settings: ServerSettings) -> Service:
        """Verify the bundles, and name the models.

        Raises:
            ArtifactError: If a bundle cannot be read or is damaged.
            SessionError: If two models have one name, or a name cannot stand in an address.
        """
        models: dict[str, Served] = {}
        for source in settings.bundles:
            bundle = Bundle.open(source.path)
            name = source.name or short_name(bundle.manifest.model.name)
            if not NAME.fullmatch(name):
                raise SessionError(f"{name!r} cannot name a model. Use letters, digits, dots, hyphens and underscores.")
            if name in models:
                raise SessionError(f"two bundles are called {name}. Name them, as in {name}-2={source.path}.")
            models[name] = Served(name, bundle)
        return cls(settings, models)

    def load(self, on_progress: OnProgress = ignore) -> None:
        """Load all engines, start their threads and make a call of each; the service is ready then.

        Raises:
            UnetcError: If an engine cannot be loaded, or fails.
        """
        for served in self.models.values():
            if self.state is not State.LOADING:
                return
            served.load(self.settings, self.metrics, on_progress)
        if self.state is State.LOADING:
            self.state = State.READY

    def find(self, name: str | None, *, field: str = "model") -> Served:
        """Look up a model; without a name, the only one.

        Raises:
            UnknownModel: If it is not served.
            RequestError: If there are several models and no name.
        """
        if name is None:
            if len(self.models) > 1:
                raise RequestError(f"several models are served. Set {field} to one of {', '.join(self.models)}.", field)
            return next(iter(self.models.values()))
        if name not in self.models:
            raise UnknownModel(f"there is no model {name[:100]!r}. Expected one of: {', '.join(self.models)}.")
        return self.models[name]

    def check_ready(self) -> None:
        """Refuse requests before all engines are loaded, and while the server ends.

        Raises:
            NotReady: If it takes no requests now.
        """
        if self.state is State.LOADING:
            raise NotReady("the engines are being loaded. Try again in a few seconds.")
        if self.state is not State.READY:
            raise NotReady("the server is about to end and takes no more requests. Send them to another one.")

    async def submit(self, request: ImageRequest, *, watch: bool = False) -> Running:
        """Check, admit and submit a request.

        Args:
            request: The images to make.
            watch: Whether `Running.states` is to be read.

        Raises:
            RequestError: If a field is wrong.
            UnknownModel: If the model is not served.
            NotReady: If the server takes no requests now.
            QueueFull: If the queue is full, or the request could not be finished in time.
            DeadlineExceeded: If its preparation took longer than its time limit.
        """
        with self.counting_refusals(request.model):
            running = await self._submitted(request, watch=watch)
        self.running.add(running)
        running.when_done(lambda answer: self._ended(running, answer))
        return running

    @contextmanager
    def counting_refusals(self, model: str | None = None) -> Iterator[None]:
        """Count a request that the enclosed code refuses, as the part of a door does that reads a body.

        Args:
            model: The model that it names.
        """
        try:
            yield
        except Exception as error:
            self.count_refused(error, model)
            raise

    def count_refused(self, error: Exception, model: str | None = None) -> None:
        """Count a request that was not accepted, because of an error."""
        self.metrics.ended(self._known(model), _outcome_of(error))

    def _known(self, model: str | None) -> str:
        """Return a model's name as a label of metrics, which no client can make up; the only one needs no name."""
        if model is None and len(self.models) == 1:
            return next(iter(self.models))
        return model if model in self.models else "-"

    async def _submitted(self, request: ImageRequest, *, watch: bool) -> Running:
        self.check_ready()
        served = self.find(request.model, field=request.names.get("model", "model"))
        running = Running(served.name, request, self._asked(served, request))
        try:
            if self._is_brief(served, request):
                self._accept(served, running, watch)
            else:
                await self.in_thread(self._accept, served, running, watch)
        except BaseException:
            running.cancel()
            raise
        running.request = replace(request, image=None)  # the parts have it, in the size of the samples
        running.follow()
        return running

    def _is_brief(self, served: Served, request: ImageRequest) -> bool:
        """Check whether a request is accepted sooner than a thread is woken up: few numbers, and nothing to encode."""
        values = request.total * math.prod(served.bundle.manifest.sample_shape)
        own_size = request.height is None and request.width is None
        return own_size and request.image is None and not served.prompts.free and 0 < values <= _FEW_VALUES

    def _accept(self, served: Served, running: Running, watch: bool) -> None:
        """Encode prompts, choose a level and submit all parts; mostly on a thread, as it may take a while."""
        request = running.request
        size = self._check(served, request)
        served.batcher.check_room(request.total)
        parts = self._parts(served, running, *size)
        self.check_ready()
        if self._left(running) <= 0:
            limit = self._limit(request)
            raise DeadlineExceeded(
                f"the request was not prepared within its time limit of {limit:g} s. Allow more time."
            )
        try:
            running.level = self._admit(served, running, parts)
            for part in parts:
                on_step = running.on_step if watch else None
                running.add(served.batcher.submit(_at(part, running.level), on_step=on_step))
        except BatcherStopped as error:
            raise NotReady("the engines have stopped. Send the request to another server.") from error
        except SessionError as error:
            if isinstance(error, QueueFull):
                raise
            raise RequestError(str(error)) from error  # checked by the session, before anything was queued

    def _ended(self, running: Running, done: asyncio.Future[ImageAnswer]) -> None:
        """Forget a request that has ended, and count it."""
        self.running.discard(running)
        model = running.model
        match done.exception():
            case None:
                answer = done.result()
                self.metrics.finished(
                    model,
                    level=answer.level.name,
                    images=len(answer.images),
                    degraded=answer.degraded,
                    non_finite_steps=answer.non_finite_steps,
                    waited=answer.waited,
                    took=answer.took,
                )
            case RequestCancelled():
                self.metrics.ended(model, Outcome.CANCELLED)
            case DeadlineExceeded():
                self.metrics.ended(model, Outcome.DEADLINE)
            case _:
                self.metrics.ended(model, Outcome.FAILED)

    async def sample(self, request: ImageRequest) -> ImageAnswer:
        """Submit a request and wait for its images; raises as `submit` and `Running.result` do."""
        return await (await self.submit(request)).result()

    async def encode(self, images: Array, form: Format = Format.PNG, *, quality: int | None = None) -> list[bytes]:
        """Encode images as `images.encode` does: on a thread, unless they are so small that waking it takes longer."""
        if images.size <= _FEW_VALUES:
            return encode(images, form, quality=quality)
        return await self.in_thread(encode, images, form, quality=quality)

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work, such as encoding images, on a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    async def _scrape(self) -> bytes:
        return self.metrics.to_text()

    def drain(self) -> None:
        """Take no more requests; accepted ones go on."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    @property
    def unfinished(self) -> int:
        """Number of accepted requests and calls that are not finished."""
        return len(self.running) + len(self.calls)

    def give_up(self, error: UnetcError) -> int:
        """Fail all accepted requests and calls that are not finished, and count them."""
        requests = [running for running in self.running if not running.done]
        for running in requests:
            running.give_up(error)
        return len(requests) + self.calls.give_up(error)

    def fail(self, error: BaseException) -> None:
        """Take no more requests, as the engines cannot go on."""
        self.failure = self.failure or error
        self.state = State.FAILED

    def crashed(self) -> BaseException | None:
        """Return the error that ended the thread of a batcher; None if all of them run."""
        for served in self.models.values():
            if served.loaded and (error := served.batcher.crashed) is not None:
                return error
        return None

    def close(self) -> None:
        """End the threads; requests that still run fail."""
        for served in self.models.values():
            if served.loaded:
                served.batcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _limit(self, request: ImageRequest) -> float:
        """Return the time limit of a request in seconds."""
        return min(request.seconds or math.inf, self.settings.deadline)

    def _left(self, running: Running) -> float:
        """Return the seconds that are left of the time limit of a request."""
        return running.submitted + self._limit(running.request) - time.monotonic()

    def _parts(self, served: Served, running: Running, height: int, width: int) -> list[SampleRequest]:
        """Turn a checked request into requests to the batcher, one per seed; may take a while."""
        request = running.request
        wanted = Wanted(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            label=request.label,
            guidance_scale=request.guidance_scale,
            indices=request.indices,
            size=(height, width),
        )
        try:
            conditions = served.prompts.read(wanted)
        except RequestError as error:
            raise RequestError(str(error), request.names.get(error.field or "", error.field)) from error
        start = served.to_samples(request, height, width, self.settings.pixels)
        seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
        own = (height, width) == served.size
        common: dict[str, Any] = {
            "steps": request.steps,
            "height": None if own else height,
            "width": None if own else width,
            "strength": 1.0 if start is None else (_STRENGTH if request.strength is None else request.strength),
            "seconds": self._limit(request),
            "since": running.submitted,
        }
        if not request.seeds:
            image = None if start is None else np.broadcast_to(start, (request.count, *start.shape[1:]))
            part = SampleRequest(
                seed=seed,
                count=request.count,
                first_index=request.first_index,
                conditions=conditions,
                image=image,
                **common,
            )
            return [part]
        group = object()
        return [
            SampleRequest(
                seed=one,
                conditions=None if conditions is None else conditions.take([k]),
                image=None if start is None else start[k % len(start) :][:1],
                group=group,
                **common,
            )
            for k, one in enumerate(request.seeds)
        ]

    def _check(self, served: Served, request: ImageRequest) -> tuple[int, int]:
        """Refuse wrong fields, and return height and width in pixels."""
        limits = self.settings
        if not 1 <= request.total <= limits.images:
            raise request.problem("count", f"{{}} is {request.total}. Expected 1 to {limits.images} images.")
        if request.total > limits.queue:
            raise request.problem(
                "count", f"{{}} is {request.total}, but the queue holds {limits.queue} images. Send smaller requests."
            )
        for seed in (*request.seeds, request.seed or 0, request.first_index):
            if not 0 <= seed <= LARGEST_SEED:
                raise request.problem("seed", f"{{}} is {seed}. Expected a whole number from 0 to {LARGEST_SEED}.")
        if request.steps is not None and request.steps not in served.steps:
            listed = ", ".join(map(str, served.steps))
            raise request.problem("steps", f"{{}} is {request.steps}. This model has tables for {listed} steps.")
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            if text is not None and _HALF.search(text):
                raise request.problem(name, "{} has half of a surrogate pair, which is no text. Expected Unicode.")
            if text is not None and len(text) > limits.prompt_characters:
                raise request.problem(
                    name, f"{{}} has {len(text)} characters. Expected at most {limits.prompt_characters}."
                )
        if request.image is not None and EXTRA_CHANNELS in served.bundle.calls.names:
            raise request.problem(
                "image",
                "{}: this model takes an image with every prompt, and the bundle holds those that it was built with. "
                "Omit it, or use unetc.diffusers in the model's pipeline.",
            )
        scale = request.guidance_scale
        if scale is not None and not 0 <= scale <= LARGEST_SCALE:
            raise request.problem("guidance_scale", f"{{}} is {scale}. Expected 0 to {LARGEST_SCALE:g}.")
        if request.strength is not None and request.image is None:
            raise request.problem("strength", "{} needs an image to start from.")
        if request.strength is not None and not 0 < request.strength <= 1:
            raise request.problem("strength", f"{{}} is {request.strength}. Expected above 0, at most 1.")
        if request.seconds is not None and not request.seconds > 0:
            raise request.problem("seconds", f"{{}} is {request.seconds}. Expected a positive number.")
        return self._check_size(served, request)

    def _check_size(self, served: Served, request: ImageRequest) -> tuple[int, int]:
        usual = served.size
        if isinstance(request.image, np.ndarray) and request.image.ndim == 4:  # samples have a size already
            usual = request.image.shape[2] * served.scale, request.image.shape[3] * served.scale
        height, width = (
            own if given is None else given for own, given in zip(usual, (request.height, request.width), strict=True)
        )
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % served.scale:
                raise request.problem(name, f"{{}} of {side} is not a positive multiple of {served.scale}.")
        if problem := served.problem_of_size(height, width, self.settings.pixels):
            raise request.problem("height" if height > width else "width", f"{{}}: {problem}")
        if max(height, width) > request.form.longest_side:
            raise request.problem(
                "form",
                f"{{}}: {request.form.value} holds no images of {width} x {height}. Expected at most "
                f"{request.form.longest_side} pixels per side, or png.",
            )
        sizes = served.bundle.manifest.sample_sizes
        if problem := sizes.problem(height // served.scale, width // served.scale):
            raise request.problem("height", f"{{}}: {problem}")
        return height, width

    def _admit(self, served: Served, running: Running, parts: list[SampleRequest]) -> Level:
        """Choose the level that serves a request.

        Raises:
            QueueFull: If no level that may serve it would be in time.
        """
        request, asked = running.request, running.asked.name
        deadline = self._left(running)
        whole = parts[0] if len(parts) == 1 else _together(parts)
        allowed = steps_down(tuple(served.levels), asked, self._floor(served, request))
        estimates = {level: served.batcher.estimate(_at(whole, served.levels[level])) for level in allowed}
        target = math.inf if self.settings.target_p95 is None else self.settings.target_p95
        crowded = len(allowed) > 1 and served.batcher.waiting > CROWD * self.settings.queue
        choice = choose_level(estimates, target=target, deadline=deadline, crowded=crowded)
        if not choice.in_time:
            raise QueueFull(
                f"the request would take about {choice.seconds:.1f} s, and {max(0.0, deadline):.1f} s are left of its "
                f"limit of {self._limit(request):g} s. Try again later, or allow more time.",
                choice.seconds - deadline,
            )
        return served.levels[choice.level]

    def _asked(self, served: Served, request: ImageRequest) -> Level:
        """Return the level that a request asks for: by default the bundle's, or a better one that it wants at least."""
        if request.quality != AUTO:
            asked = _level(served, request, "quality", request.quality)
            if (
                request.least_quality is not None
                and _slower(asked.name, least := _level_name(served, request)) != asked.name
            ):
                raise request.problem(
                    "quality",
                    f"{{}} of {asked.name} is faster than {request.names.get('least_quality', 'least_quality')} of "
                    f"{least} allows. Send one of them, or a slower quality.",
                )
            return asked
        if request.least_quality is None:
            return served.default
        return served.levels[_slower(served.default.name, _level_name(served, request))]

    def _floor(self, served: Served, request: ImageRequest) -> str | None:
        """Return the fastest level that may serve a request, which the bundle need not have; None forbids others."""
        least = None if request.least_quality is None else _level_name(served, request)
        may = request.degrade
        if may is None:
            may = request.quality == AUTO or least is not None
        if not may or self.settings.degrade_to is None:
            return None
        return _slower(self.settings.degrade_to, least)


def _outcome_of(error: Exception) -> Outcome:
    """Tell how a request has ended that was not accepted."""
    match error:
        case QueueFull() | NotReady():
            return Outcome.REFUSED
        case DeadlineExceeded():
            return Outcome.DEADLINE
        case _:
            return Outcome.FAILED if problem_of(error).status >= 500 else Outcome.INVALID


async def _at_once(_: str) -> None:
    """Wait for no job, where there are none."""


def _level(served: Served, request: ImageRequest, field: str, text: str) -> Level:
    """Look up a level that a field of a request names."""
    try:
        return served.levels[find_level(tuple(served.levels), text, automatic=field == "quality")]
    except SessionError as error:
        raise request.problem(field, f"{{}}: {error}") from error


def _level_name(served: Served, request: ImageRequest) -> str:
    """Look up the least level that a request wants."""
    return _level(served, request, "least_quality", request.least_quality or FULL).name


def _slower(one: str, other: str | None) -> str:
    """Return the level that saves less."""
    return one if other is None else min(one, other, key=saving_of)


def _at(request: SampleRequest, level: Level) -> SampleRequest:
    return replace(request, level=level.name)


def _together(parts: list[SampleRequest]) -> SampleRequest:
    """Return a request as large as all parts, to estimate them."""
    return replace(parts[0], count=len(parts))  # with the guidance and the strength that all parts share
