"""Keys, limits of bodies and of the queue, deadlines and the ladder under load, within this process."""

from __future__ import annotations

import asyncio
import base64
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from tests.server.local import in_loop, local
from unetc.errors import RequestError, SessionError, UnetcError
from unetc.runtime.batching.estimates import Estimate
from unetc.runtime.batching.limits import BatchLimits
from unetc.runtime.batching.request import FULL, SampleRequest
from unetc.runtime.session import Session
from unetc.server.app import REQUEST_ID
from unetc.server.errors import UnknownModel, problem_of, seconds_to_wait
from unetc.server.image_request import ImageRequest
from unetc.server.images import Format, encode
from unetc.server.running import Running
from unetc.server.service import Service, State
from unetc.server.settings import ApiKeys, BundleSource, ServerSettings

GENERATIONS = "/v1/images/generations"
LONG = {"num_inference_steps": 1000, "seed": 1}


async def busy(service: Service, running: int = 1) -> None:
    """Wait until as many requests have been accepted, and the first of them runs."""
    async with asyncio.timeout(20):
        while len(service.running) < running or not service.models["plain"].batcher.load().running:
            await asyncio.sleep(0.005)


async def post(client: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
    return await client.post(GENERATIONS, json=body)


@in_loop
async def test_a_key_is_needed_where_there_are_some(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the page\nsecret-of-the-page\n\nsecret-of-others\n")
    async with local(tiny_bundle, api_keys=ApiKeys.read(file)) as (client, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-of-others"}):
            for path in (GENERATIONS, "/v1/models", "/metrics", "/v1/jobs/x"):
                answer = await client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
            answer = await client.get("/v1/models", headers=headers)
            assert answer.json()["error"]["type"] == "authentication_error"
            assert "secret" not in answer.text
        for key in ("secret-of-the-page", "secret-of-others"):
            answer = await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200


def test_a_file_without_good_keys_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for text, problem in (("# none\n\n", "has no API key"), ("short\n", "fewer than 8 characters")):
        file.write_text(text)
        with pytest.raises(SessionError, match=problem):
            ApiKeys.read(file)


@in_loop
async def test_a_large_body_is_refused_before_it_is_read(tiny_bundle: Path) -> None:
    async with local(tiny_bundle, body_bytes=1000) as (client, _):
        answer = await client.post(GENERATIONS, content=b"x" * 1001)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        assert (await client.post(GENERATIONS, headers={"Content-Length": "9" * 5000})).status_code == 413

        async def chunks() -> Any:
            for _ in range(20):
                yield b" " * 100

        unannounced = await client.post(GENERATIONS, content=chunks(), headers={"Content-Type": "application/json"})
        assert unannounced.status_code == 413
        assert "exceeds the limit of 1000 bytes" in unannounced.json()["error"]["message"]
        assert (await post(client, seed=1)).status_code == 200


@in_loop
async def test_images_and_prompts_are_limited(tiny_bundle: Path) -> None:
    async with local(tiny_bundle, images=2, prompt_characters=10, pixels=255) as (client, _):
        for body, problem in (
            ({"n": 3}, "Expected 1 to 2 images"),
            ({"seed": [1, 2, 3]}, "Expected 1 to 2 images"),
            ({"prompt": "x" * 11}, "prompt has 11 characters. Expected at most 10"),
            ({}, "exceed the limit of 255 pixels"),
        ):
            answer = await post(client, **body)
            assert answer.status_code == 400
            assert problem in answer.json()["error"]["message"]


@in_loop
async def test_sizes_are_limited_by_the_model(tiny_bundle: Path) -> None:
    async with local(tiny_bundle) as (client, service):
        served = service.models["plain"]
        assert served.size == (16, 16)
        for size, problem in (
            ("16416x32", "exceed the limit of 4096 pixels"),
            ("34x40000", "exceed the limit of 4096 pixels"),
            ("136x16", "exceed the limit of 128 pixels per side"),
        ):
            answer = await post(client, size=size)
            assert answer.status_code == 400
            assert problem in answer.json()["error"]["message"]
            assert "own size is 16 x 16" in answer.json()["error"]["message"]
        assert served.problem_of_size(64, 64, None) is None
        assert served.problem_of_size(64, 65, 10_000) is None
        assert (await post(client, size="32x32")).status_code == 200


@in_loop
async def test_a_quality_below_the_least_one_is_refused(tiny_bundle: Path) -> None:
    async with local(tiny_bundle) as (client, service):
        _, fast = service.models["plain"].levels
        answer = await post(client, quality=fast, min_quality="full")
        assert answer.status_code == 400
        assert f"quality of {fast} is faster than min_quality of full" in answer.json()["error"]["message"]
        assert (await post(client, quality=fast, min_quality=fast)).status_code == 200
        automatic = await post(client, min_quality="auto")
        assert f"Expected one of: full, {fast}." in automatic.json()["error"]["message"]


@in_loop
async def test_a_list_of_seeds_is_estimated_as_it_will_run(
    prompted_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local(prompted_bundle) as (client, service):
        batcher, seen = service.models["plain"].batcher, []
        estimate = batcher.estimate

        def noted(request: SampleRequest) -> Estimate:
            seen.append((request.count, request.conditions and request.conditions.rows_per_sample))
            return estimate(request)

        monkeypatch.setattr(batcher, "estimate", noted)
        assert (await post(client, seed=[1, 2, 3], guidance_scale=1.0)).status_code == 200
        assert set(seen) == {(3, 1)}


@in_loop
async def test_more_images_than_the_queue_holds_are_a_wrong_request(tiny_bundle: Path) -> None:
    async with local(tiny_bundle, queue=2) as (client, _):
        for body in ({"n": 3}, {"seed": [1, 2, 3]}):
            answer = await post(client, **body)
            assert answer.status_code == 400
            assert "the queue holds 2 images" in answer.json()["error"]["message"]


@in_loop
async def test_health_answers_to_head(tiny_bundle: Path) -> None:
    async with local(tiny_bundle) as (client, service):
        paths = [f"{start}/health/{what}" for start in ("", "/v2") for what in ("live", "ready")]
        assert [(await client.head(path)).status_code for path in paths] == [200] * 4
        service.drain()
        assert [(await client.head(path)).status_code for path in paths] == [200, 503] * 2


@in_loop
async def test_half_a_character_is_refused_and_named(tiny_bundle: Path, prompted_bundle: Path) -> None:
    async with local(prompted_bundle) as (client, _):
        half = "\\ud800"
        bodies = {GENERATIONS: ("prompt", "negative_prompt", "model", "quality", "size", "user", half)}
        bodies["/v1/jobs"] = bodies["/sdapi/v1/txt2img"] = bodies[GENERATIONS]
        for path, fields in bodies.items():
            for field in fields:
                headers = {"Content-Type": "application/json"}
                answer = await client.post(path, content=f'{{"{field}": "a{half}"}}', headers=headers)
                wanted = (200, 202) if field == "user" else (400, 404)
                assert answer.status_code in wanted or path.startswith("/sdapi"), (path, field, answer.text)
                assert answer.status_code < 500


@in_loop
async def test_requests_that_are_refused_as_their_bodies_are_read_are_counted(tiny_bundle: Path) -> None:
    """Once each, for every API, and for the only model."""
    refused: list[tuple[str, dict[str, Any]]] = [
        (GENERATIONS, {"json": {"n": "many"}}),
        (GENERATIONS, {"json": {"size": "1x1x1"}}),
        ("/v2/models/plain/infer", {"json": {"inputs": "none"}}),
        ("/v2/models/plain/infer", {"content": b"", "headers": {"Content-Encoding": "br"}}),
        (
            "/v2/models/plain/infer",
            {"json": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}},
        ),
        ("/sdapi/v1/txt2img", {"content": b"{"}),
        ("/sdapi/v1/img2img", {"json": {"init_images": ["?"]}}),
        ("/sdapi/v1/txt2img", {"json": {"steps": "many"}}),
        ("/v1/jobs", {"json": {"n": "many"}}),
    ]
    async with local(tiny_bundle) as (client, _):
        for number, (path, sent) in enumerate(refused, start=1):
            answer = await client.post(path, **sent)
            assert answer.status_code == 400, (path, answer.text)
            counted = f'unetc_requests_total{{model="plain",outcome="invalid"}} {number}.0'
            assert counted in (await client.get("/metrics")).text, path


@in_loop
async def test_a_failure_of_the_server_is_counted_and_named(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with local(tiny_bundle) as (client, service):
        monkeypatch.setattr(service.models["plain"], "to_samples", None)
        client._transport.raise_app_exceptions = False
        named = await client.post(GENERATIONS, json={"model": "plain"}, headers={REQUEST_ID: "a-name"})
        assert (named.status_code, named.headers.get(REQUEST_ID)) == (500, "a-name")
        assert f"{GENERATIONS} failed, request a-name" in caplog.text
        assert 'unetc_requests_total{model="plain",outcome="failed"} 1.0' in (await client.get("/metrics")).text


@pytest.mark.parametrize(
    ("said", "code"), [("torch failed: CUDA out of memory", "out_of_memory"), ("torch failed", "sampling_failed")]
)
@in_loop
async def test_a_failure_of_the_encoder_is_a_failure_of_the_server(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: str
) -> None:
    def fail(_: Any) -> None:
        raise SessionError(said)

    image = base64.b64encode(encode(np.zeros((1, 1, 16, 16), np.float32))[0]).decode()
    async with local(tiny_bundle) as (client, service):
        monkeypatch.setattr(service.models["plain"].sessions[FULL], "encode", fail)
        answer = await post(client, image=image)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, code)


@in_loop
async def test_images_that_cannot_be_joined_are_a_failure_of_the_server(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("Unable to allocate 7 GiB")

    monkeypatch.setattr(Running, "_answered", fail)
    async with local(tiny_bundle) as (client, _):
        client._transport.raise_app_exceptions = False
        async with asyncio.timeout(20):
            answer = await post(client, seed=1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "out_of_memory")


@in_loop
async def test_the_images_of_one_seed_are_not_copied(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, made = Session.finish, []

    def kept(*arguments: Any, **options: Any) -> Any:
        made.append(finish(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(Session, "finish", kept)
    async with local(tiny_bundle) as (_, service):
        answer = await service.sample(ImageRequest(count=2))
        assert answer.images is made[-1]
        assert len((await service.sample(ImageRequest(seeds=(1, 2)))).images) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SessionError("onnxruntime failed: bad allocation"), "out_of_memory"),
        (SessionError("onnxruntime failed: no such operation"), "sampling_failed"),
        (UnknownModel("there is no model 'out of memory'."), "model_not_found"),
        (RequestError("prompt is 'out of memory'."), "invalid_value"),
    ],
)
def test_a_lack_of_memory_is_told_from_other_failures(error: UnetcError, code: str) -> None:
    assert problem_of(error).code == code


@in_loop
async def test_a_format_that_cannot_hold_the_image_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Format, "longest_side", 15)
    async with local(tiny_bundle) as (client, _):
        answer = await post(client, output_format="webp")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "output_format"
        assert "at most 15 pixels per side" in answer.json()["error"]["message"]


@in_loop
async def test_a_full_queue_refuses_with_a_time_to_wait(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with local(tiny_bundle, queue=16, images=16) as (client, service):
        monkeypatch.setattr(service.models["plain"].batcher, "_limits", BatchLimits(seats=1, queue=16))
        accepted = asyncio.create_task(post(client, **LONG, n=16))
        await busy(service)
        refused = await post(client, **LONG, n=16)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["Retry-After"]) <= 10
        for running in tuple(service.running):
            running.cancel()
        assert (await accepted).status_code == 499


@in_loop
async def test_a_request_that_cannot_be_in_time_is_refused(tiny_bundle: Path) -> None:
    async with local(tiny_bundle) as (client, _):
        refused = await post(client, **LONG, timeout=0.2)
        assert refused.status_code == 429
        assert "are left of its limit of 0.2 s" in refused.json()["error"]["message"]


@in_loop
async def test_a_late_request_is_given_up(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with local(tiny_bundle) as (client, service):
        batcher = service.models["plain"].batcher
        monkeypatch.setattr(batcher._estimates, "finished", lambda *_: 0.0)
        late = await post(client, **LONG, timeout=0.1)
        assert late.status_code == 504
        assert late.headers["x-should-retry"] == "false"
        assert late.json()["error"]["code"] == "deadline_exceeded"


@in_loop
async def test_the_time_limit_counts_the_preparation_of_a_request(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local(tiny_bundle) as (client, service):
        served = service.models["plain"]
        monkeypatch.setattr(served, "to_samples", lambda *_: time.sleep(0.3))
        late = await post(client, seed=1, timeout=0.2)
        assert late.status_code == 504
        assert "was not prepared within its time limit of 0.2 s" in late.json()["error"]["message"]
        assert served.batcher.load().waiting + served.batcher.load().running == 0
        assert 'outcome="deadline"} 1.0' in (await client.get("/metrics")).text


@in_loop
async def test_a_full_queue_refuses_before_a_request_is_prepared(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders would hold up the images that are on their way."""
    async with local(tiny_bundle, queue=16, images=16) as (client, service):
        served = service.models["plain"]
        monkeypatch.setattr(served.batcher, "_limits", BatchLimits(seats=1, queue=16))
        accepted = asyncio.create_task(post(client, **LONG, n=16))
        await busy(service)
        monkeypatch.setattr(served, "to_samples", None)
        refused = await post(client, **LONG, n=16)
        assert refused.status_code == 429
        wrong = await post(client, n=16, num_inference_steps=777)
        assert wrong.status_code == 400, "a wrong field is named all the same"
        for running in tuple(service.running):
            running.cancel()
        assert (await accepted).status_code == 499


@in_loop
async def test_the_server_steps_down_under_load_as_far_as_it_may(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local(tiny_bundle, degrade_to="99%", target_p95=1.0) as (client, service):
        served = service.models["plain"]
        full, fast = served.levels
        seconds = {full: 0.5, fast: 0.2}
        monkeypatch.setattr(
            served.batcher, "estimate", lambda request: Estimate(seconds[request.level], seconds[request.level])
        )

        async def made(**body: Any) -> tuple[str, bool]:
            facts = (await post(client, seed=1, **body)).json()["unetc"]
            return facts["level"], facts["degraded"]

        assert await made() == (fast, False), "the bundle's default level"
        assert await made(quality="full", degrade=True) == (full, False)
        seconds |= {full: 1.5, fast: 0.7}
        assert await made(quality="auto") == (fast, False)
        assert await made(quality="full") == (full, False), "a level that is named is kept"
        assert await made(quality="full", degrade=True) == (fast, True)
        assert await made(quality="full", min_quality=fast) == (fast, True)
        assert await made(min_quality="full") == (full, False)
        assert await made(quality=fast) == (fast, False)
        seconds |= {full: 15.0, fast: 9.0}
        assert await made(quality="full", degrade=True) == (fast, True), "no request is refused for the target"
        refused = await post(client, seed=1, timeout=5.0)
        assert refused.status_code == 429
        metrics = (await client.get("/metrics")).text
        assert f'unetc_degraded_requests_total{{level="{fast}",model="plain"}} 3.0' in metrics


@pytest.mark.parametrize(("waiting", "degraded"), [(8, False), (12, True)])
@in_loop
async def test_the_server_steps_down_before_its_queue_is_full(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, waiting: int, degraded: bool
) -> None:
    async with local(tiny_bundle, degrade_to="99%", queue=16, images=16) as (client, service):
        served = service.models["plain"]
        monkeypatch.setattr(served.batcher, "_limits", BatchLimits(seats=1, queue=16))
        full, fast = served.levels
        seconds = {full: 0.5, fast: 0.2}
        monkeypatch.setattr(
            served.batcher, "estimate", lambda request: Estimate(seconds[request.level], seconds[request.level])
        )
        accepted = [asyncio.create_task(post(client, **LONG, n=1 + waiting, quality=full))]
        await busy(service)
        accepted.append(asyncio.create_task(post(client, seed=2, quality=full, degrade=True)))
        await busy(service, running=2)
        assert {running.level.name for running in service.running} == ({full, fast} if degraded else {full})
        for running in tuple(service.running):
            running.cancel()
        await asyncio.gather(*accepted)


@in_loop
async def test_without_leave_the_server_never_steps_down(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with local(tiny_bundle) as (client, service):
        served = service.models["plain"]
        slow, quick = Estimate(250.0, 250.0), Estimate(0.1, 0.1)
        monkeypatch.setattr(served.batcher, "estimate", lambda request: slow if request.level == "full" else quick)
        answer = await post(client, seed=1, quality="full", degrade=True)
        assert answer.json()["unetc"]["level"] == "full"


@in_loop
async def test_a_draining_service_finishes_what_it_accepted(tiny_bundle: Path) -> None:
    async with local(tiny_bundle) as (client, service):
        accepted = asyncio.create_task(post(client, seed=1, num_inference_steps=100))
        await busy(service)
        service.drain()
        ready, live = await client.get("/health/ready"), await client.get("/health/live")
        assert (ready.status_code, live.status_code) == (503, 200)
        refused = await post(client, seed=1)
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        assert (await accepted).status_code == 200
        assert 'outcome="refused"} 1.0' in (await client.get("/metrics")).text


@in_loop
async def test_finished_jobs_are_kept_within_limits(tiny_bundle: Path) -> None:
    async with local(tiny_bundle, jobs=3, job_bytes=5000) as (client, _):
        paths = []
        for seed in range(5):
            answer = await client.post("/v1/jobs", json={"seed": seed})
            paths.append(answer.headers["Location"])
            while not (await client.get(paths[-1])).json()["finished"]:
                await asyncio.sleep(0.01)
        codes = [(await client.get(path)).status_code for path in paths]
        assert codes == [404, 404, 200, 200, 200]
    async with local(tiny_bundle, job_bytes=1) as (client, _):
        for seed in range(2):
            path = (await client.post("/v1/jobs", json={"seed": seed})).headers["Location"]
            while not (await client.get(path)).json()["finished"]:
                await asyncio.sleep(0.01)
        assert (await client.get(path)).status_code == 200, "the last one is kept in any case"
    async with local(tiny_bundle, jobs=1) as (client, _):
        long = (await client.post("/v1/jobs", json=LONG)).headers["Location"]
        refused = await client.post("/v1/jobs", json=LONG)
        assert refused.status_code == 429
        await client.delete(long)


def test_bundles_are_named(tiny_bundle: Path) -> None:
    def names(*texts: str) -> list[str]:
        service = Service.open(ServerSettings(bundles=tuple(map(BundleSource.parse, texts))))
        assert service.state is State.LOADING
        return list(service.models)

    assert names(str(tiny_bundle), f"b={tiny_bundle}") == ["tiny-model", "b"]
    for texts, problem in (
        ((str(tiny_bundle), str(tiny_bundle)), "two bundles are called tiny-model"),
        ((f"a b={tiny_bundle}",), "cannot name a model"),
        ((f"={tiny_bundle}",), "Expected the folder of a bundle, or name=folder"),
        ((), "nothing to serve"),
    ):
        with pytest.raises(SessionError, match=problem):
            names(*texts)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [({"target_p95": 1.0}, "add --degrade-to"), ({"degrade_to": "low"}, "'low' is not a quality level")],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(SessionError, match=problem):
        ServerSettings(bundles=(BundleSource(path=Path("x")),), **fields)


@pytest.mark.parametrize(
    ("estimate", "header"), [(0.0, 1), (-3.0, 1), (1.2, 2), (9.5, 10), (600.0, 10), (float("inf"), 10)]
)
def test_a_client_waits_a_few_seconds(estimate: float, header: int) -> None:
    assert seconds_to_wait(estimate) == header
