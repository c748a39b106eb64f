"""The life of the server's process: its start, its end, and what it says when it cannot go on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command import run, run_alone
from tests.server.live import COMMAND, Live, serving, until
from tests.server.local import in_loop, local
from unetc.server.errors import NotReady

LOADING = f"""
import sys
import unetc.server.app as app, unetc.server.served as served
load, app._CLOSE_S = served.open_levels, 0.1
def load_for_ever(*arguments):
    print("it loads", file=sys.stderr, flush=True)
    while True: load(*arguments)
served.open_levels = load_for_ever
{COMMAND}
"""
LONG = {"num_inference_steps": 1000, "seed": 1}
CRASHING = f"""
import unetc.runtime.batching.batcher as batcher
def fail(_): raise RuntimeError("the device is gone")
batcher.Batcher._choose = fail
{COMMAND}
"""
WITHOUT_ROOM = f"""
import threading
start = threading.Thread.start
def start_all_but(thread):
    if thread.name in ("unetc-load", "unetc-close"):
        raise RuntimeError("can't start new thread")  # as Python says without room for a stack
    start(thread)
threading.Thread.start = start_all_but
{COMMAND}
"""


def tensor(name: str, shape: list[int]) -> dict[str, Any]:
    """Describe an input of ones."""
    return {"name": name, "datatype": "FP32", "shape": shape, "data": [1.0] * math.prod(shape)}


def unfinished(live: Live) -> float:
    """Count the images of a model that are on their way or wait; the build measures how many seats there are."""
    return sum(live.metric(f"unetc_{state}_images", model="plain") for state in ("running", "queued"))


def test_a_client_that_goes_away_frees_its_place(live: Live) -> None:
    cancelled = live.metric("unetc_requests_total", model="plain", outcome="cancelled")
    host, port = live.host.split(":")
    for stream in ("false", "true"):
        body = f'{{"model": "plain", "n": 8, "num_inference_steps": 1000, "stream": {stream}, "partial_images": 1}}'
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                f"POST /v1/images/generations HTTP/1.1\r\nHost: {live.host}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            until(lambda: unfinished(live) == 8)
        until(lambda: unfinished(live) == 0, seconds=2)
        cancelled += 1
        until(lambda: live.metric("unetc_requests_total", model="plain", outcome="cancelled") == cancelled)  # noqa: B023


def test_metrics_count_requests_steps_and_images(live: Live) -> None:
    level = live.models["plain"][1]

    def read() -> dict[str, float]:
        return {
            "ok": live.metric("unetc_requests_total", model="plain", outcome="ok"),
            "invalid": live.metric("unetc_requests_total", model="plain", outcome="invalid"),
            "images": live.metric("unetc_images_total", model="plain", level=level),
            "seconds": live.metric("unetc_request_seconds_count", model="plain"),
            "steps": sum(  # in one call or in several: the build measures the largest call of each engine
                live.metric("unetc_step_seconds_count", model="plain", phase="0", batch=str(rows)) for rows in (1, 2, 3)
            ),
            "rows": live.metric("unetc_rows_total", model="plain"),
        }

    before = read()
    live.post("/v1/images/generations", {"model": "plain", "n": 3, "quality": level, "num_inference_steps": 20})
    live.post("/v1/images/generations", {"model": "plain", "n": 0})
    grown = {name: value - before[name] for name, value in read().items()}
    assert grown.pop("steps") > 0
    assert grown.pop("rows") == 60
    assert grown == {"ok": 1, "invalid": 1, "images": 3, "seconds": 1}
    assert live.metric("unetc_ready") == 1


def test_a_server_that_ends_loses_nothing_that_it_accepted(tiny_bundle: Path) -> None:
    with serving(f"plain={tiny_bundle}") as live:
        job = live.post("/v1/jobs", LONG).headers["Location"]
        with concurrent.futures.ThreadPoolExecutor() as threads:
            accepted = threads.submit(live.post, "/v1/images/generations", LONG | {"n": 2})
            until(lambda: live.metric("unetc_running_images", model="plain") == 3)
            live.terminate()
            until(lambda: live.get("/health/ready").status_code == 503)
            assert live.get("/health/live").json() == {"status": "draining"}
            refused = live.post("/v1/images/generations", {"seed": 1})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "not_ready"
            assert accepted.result().status_code == 200
        until(lambda: live.get(job).json()["state"] == "succeeded")
        assert live.get(f"{job}/images/0").status_code == 200
        code, errors = live.wait()
        assert code == 0
        assert errors.splitlines()[-1] == "accepted requests are finished; the server has ended."


def test_the_time_to_end_is_limited(tiny_bundle: Path) -> None:
    with serving(f"plain={tiny_bundle}", "--drain", "0.2") as live:
        live.post("/v1/jobs", LONG | {"n": 16})
        live.terminate()
        code, errors = live.wait()
        assert code == 0
        assert errors.splitlines()[-1] == (
            "1 accepted request was not finished in time and given up; the server has ended."
        )


def test_a_server_ends_while_an_engine_is_loaded(tiny_bundle: Path) -> None:
    """The library under the loading thread must not abort the process."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING, "serve", str(tiny_bundle), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert any("it loads" in line for line in process.stderr)
        process.terminate()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert errors.splitlines()[-1] == "accepted requests are finished; the server has ended."
    finally:
        process.kill()


@in_loop
async def test_calls_of_the_denoiser_are_accepted_requests(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most eight wait; those that are given up get 503."""
    async with local(tiny_bundle) as (client, service):
        monkeypatch.setattr(service.models["plain"].batcher, "call", lambda _: concurrent.futures.Future())
        body = {"inputs": [tensor("sample", [1, 1, 16, 16]), tensor("timestep", [1])]}
        path = "/v2/models/plain.denoiser/infer"
        accepted = [asyncio.create_task(client.post(path, json=body)) for _ in range(8)]
        async with asyncio.timeout(20):
            while service.unfinished < 8:
                await asyncio.sleep(0.01)
        refused = await client.post(path, json=body)
        assert refused.status_code == 429
        service.drain()
        assert service.give_up(NotReady("the server ended.")) == 8
        assert {answer.status_code for answer in await asyncio.gather(*accepted)} == {503}
        assert service.unfinished == 0


def test_two_processes_serve_one_bundle(live: Live, tiny_bundle: Path) -> None:
    with serving(f"plain={tiny_bundle}") as other:
        assert other.address != live.address
        body = {"model": "plain", "seed": 3}
        one, two = (server.post("/v1/images/generations", body).json()["data"] for server in (live, other))
        assert one == two
        taken = other.host.rpartition(":")[2]
        refused = run_alone("serve", f"plain={tiny_bundle}", "--port", taken)
        assert refused.code == 1
        assert re.search(rf"cannot listen on 127\.0\.0\.1, port {taken}: Address already in use", refused.error)


def test_a_crash_of_the_engines_ends_the_process(tiny_bundle: Path) -> None:
    with serving(f"plain={tiny_bundle}", code=CRASHING) as live:
        answer = live.post("/v1/images/generations", {"seed": 1})
        assert answer.status_code in (500, 503)
        code, errors = live.wait()
        assert code == 1
        assert errors.splitlines()[-1] == "unetc: the server cannot go on: the device is gone."


def test_without_room_for_a_thread_the_server_names_the_lack_of_memory(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_ROOM, "serve", str(tiny_bundle), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(r"unetc: the memory is used up \(.*can't start new thread", line)


def test_what_cannot_be_served_is_refused_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("")
    for serve, arguments, problem in (
        (run_alone, (tmp_path,), "has no manifest.json: it is not a bundle"),
        (run, (tiny_bundle, tiny_bundle), "two bundles are called"),
        (run_alone, (tiny_bundle, "--host", "192.0.2.1"), "cannot listen on 192.0.2.1, port 0"),
        (run, (tiny_bundle, "--api-keys", keys), "has no API key"),
        (run, (tiny_bundle, "--degrade-to", "low"), "'low' is not a quality level"),
        (run, (tiny_bundle, "--target", "nothing"), "no backend for target 'nothing'"),
    ):
        refused = serve("serve", *arguments, "--port", "0")
        assert refused.code == 1
        assert problem in refused.err.splitlines()[-1]
        assert "Traceback" not in refused.err


def test_a_missing_extra_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError('no fastapi', name='fastapi')")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    refused = run_alone("serve", tiny_bundle, PYTHONPATH=path)
    assert refused.error == "unetc: this needs fastapi: pip install 'unetc[serve]'\n"
