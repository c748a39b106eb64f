"""Jobs: requests whose clients come back for the images. A job outlives the connection that made it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from unetc.errors import QueueFull, RequestError, UnetcError

from .bodies import ImageBody
from .door import Door, EventStream, event
from .errors import Problem, RequestCancelled, UnknownJob, problem_of
from .images import Format
from .openai import error_body
from .service import ImageAnswer, Running, Service

logger = logging.getLogger(__name__)

_POSITION_EVERY_S = 0.5
"""Seconds between two looks at the position of a job that waits."""


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A request and, once it is finished, its images."""

    running: Running
    form: Format
    """File format of the images."""
    compression: int | None
    """Quality of JPEG and WebP in per cent; None for their default."""
    id: str
    """Hard to guess: it is all that a client needs to read the job."""
    created: float = field(default_factory=time.time)
    finished: float | None = None
    answer: ImageAnswer | None = None
    """How its images were made, without the images."""
    files: tuple[bytes, ...] = ()
    """The images, encoded."""
    shown: bytes = b""
    """The first image as PNG, if the files have another format."""
    problem: Problem | None = None
    task: asyncio.Task[None] | None = None
    """Waits for the images."""
    fetched: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a client has seen that it is finished."""

    @property
    def state(self) -> JobState:
        """Where the job is now."""
        if self.problem is not None:
            return JobState.CANCELLED if self.problem.code == "cancelled" else JobState.FAILED
        if self.answer is not None:
            return JobState.SUCCEEDED
        return JobState.QUEUED if self.running.position else JobState.RUNNING

    @property
    def size(self) -> int:
        """Bytes of its images."""
        return sum(map(len, self.files)) + len(self.shown)

    def progress(self) -> dict[str, object]:
        """Describe how far it is."""
        steps = self.running.progress
        return {
            "state": self.state.value,
            "position": self.running.position if self.finished is None else None,
            "step": 0 if steps is None else steps.done,
            "steps": None if steps is None else steps.steps,
            "phase": None if steps is None else steps.phase,
            "engine": None if steps is None else steps.engine,
        }

    def to_builtins(self) -> dict[str, object]:
        """Describe the job; images are at the addresses in the result."""
        result = None
        if self.answer is not None:
            files = [f"/v1/jobs/{self.id}/images/{k}" for k in range(len(self.files))]
            result = {"images": files, "output_format": self.form.value, **self.answer.to_builtins()}
        return {
            "id": self.id,
            "object": "job",
            "model": self.running.model,
            "level": self.running.level.name,
            "created": self.created,
            "finished": self.finished,
            **self.progress(),
            "result": result,
            "error": None if self.problem is None else error_body(self.problem)["error"],
        }


class Jobs:
    """All jobs that are kept: unfinished ones, and finished ones for some minutes. For the thread of the event loop."""

    def __init__(self, service: Service) -> None:
        """Begin without jobs."""
        self._service = service
        self._jobs: dict[str, Job] = {}
        self._submitted: list[int] = []
        """Bytes of each body whose request is not accepted yet; a job keeps no body."""

    async def add(self, body: ImageBody) -> Job:
        """Submit a job.

        Raises:
            QueueFull: If too many jobs are unfinished, or images in bodies take too much memory.
            UnetcError: If the request cannot be submitted.
        """
        size = len(body.image or "")
        with self._service.counting_refusals(body.model):
            self._check_room(size)
            wanted = body.to_request()
        self._submitted.append(size)
        try:
            running = await self._service.submit(wanted, watch=True)
        finally:
            self._submitted.remove(size)
        # only now, as a refused request must cost nobody's images
        while len(self._jobs) >= self._service.settings.jobs:
            del self._jobs[self._finished()[0].id]
        name = self._service.job_prefix + secrets.token_hex(16)
        job = Job(id=name, running=running, form=body.form, compression=body.output_compression)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._finish(job))
        return job

    def _check_room(self, size: int) -> None:
        """Refuse a job for which there is no room; `size` counts the bytes of its image."""
        self._forget()
        limits = self._service.settings
        unfinished = len(self._submitted) + sum(job.finished is None for job in self._jobs.values())
        if unfinished >= limits.jobs:
            raise QueueFull(f"{unfinished} jobs are unfinished. Try again later.", 1.0)
        if self._submitted and sum(self._submitted) + size > limits.job_bytes:
            raise QueueFull(
                f"the images of {len(self._submitted)} jobs wait to be read, and with this one they exceed "
                f"{limits.job_bytes} bytes. Try again later.",
                1.0,
            )

    def find(self, name: str) -> Job:
        """Look up a job.

        Raises:
            UnknownJob: If there is none, or it is no longer kept.
        """
        self._forget()
        if name not in self._jobs:
            raise UnknownJob(f"there is no job {name[:64]!r}. Finished jobs are kept for some minutes.")
        return self._jobs[name]

    def remove(self, job: Job) -> None:
        """Cancel a job, or forget a finished one."""
        if job.finished is None:
            job.running.cancel()
            job.problem = problem_of(RequestCancelled("the job was cancelled."))
            job.finished = time.time()
        else:
            self._jobs.pop(job.id, None)
        job.fetched.set()

    def unfetched(self) -> int:
        """Count the jobs whose clients can be expected to come for the images, when the server is about to end."""
        lately = time.time() - self._service.settings.drain
        return sum(not job.fetched.is_set() and (job.finished or math.inf) > lately for job in self._jobs.values())

    async def settled(self, name: str) -> None:
        """Wait until a job is finished, and its client has come for the images or is no longer expected."""
        job = self._jobs.get(name)
        if job is None or job.task is None:
            return
        await asyncio.wait({job.task})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.fetched.wait(), self._service.settings.drain)

    async def _finish(self, job: Job) -> None:
        """Wait for a job and keep its images."""
        try:
            answer = await job.running.result()
            files = await self._service.encode(answer.images, job.form, quality=job.compression)
            shown = [b""] if job.form is Format.PNG else await self._service.encode(answer.images[:1])
        except Exception as error:
            job.problem = job.problem or problem_of(error)
            if not isinstance(error, UnetcError):
                logger.exception("job %s failed", job.id)
        else:
            if job.problem is None:  # or it was cancelled while its images were encoded
                job.answer = replace(answer, images=answer.images[:0].copy())
                job.files, job.shown = tuple(files), shown[0]
        job.running.release()
        job.finished = job.finished or time.time()
        self._forget()

    def _finished(self) -> list[Job]:
        """List the finished jobs, those that can be spared first: fetched ones, then in the order of their end."""
        finished = [job for job in self._jobs.values() if job.finished is not None]
        return sorted(finished, key=lambda job: (not job.fetched.is_set(), job.finished))

    def _forget(self) -> None:
        """Drop finished jobs that are too old, and others while their images take too much memory.

        The job that has finished last stays in any case: its client could not have come for the images yet.
        """
        limits, now, finished = self._service.settings, time.time(), self._finished()
        size = sum(job.size for job in finished)
        last = max(finished, key=lambda job: job.finished or now, default=None)
        for job in finished:
            old = now - (job.finished or now) > limits.job_seconds
            if old or (size > limits.job_bytes and job.files and job is not last):
                size -= job.size
                del self._jobs[job.id]


def make_router(service: Service) -> APIRouter:
    """Make the routes of `/v1/jobs`."""
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
    jobs = Jobs(service)
    service.unfetched, service.settled = jobs.unfetched, jobs.settled

    @router.post("")
    async def submit(body: ImageBody) -> Response:
        """Submit a job; its address is in `Location`."""
        job = await jobs.add(body)
        return JSONResponse(job.to_builtins(), 202, headers={"Location": f"/v1/jobs/{job.id}"})

    @router.get("/{name}")
    async def state(name: str) -> Response:
        """Describe a job: its state, its position in the queue, its progress and its result."""
        job = jobs.find(name)
        if job.finished is not None and not job.files:
            job.fetched.set()
        return JSONResponse(job.to_builtins())

    @router.delete("/{name}")
    async def cancel(name: str) -> Response:
        """Cancel a job, or forget a finished one."""
        job = jobs.find(name)
        jobs.remove(job)
        return JSONResponse(job.to_builtins())

    @router.get("/{name}/preview")
    async def preview(name: str) -> Response:
        """Show the first image as it is now."""
        job = jobs.find(name)
        file = await job.running.picture(service.encode)
        if file is None and job.files:
            file = job.shown or job.files[0]
        if file is None:
            raise UnknownJob(f"job {job.id} has no preview before its first step, or after a failure.")
        return Response(file, media_type=Format.PNG.media_type, headers={"Cache-Control": "no-store"})

    @router.get("/{name}/images/{index}")
    async def image(name: str, index: int) -> Response:
        """Send an image of a finished job."""
        job = jobs.find(name)
        if not 0 <= index < len(job.files):
            raise RequestError(f"job {job.id} has {len(job.files)} images. Expected an index below that.", "index")
        if index == len(job.files) - 1:
            job.fetched.set()
        return Response(job.files[index], media_type=job.form.media_type)

    @router.get("/{name}/events")
    async def events(name: str) -> Response:
        """Follow a job: `progress` when its position or its step changes, then `done`."""
        return EventStream(_events(jobs.find(name)), lambda: None)

    return router


async def _events(job: Job) -> AsyncIterator[bytes]:
    last: dict[str, object] = {}
    while job.finished is None:
        waited: set[asyncio.Future[None]] = {job.running.change} | ({job.task} if job.task else set())
        now = job.progress()
        if now != last:
            last = now
            yield event("progress", now)
        await asyncio.wait(waited, timeout=_POSITION_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
    yield event("done", job.to_builtins())
    if not job.files:
        job.fetched.set()


DOOR = Door(prefixes=("/v1/jobs",), router=make_router, error=error_body)
