"""The service behind all doors: opened bundles, admission, choice of a level, and requests that run.

A door turns the body of its API into an `ImageRequest`, awaits `Service.submit`, and gets a `Running`:

    running = await service.submit(ImageRequest(prompt="a three", count=2))
    answer = await running.result()      # an ImageAnswer; cancelling the task cancels the request

Every problem is an error of `unetc.server.errors`, or a `UnetcError` that `problem_of` maps to a status. The engines
run on the thread of the batcher. asyncio never waits for it: blocking work goes through `Service.in_thread`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from unetc.artifacts.profile import Damage
from unetc.device import Array
from unetc.errors import BatcherStopped, DeadlineExceeded, QueueFull, SessionError, ShapeMismatch, UnetcError
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.batching.ladder import AUTO, choose_level, find_level, saving_of, steps_down
from unetc.runtime.batching.request import FULL, SampleRequest, SampleResult, Ticket
from unetc.runtime.batching.request import Progress as Steps
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session, backend_for

from . import images as pictures
from .errors import NotReady, RequestCancelled, RequestError, UnknownModel
from .metrics import Metrics, Outcome
from .prompts import PromptReader, Wanted
from .settings import ServerSettings

if TYPE_CHECKING:
    from unetc.runtime.batching.batcher import Batcher

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of served models, which stand in addresses."""
_LARGEST_SEED = 2**63 - 1
_DRAWN_SEEDS = 2**32
"""Seeds that are drawn for requests without one: short enough to type."""
_LARGEST_SCALE = 100.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """Images that a client asks for, whatever the API. Every field has a default."""

    model: str | None = None
    """Name of a served model; None if only one is served."""
    prompt: str | None = None
    """Prompt of all images; None for the bundle's own prompts in turn. A bundle without text encoders takes only its
    own prompts, by text or as #index."""
    negative_prompt: str | None = None
    label: int | None = None
    """Class of all images, for class-conditional models."""
    guidance_scale: float | None = None
    count: int = 1
    """Number of images of one seed."""
    seed: int | None = None
    """Seed of the noise; drawn if None."""
    first_index: int = 0
    """Index of the first image within the seed."""
    seeds: tuple[int, ...] = ()
    """One image per seed, in place of `count`, `seed` and `first_index`."""
    steps: int | None = None
    """Number of steps; the bundle's default if None."""
    height: int | None = None
    """Height in pixels; the model's own if None."""
    width: int | None = None
    """Width in pixels; the model's own if None."""
    quality: str = AUTO
    """Name of a level, or `auto`."""
    degrade: bool | None = None
    """Whether the server may step down under load; if None, only with quality `auto` or with a least quality."""
    least_quality: str | None = None
    """The fastest level to which it may step down; None for the server's own limit."""
    image: bytes | Array | None = None
    """Image to start from: the bytes of a file, or samples [1 or count, channel, height, width]."""
    strength: float | None = None
    """Share of the steps that are made when starting from an image, in (0, 1]; 0.8 if None."""
    seconds: float | None = None
    """Time limit in seconds; the server's if None."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of these fields in the client's API, where they differ; messages use them."""

    def problem(self, name: str, message: str) -> RequestError:
        """Make the error for a wrong field; `{}` in the message stands for its name in the client's API."""
        shown = self.names.get(name, name)
        return RequestError(message.replace("{}", shown, 1), shown)

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.seeds) or self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A quality level of a served model."""

    name: str
    time_ratio: float
    """Time of the schedule / time of the full model, as the build measured it; 1 for the full model."""
    damage: Damage | None
    """Damage that the build measured; None for the full model, which has none."""

    @property
    def relative_l2(self) -> float:
        """Mean norm of the difference to the full model / norm of its output, dimensionless."""
        return 0.0 if self.damage is None else self.damage.relative_l2.mean

    @property
    def psnr(self) -> float | None:
        """Mean peak signal-to-noise ratio in dB; None for the full model."""
        return None if self.damage is None else self.damage.psnr.mean

    def to_builtins(self) -> dict[str, object]:
        """Describe the level for answers of APIs."""
        damage = None if self.damage is None else {"relative_l2": self.relative_l2, "psnr": self.psnr}
        return {"level": self.name, "time_ratio": self.time_ratio, "damage": damage}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAnswer:
    """Finished images of a request."""

    model: str
    images: Array
    """[image, channel, height, width], mostly between -1 and 1."""
    seeds: tuple[int, ...]
    """Seed of each image."""
    indices: tuple[int, ...]
    """Index of each image within its seed."""
    level: Level
    """The level that made them."""
    degraded: bool
    """Whether the server stepped down from the level that was asked for."""
    steps: int
    """Engine calls per image."""
    non_finite_steps: int
    """Steps that the full model repeated."""
    waited: float
    """Seconds between submission and the first step."""
    took: float
    """Seconds between submission and the last image."""
    notes: tuple[str, ...] = ()
    """Warnings for the user, such as the words of a prompt that were cut."""

    def to_builtins(self) -> dict[str, object]:
        """Describe how the images were made, for answers of APIs; without the images."""
        return {
            "model": self.model,
            **self.level.to_builtins(),
            "degraded": self.degraded,
            "seeds": list(self.seeds),
            "indices": list(self.indices),
            "steps": self.steps,
            "non_finite_steps": self.non_finite_steps,
            "queue_seconds": self.waited,
            "seconds": self.took,
            "notes": list(self.notes),
        }


class Running:
    """An accepted request. Its methods are for the thread of the event loop."""

    def __init__(self, served: Served, request: ImageRequest, level: Level, *, degraded: bool) -> None:
        """Begin without tickets; `Service.submit` adds them."""
        self.served = served
        self.request = request
        self.level = level
        self.degraded = degraded
        self.began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._tickets: list[Ticket] = []
        self._answer: asyncio.Future[ImageAnswer] = self._loop.create_future()
        self._answer.add_done_callback(lambda done: done.exception())  # or asyncio complains if nobody asks
        self._change: asyncio.Future[None] = self._loop.create_future()
        self._notified = threading.Event()

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
        """Give up with another reason."""
        for ticket in self._tickets:
            ticket.cancel()
        if not self._answer.done():
            self._answer.set_exception(error)
            self._notify()

    @property
    def position(self) -> int | None:
        """Requests that are served before this one; 0 while it runs, None when it is finished."""
        positions = [place for ticket in self._tickets if (place := ticket.position()) is not None]
        return max(positions, default=None)

    @property
    def progress(self) -> Steps | None:
        """Progress of its slowest images; None before their first step."""
        reports = [ticket.progress for ticket in self._tickets]
        return min((one for one in reports if one), key=lambda one: one.done) if all(reports) and reports else None

    def preview(self) -> Array | None:
        """Decode the samples as they are now, [image, channel, height, width]; None before all have begun, and after.

        It waits for the step that is running, so call it through `Service.in_thread`.
        """
        try:
            previews = [preview.result() for preview in [ticket.preview() for ticket in self._tickets]]
        except BatcherStopped:
            return None
        found = [one for one in previews if one is not None]
        return np.concatenate(found) if found and len(found) == len(previews) else None

    @property
    def change(self) -> asyncio.Future[None]:
        """Future of the next step or the end; take it before reading the state, and do not cancel it."""
        return self._change

    async def states(self) -> AsyncIterator[Steps | None]:
        """Yield the progress now and after steps, until the request is finished.

        Steps between two reads are skipped: a slow reader gets the latest. Needs `watch=True` at submission.
        """
        while True:
            change = self._change
            yield self.progress
            if self.done:
                return
            await asyncio.wait({change})  # unlike `await change`, leaves it to other readers when this one is cancelled

    def on_step(self, _: Steps) -> None:
        """Wake readers up; called on the thread of the engines."""
        if not self._notified.is_set():  # one wake-up at a time, however slow the event loop is
            self._notified.set()
            _call(self._loop, self._notify)

    def _notify(self) -> None:
        self._notified.clear()
        change, self._change = self._change, self._loop.create_future()
        if not change.done():
            change.set_result(None)

    def add(self, ticket: Ticket) -> None:
        """Add a part of the request."""
        self._tickets.append(ticket)

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
            self._answer.set_exception(error or RequestCancelled("the request was cancelled."))
            self.cancel()  # the other parts
            self._notify()
        elif all(one.done() for one in futures):
            self._answer.set_result(self._answered([one.result() for one in futures]))
            self._notify()

    def _answered(self, results: list[SampleResult]) -> ImageAnswer:
        made = [
            (ticket.request.seed, ticket.request.first_index + k)
            for ticket in self._tickets
            for k in range(ticket.request.count)
        ]
        return ImageAnswer(
            model=self.served.name,
            images=np.concatenate([result.images for result in results]),
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

    def when_done(self, call: Callable[[asyncio.Future[ImageAnswer]], object]) -> None:
        """Call a function on the event loop when the request is finished; it gets the future of the answer."""
        self._answer.add_done_callback(call)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call a function on an event loop; do nothing if it has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


class Served:
    """One opened bundle: its levels, its batcher and its prompts."""

    def __init__(self, name: str, bundle: Bundle) -> None:
        """Describe a bundle; `load` loads its engines."""
        self.name = name
        self.bundle = bundle
        self.levels: dict[str, Level] = {FULL: Level(name=FULL, time_ratio=1.0, damage=None)}
        for level in bundle.manifest.levels:
            measured = level.measured
            self.levels[level.name] = Level(name=level.name, time_ratio=measured.time_ratio, damage=measured.damage)
        """By name, the full model first."""
        self.sessions: Mapping[str, Session] = {}
        """One per level, over shared engines; empty until they are loaded. The batcher drives their device."""
        self.prompts = PromptReader(bundle, None)
        self._batcher: Batcher | None = None

    @property
    def batcher(self) -> Batcher:
        """The thread that drives the engines.

        Raises:
            NotReady: If they are not loaded yet.
        """
        if self._batcher is None:
            raise NotReady("the engines are being loaded. Try again in a few seconds.")
        return self._batcher

    @property
    def loaded(self) -> bool:
        """Whether the engines are loaded."""
        return self._batcher is not None

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps that can be sampled, increasing."""
        return self.bundle.scheduler.counts

    @property
    def scale(self) -> int:
        """Image pixels per sample pixel, along each side."""
        decoder = self.bundle.manifest.decoder
        return 1 if decoder is None else decoder.scale

    @property
    def size(self) -> tuple[int, int]:
        """The model's own height and width in pixels."""
        _, height, width = self.bundle.manifest.sample_shape
        return height * self.scale, width * self.scale

    def load(self, settings: ServerSettings, metrics: Metrics, on_progress: OnProgress = ignore) -> None:
        """Load the engines, start their thread and make a call of each.

        Raises:
            UnetcError: If an engine cannot be loaded, or fails.
        """
        from unetc.runtime.batching.batcher import Batcher, BatchLimits
        from unetc.runtime.batching.levels import open_levels

        manifest = self.bundle.manifest
        backend = backend_for(manifest, target=settings.target, threads=settings.threads, memory=settings.memory)
        on_progress(Progress(stage=f"loading {self.name}", done=0, total=2))
        self.sessions = open_levels(self.bundle, backend)
        batcher = Batcher(
            self.sessions,
            limits=BatchLimits(queue=settings.queue),
            on_call=lambda call: metrics.call(self.name, call),
        )
        self._batcher = batcher
        on_progress(Progress(stage=f"loading {self.name}", done=1, total=2))
        batcher.warm_up().result()
        metrics.show_load(self.name, lambda: batcher.load().waiting, lambda: batcher.load().running)
        on_progress(Progress(stage=f"loading {self.name}", done=2, total=2))

    def to_samples(self, request: ImageRequest, height: int, width: int, most_pixels: int) -> Array | None:
        """Turn the image of a request into samples to start from, [1, channel, height, width].

        Raises:
            RequestError: If the image cannot be read, or the bundle cannot encode images.
        """
        if request.image is None or isinstance(request.image, np.ndarray):
            return request.image
        channels = self.bundle.manifest.sample_shape[0]
        if self.bundle.manifest.decoder is not None or channels not in (1, 3):
            raise request.problem("image", "this bundle has no encoder for images, so {} cannot be used. Omit it.")
        name = request.names.get("image", "image")
        return pictures.to_samples(
            pictures.decode(request.image, name, most_pixels=most_pixels), channels, height, width
        )


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
        """Accepted requests that are not finished."""
        self.unfetched: Callable[[], int] = lambda: 0
        """Counts the jobs whose results wait for their clients; the jobs API replaces it."""
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
            name = source.name or _short(bundle.manifest.model.name)
            if not _NAME.fullmatch(name):
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
        """
        try:
            running = await self._submitted(request, watch=watch)
        except (RequestError, UnknownModel):
            self.metrics.ended(self._known(request.model), Outcome.INVALID)
            raise
        except (QueueFull, NotReady):
            self.metrics.ended(self._known(request.model), Outcome.REFUSED)
            raise
        self.running.add(running)
        running.when_done(lambda answer: self._ended(running, answer))
        return running

    def _known(self, model: str | None) -> str:
        """Return a model's name as a label of metrics, which no client can make up."""
        return model if model in self.models else "-"

    async def _submitted(self, request: ImageRequest, *, watch: bool) -> Running:
        self.check_ready()
        served = self.find(request.model, field=request.names.get("model", "model"))
        parts = await self.in_thread(self._parts, served, request)
        self.check_ready()
        level, degraded = self._admit(served, request, parts)
        running = Running(served, request, served.levels[level], degraded=degraded)
        try:
            for part in parts:
                running.add(
                    served.batcher.submit(_at(part, level), on_step=running.on_step if watch else None),
                )
        except BaseException as error:
            running.cancel()
            if isinstance(error, BatcherStopped):
                raise NotReady("the engines have stopped. Send the request to another server.") from error
            if isinstance(error, ShapeMismatch) or type(error) is SessionError:
                raise RequestError(str(error)) from error
            raise
        running.follow()
        return running

    def _ended(self, running: Running, done: asyncio.Future[ImageAnswer]) -> None:
        """Forget a request that has ended, and count it."""
        self.running.discard(running)
        model = running.served.name
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

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work, such as encoding images, on a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    def drain(self) -> None:
        """Take no more requests; accepted ones go on."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

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

    def _parts(self, served: Served, request: ImageRequest) -> list[SampleRequest]:
        """Turn a request into requests to the batcher, one per seed; may take a while."""
        height, width = self._check(served, request)
        wanted = Wanted(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            label=request.label,
            guidance_scale=request.guidance_scale,
            count=request.total,
            first_index=request.first_index,
            size=(height, width),
        )
        try:
            conditions = served.prompts.read(wanted)
        except RequestError as error:
            raise RequestError(str(error), request.names.get(error.field or "", error.field)) from error
        start = served.to_samples(request, height, width, self.settings.pixels)
        seed = secrets.randbelow(_DRAWN_SEEDS) if request.seed is None else request.seed
        own = (height, width) == served.size
        common: dict[str, Any] = {
            "steps": request.steps,
            "height": None if own else height,
            "width": None if own else width,
            "strength": 1.0 if start is None else (0.8 if request.strength is None else request.strength),
            "seconds": min(request.seconds or math.inf, self.settings.deadline),
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
        return [
            SampleRequest(
                seed=one,
                conditions=None if conditions is None else conditions.take([k]),
                image=None if start is None else start[k % len(start) :][:1],
                **common,
            )
            for k, one in enumerate(request.seeds)
        ]

    def _check(self, served: Served, request: ImageRequest) -> tuple[int, int]:
        """Refuse wrong fields, and return height and width in pixels."""
        limits = self.settings
        if not 1 <= request.total <= limits.images:
            raise request.problem("count", f"{{}} is {request.total}. Expected 1 to {limits.images} images.")
        for seed in (*request.seeds, request.seed or 0, request.first_index):
            if not 0 <= seed <= _LARGEST_SEED:
                raise request.problem("seed", f"{{}} is {seed}. Expected a whole number from 0 to {_LARGEST_SEED}.")
        if request.steps is not None and request.steps not in served.steps:
            listed = ", ".join(map(str, served.steps))
            raise request.problem("steps", f"{{}} is {request.steps}. This model has tables for {listed} steps.")
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            if text is not None and len(text) > limits.prompt_characters:
                raise request.problem(
                    name, f"{{}} has {len(text)} characters. Expected at most {limits.prompt_characters}."
                )
        scale = request.guidance_scale
        if scale is not None and not 0 <= scale <= _LARGEST_SCALE:
            raise request.problem("guidance_scale", f"{{}} is {scale}. Expected 0 to {_LARGEST_SCALE:g}.")
        if request.strength is not None and request.image is None:
            raise request.problem("strength", "{} needs an image to start from.")
        if request.strength is not None and not 0 < request.strength <= 1:
            raise request.problem("strength", f"{{}} is {request.strength}. Expected above 0, at most 1.")
        if request.seconds is not None and not request.seconds > 0:
            raise request.problem("seconds", f"{{}} is {request.seconds}. Expected a positive number.")
        return self._check_size(served, request)

    def _check_size(self, served: Served, request: ImageRequest) -> tuple[int, int]:
        height, width = (
            own if given is None else given
            for own, given in zip(served.size, (request.height, request.width), strict=True)
        )
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % served.scale:
                raise request.problem(name, f"{{}} of {side} is not a positive multiple of {served.scale}.")
        if height * width > self.settings.pixels:
            raise request.problem(
                "height", f"{{}}: images of {width} x {height} exceed the limit of {self.settings.pixels} pixels."
            )
        sizes = served.bundle.manifest.sample_sizes
        if problem := sizes.problem(height // served.scale, width // served.scale):
            raise request.problem("height", f"{{}}: {problem}")
        return height, width

    def _admit(self, served: Served, request: ImageRequest, parts: list[SampleRequest]) -> tuple[str, bool]:
        """Choose a level, and whether that is a step down; refuse what could not be finished in time."""
        start, floor = self._range(served, request)
        deadline = min(request.seconds or math.inf, self.settings.deadline)
        whole = parts[0] if len(parts) == 1 else _together(parts)
        estimates = {
            level: served.batcher.estimate(_at(whole, level))
            for level in steps_down(tuple(served.levels), start, floor)
        }
        target = math.inf if self.settings.target_p95 is None else self.settings.target_p95
        choice = choose_level(estimates, target=target, deadline=deadline)
        if not choice.in_time:
            raise QueueFull(
                f"the request would take about {choice.seconds:.1f} s, above its limit of {deadline:g} s. Try again "
                "later, or allow more time.",
                choice.seconds - deadline,
            )
        return choice.level, choice.level != start

    def _range(self, served: Served, request: ImageRequest) -> tuple[str, str | None]:
        """Return the level that a request asks for, and the fastest one that may serve it; None forbids others."""

        def read(name: str, text: str) -> str:
            try:
                return find_level(tuple(served.levels), text)
            except SessionError as error:
                raise request.problem(name, f"{{}}: {error}") from error

        start = FULL if request.quality == AUTO else read("quality", request.quality)
        least = None if request.least_quality is None else read("least_quality", request.least_quality)
        may = request.degrade
        if may is None:
            may = request.quality == AUTO or least is not None
        if not may or self.settings.degrade_to is None:
            return start, None
        return start, _slower(self.settings.degrade_to, least)


def _slower(one: str, other: str | None) -> str:
    """Return the level that saves less."""
    return one if other is None else min(one, other, key=saving_of)


def _at(request: SampleRequest, level: str) -> SampleRequest:
    return replace(request, level=level)


def _together(parts: list[SampleRequest]) -> SampleRequest:
    """Return a request as large as all parts, to estimate them."""
    return replace(parts[0], count=len(parts), conditions=None, image=None)


def _short(name: str) -> str:
    """Shorten a model's name, which may be a path or a Hub id, so that answers reveal no folders."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(name).name).strip("-._") or "model"
