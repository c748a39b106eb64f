"""Memory and limits of jobs, and previews that many clients ask for, within this process."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.local import in_loop, local
from unetc.device import Array
from unetc.errors import QueueFull, RequestError
from unetc.runtime.batching.request import Progress, SampleRequest, Ticket
from unetc.server.bodies import ImageBody
from unetc.server.image_request import ImageRequest, Level
from unetc.server.images import Format, encode
from unetc.server.jobs import Job, Jobs, JobState
from unetc.server.latest import Latest
from unetc.server.running import Running

PICTURE = base64.b64encode(encode(np.zeros((1, 1, 16, 16), np.float32))[0]).decode()


async def finished(job: Job) -> Job:
    assert job.task is not None
    await job.task
    return job


@in_loop
async def test_a_job_keeps_no_body(tiny_bundle: Path) -> None:
    async with local(tiny_bundle) as (_, service):
        jobs = Jobs(service)
        job = await jobs.add(ImageBody(seed=1, image=PICTURE, strength=0.5))
        assert job.running.request.image is None
        assert (await finished(job)).state is JobState.SUCCEEDED


@in_loop
async def test_a_job_that_is_cancelled_while_it_is_encoded_stays_cancelled(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local(tiny_bundle) as (_, service):
        jobs = Jobs(service)
        encoding, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(images: Array, *_: Any, **__: Any) -> list[bytes]:
            encoding.set()
            await go_on.wait()
            return encode(images)

        monkeypatch.setattr(service, "encode", slowly)
        job = await jobs.add(ImageBody(seed=1))
        await encoding.wait()
        jobs.remove(job)
        go_on.set()
        await finished(job)
        assert job.state is JobState.CANCELLED
        assert job.to_builtins()["result"] is None
        assert job.size == 0


@in_loop
async def test_a_refused_job_costs_nobody_the_images(tiny_bundle: Path) -> None:
    async with local(tiny_bundle, jobs=2) as (_, service):
        jobs = Jobs(service)
        kept = [await finished(await jobs.add(ImageBody(seed=seed))) for seed in range(2)]
        with pytest.raises(RequestError):
            await jobs.add(ImageBody(num_inference_steps=777))
        assert [jobs.find(job.id) for job in kept] == kept
        bodies = [ImageBody(seed=seed, num_inference_steps=1000, image=PICTURE, strength=1.0) for seed in range(3)]
        added = await asyncio.gather(*map(jobs.add, bodies), return_exceptions=True)
        assert [type(one) for one in added] == [Job, Job, QueueFull], "together they keep the limit"
        for job in added:
            if isinstance(job, Job):
                assert jobs.find(job.id) is job
                jobs.remove(job)


@in_loop
async def test_a_job_that_has_just_finished_stays_though_others_were_made_later(tiny_bundle: Path) -> None:
    """Fetched jobs go first, then those that finished first; jobs without images take no memory."""
    async with local(tiny_bundle) as (_, service):
        jobs = Jobs(service)
        long = await jobs.add(ImageBody(seed=1, n=2, num_inference_steps=500))
        gone = await jobs.add(ImageBody(seed=2, num_inference_steps=1000))
        jobs.remove(gone)
        short = [await finished(await jobs.add(ImageBody(seed=seed))) for seed in range(3)]
        assert long.finished is None
        assert long.size == 0
        short[1].fetched.set()
        size = sum(job.size for job in short) + short[0].size * 3 // 2  # between two jobs and three, with the long one
        service.settings = replace(service.settings, job_bytes=size)
        await finished(long)
        kept = [job for job in (long, gone, *short) if job.id in jobs._jobs]
        assert kept == [long, gone, short[0], short[2]], "the fetched one is dropped, whatever its age"
        service.settings = replace(service.settings, job_bytes=1)
        assert jobs.find(long.id) is long
        assert [job for job in short if job.id in jobs._jobs] == []
        assert jobs.find(gone.id).state is JobState.CANCELLED


@in_loop
async def test_a_finished_job_keeps_files_and_no_other_copy_of_its_images(tiny_bundle: Path) -> None:
    async with local(tiny_bundle) as (_, service):
        jobs = Jobs(service)
        for form in Format:
            job = await finished(await jobs.add(ImageBody(seed=1, n=2, output_format=form)))
            assert job.answer is not None
            assert job.answer.images.nbytes == 0
            assert len(job.files) == 2
            assert (job.shown or job.files[0]).startswith(b"\x89PNG"), "for the preview"
            assert job.size == sum(map(len, job.files)) + len(job.shown)


@in_loop
async def test_bodies_that_wait_are_limited(tiny_bundle: Path) -> None:
    async with local(tiny_bundle, job_bytes=len(PICTURE)) as (_, service):
        bodies = [ImageBody(seed=seed, image=PICTURE, strength=1.0) for seed in range(2)]
        jobs = Jobs(service)
        added = await asyncio.gather(*map(jobs.add, bodies), return_exceptions=True)
        assert [type(one) for one in added] == [Job, QueueFull]
        assert isinstance(added[0], Job)
        await finished(added[0])


@in_loop
async def test_a_request_of_parts_runs_once_one_has_begun() -> None:
    level = Level(name="full", time_ratio=1.0, damage=None)
    running = Running("plain", ImageRequest(), level)
    assert (running.position, running.share) == (None, 0.0)
    places: list[int | None] = [3, 2]
    tickets = [Ticket(request=SampleRequest(), _position=lambda k=k: places[k]) for k in range(2)]
    for ticket in tickets:
        running.add(ticket)
    assert (running.position, running.share) == (2, 0.0)
    places[:] = [0, 2]
    tickets[0].progress = Progress(done=2, steps=4, phase=None, engine=0)
    assert (running.position, running.share) == (0, 0.25), "the part that waits counts too"
    places[:] = [None, 1]
    assert running.position == 0, "a part is done"
    places[:] = [None, None]
    assert running.position is None


@in_loop
async def test_a_list_of_seeds_is_one_request_to_the_batcher(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local(tiny_bundle) as (_, service):
        batcher, seen = service.models["plain"].batcher, []
        submit = batcher.submit

        def noted(request: SampleRequest, on_step: Any = None) -> Ticket:
            seen.append(request.group)
            return submit(request, on_step)

        monkeypatch.setattr(batcher, "submit", noted)
        for request in (ImageRequest(seeds=(1, 2)), ImageRequest(seeds=(1, 2)), ImageRequest(count=2)):
            await service.sample(request)
        assert seen[0] is seen[1] is not None
        assert seen[2] is seen[3] is not None
        assert seen[0] is not seen[2]
        assert seen[4] is None


@in_loop
async def test_clients_share_one_preview() -> None:
    made = 0

    async def make() -> int:
        nonlocal made
        made += 1
        await asyncio.sleep(0.01)
        return made

    latest = Latest(make, 0.2)
    assert await asyncio.gather(*(latest.get() for _ in range(20))) == [1] * 20
    assert await latest.get() == 1, "it is kept for a moment"
    await asyncio.sleep(0.25)
    assert await latest.get() == 2
