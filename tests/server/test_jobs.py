"""Jobs, on a real server."""

from __future__ import annotations

import io
import json
import threading
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from tests.server.live import Live, until
from tests.server.test_openai import pixels

LONG = {"model": "plain", "num_inference_steps": 500}


def picture(data: bytes) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.asarray(image, np.int16)


def submit(live: Live, **body: object) -> str:
    answer = live.post("/v1/jobs", body)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert job["state"] in ("queued", "running")
    return str(answer.headers["Location"])


def finished(live: Live, address: str) -> dict[str, Any]:
    until(lambda: live.get(address).json()["finished"])
    job: dict[str, Any] = live.get(address).json()
    return job


def events(live: Live, address: str) -> list[tuple[str, dict[str, Any]]]:
    found, name = [], ""
    with httpx2.stream("GET", f"{live.address}{address}/events", timeout=60) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                found.append((name, json.loads(value)))
    return found


def test_a_job_makes_the_images_of_a_request(live: Live) -> None:
    body = {"model": "plain", "seed": [3, 4], "num_inference_steps": 10, "quality": "full"}
    address = submit(live, **body)
    job = finished(live, address)
    assert job["state"] == "succeeded"
    assert job["position"] is None
    assert (job["step"], job["steps"]) == (10, 10)
    result = job["result"]
    assert result["seeds"] == [3, 4]
    assert result["level"] == "full"
    same = live.post("/v1/images/generations", body).json()["data"]
    for path, image in zip(result["images"], same, strict=True):
        answer = live.get(path)
        assert answer.headers["Content-Type"] == "image/png"
        assert np.abs(picture(answer.content) - pixels(image["b64_json"])).max() <= 1
    assert live.get(f"{address}/images/2").status_code == 400
    assert np.array_equal(
        picture(live.get(f"{address}/preview").content), picture(live.get(result["images"][0]).content)
    )


def test_events_follow_a_job_to_its_end(live: Live) -> None:
    address = submit(live, **LONG)
    *progress, (last, done) = events(live, address)
    assert len(progress) > 2
    assert {name for name, _ in progress} == {"progress"}
    steps = [data["step"] for _, data in progress]
    assert steps == sorted(steps)
    assert {data["steps"] for _, data in progress} <= {None, 500}
    assert last == "done"
    assert done["state"] == "succeeded"
    assert events(live, address)[-1] == (last, done), "a finished job can be followed too"


def test_a_running_job_shows_previews(live: Live) -> None:
    address = submit(live, **LONG, seed=1)
    until(lambda: live.get(address).json()["step"] > 0)
    early = live.get(f"{address}/preview")
    assert early.headers["Cache-Control"] == "no-store"
    assert picture(early.content).shape == (16, 16)
    assert finished(live, address)["state"] == "succeeded"


def test_a_cancelled_job_leaves_at_once(live: Live) -> None:
    address = submit(live, **LONG, n=8)
    until(lambda: live.get(address).json()["step"] > 0)
    cancelled = live.metric("unetc_requests_total", model="plain", outcome="cancelled")
    assert live.delete(address).json()["state"] == "cancelled"
    until(lambda: live.metric("unetc_running_images", model="plain") == 0, seconds=2)
    job = live.get(address).json()
    assert job["state"] == "cancelled"
    assert job["result"] is None
    assert job["error"]["code"] == "cancelled"
    assert live.metric("unetc_requests_total", model="plain", outcome="cancelled") == cancelled + 1
    assert live.get(f"{address}/preview").status_code == 404
    assert live.delete(address).status_code == 200
    assert live.get(address).status_code == 404, "a finished job is forgotten"


def test_a_job_that_waits_knows_its_position(live: Live) -> None:
    # more images than there are seats, and as many as may wait
    addresses = [submit(live, **LONG, n=16) for _ in range(4)]
    try:
        last = live.get(addresses[-1]).json()
        assert last["state"] == "queued"
        assert last["position"] >= 1
    finally:
        for address in addresses:
            live.delete(address)


def test_followers_that_go_away_leave_the_job_and_others_alone(live: Live) -> None:
    address = submit(live, **LONG)
    seen: list[tuple[str, dict[str, Any]]] = []
    follower = threading.Thread(target=lambda: seen.extend(events(live, address)))
    follower.start()
    with httpx2.stream("GET", f"{live.address}{address}/events", timeout=60) as stream:
        next(stream.iter_lines())
    follower.join(60)
    assert seen[-1][1]["state"] == "succeeded"


def test_unknown_jobs_and_wrong_bodies_are_refused(live: Live) -> None:
    for path in ("", "/preview", "/events", "/images/0"):
        answer = live.get(f"/v1/jobs/0123{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "job_not_found"
    answer = live.post("/v1/jobs", {"model": "plain", "stream": True, "n": 0})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream"
