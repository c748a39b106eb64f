"""Replicas on a real local Ray, with real clients: overload, a killed replica, an update, and all that one keeps."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from ray_processes import REPLICA, processes

from tests.command import run_alone
from tests.server.live import Live, serving, until
from unetc.errors import SessionError
from unetc.server.metrics import Metrics, Outcome, Together
from unetc.server.process import Ending
from unetc.server.settings import ReplicaRange

pytest.importorskip("ray")

TWO = "--ray", "local", "--replicas", "2", "--threads", "1", "--deadline", "9999"
LONG = {"num_inference_steps": 1000, "seed": 1}
IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def pair_of_replicas(tiny_bundle: Path) -> Iterator[Live]:
    """Serve a bundle as `plain` from two replicas, with a queue of 8 images each."""
    with serving(f"plain={tiny_bundle}", *TWO, "--queue", "8", "--max-images", "8") as live:
        yield live


def retried(ask: Callable[[], httpx2.Response], tries: int = 60) -> tuple[httpx2.Response, list[int]]:
    """Ask again, as clients do, after 429, an error of the server, or a broken connection; list the troubles."""
    troubles: list[int] = []
    for _ in range(tries):
        try:
            answer = ask()
        except httpx2.TransportError:
            troubles.append(0)
        else:
            if answer.status_code != 429 and answer.status_code < 500:
                return answer, troubles
            troubles.append(answer.status_code)
        time.sleep(0.2)
    raise AssertionError(f"no answer after {troubles}")


def of_replicas(live: Live, name: str) -> dict[str, float]:
    """Read a metric of the model of every replica."""
    found = {}
    for line in live.get("/metrics").text.splitlines():
        if line.startswith(f"{name}{{"):
            labels, value = line.removeprefix(f"{name}{{").rsplit("} ", 1)
            found[labels.partition('replica="')[2].partition('"')[0]] = float(value)
    return found


@pytest.mark.nightly
def test_two_replicas_are_one_server(tiny_bundle: Path) -> None:
    """Any of them is asked about a job, and none that has one ends before its images are fetched."""
    with serving(f"plain={tiny_bundle}", *TWO) as live:
        assert live.get("/health/ready").status_code == 200
        assert live.get("/").text.startswith("<!DOCTYPE html>")
        one, two = (live.post(IMAGES, {"seed": 3}) for _ in range(2))
        assert one.json()["data"] == two.json()["data"]
        assert len(one.headers.get_list("X-Request-Id")) == 1
        jobs = [live.post("/v1/jobs", LONG | {"seed": seed}).headers["Location"] for seed in range(4)]
        assert {live.get(job).status_code for job in jobs * 3} == {200}
        assert sorted(of_replicas(live, "unetc_ready").values()) == [1, 1]
        assert live.get("/v1/jobs/none").json()["error"]["code"] == "job_not_found"
        live.terminate()
        until(lambda: live.get("/health/ready").status_code == 503)
        assert live.post(IMAGES, {"seed": 1}).json()["error"]["code"] == "not_ready"
        for job in jobs:
            until(lambda: live.get(job).json()["state"] == "succeeded")  # noqa: B023
            assert live.get(f"{job}/images/0").status_code == 200
        code, errors = live.wait()
        assert code == 0
        assert errors.splitlines()[-1] == "accepted requests are finished; the server has ended."


@pytest.mark.nightly
def test_streams_pass_the_proxy_as_they_come(pair_of_replicas: Live) -> None:
    body = LONG | {"stream": True, "partial_images": 3}
    times = []
    with httpx2.stream("POST", f"{pair_of_replicas.address}{IMAGES}", json=body, timeout=60) as answer:
        times = [time.monotonic() for line in answer.iter_lines() if line.startswith("event:")]
    assert len(times) == 4
    assert times[-1] - times[0] > 3 * (times[-1] - times[-2]) / 2, "they do not come all at once"
    job = pair_of_replicas.post("/v1/jobs", LONG).headers["Location"]
    with httpx2.stream("GET", f"{pair_of_replicas.address}{job}/events", timeout=60) as answer:
        events = [line for line in answer.iter_lines() if line.startswith("event:")]
    assert events[-1] == "event: done"
    assert len(events) > 2


@pytest.mark.nightly
def test_a_client_that_goes_away_frees_its_place_behind_the_proxy(pair_of_replicas: Live) -> None:
    host, port = pair_of_replicas.host.split(":")

    def unfinished() -> float:
        counts = (of_replicas(pair_of_replicas, f"unetc_{state}_images") for state in ("running", "queued"))
        return sum(sum(count.values()) for count in counts)

    for stream in ("false", "true"):
        body = f'{{"n": 8, "num_inference_steps": 1000, "stream": {stream}, "partial_images": 1}}'
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                f"POST {IMAGES} HTTP/1.1\r\nHost: {pair_of_replicas.host}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            until(lambda: unfinished() == 8)
        until(lambda: unfinished() == 0, seconds=5)


@pytest.mark.nightly
def test_large_bodies_pass_the_proxy_up_to_the_limit(pair_of_replicas: Live) -> None:
    for size, status, code in ((12, 400, "invalid_value"), (17, 413, "body_too_large")):
        image = base64.b64encode(os.urandom(size * 2**20 * 3 // 4)).decode()
        answer = pair_of_replicas.post(IMAGES, {"image": image, "strength": 0.5})
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code


@pytest.mark.nightly
def test_clients_of_a1111_find_what_runs(pair_of_replicas: Live) -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads:
        body = {"steps": 1000, "batch_size": 2, "seed": 1}
        made = threads.submit(pair_of_replicas.post, "/sdapi/v1/txt2img", body)
        until(lambda: pair_of_replicas.get("/sdapi/v1/progress").json()["progress"] > 0)
        pair_of_replicas.post("/sdapi/v1/interrupt")
        assert len(made.result().json()["images"]) == 2


@pytest.mark.nightly
def test_beyond_the_queues_requests_get_429_and_none_is_lost(pair_of_replicas: Live) -> None:
    """Ray queues nothing and refuses nothing: every refusal is ours, and says when to come again."""
    address = f"{pair_of_replicas.address}{IMAGES}"
    rush = 2 * 80  # the seats and the queues of both replicas hold 80 images

    def ask(seed: int, steps: int = 50) -> httpx2.Response:
        return httpx2.post(address, json={"seed": seed, "num_inference_steps": steps}, timeout=120)

    with concurrent.futures.ThreadPoolExecutor(rush) as threads:
        answers = list(threads.map(lambda seed: ask(seed, 1000), range(rush)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert {answer.status_code for answer in refused} == {429}
        assert all(1 <= int(answer.headers["Retry-After"]) <= 10 for answer in refused)
        assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
        again = list(threads.map(lambda seed: retried(lambda: ask(seed), 600)[0], range(rush)))
    assert {answer.status_code for answer in again} == {200}


class Load:
    """Clients that ask again and again, until the end of the block, and retry; all of them must be served."""

    def __init__(self, live: Live, clients: int = 4) -> None:
        """Prepare the clients."""
        self._live = live
        self._clients = clients
        self._over = threading.Event()
        self._seeds = itertools.count()
        self.answered = 0
        self.troubles: list[int] = []
        """Statuses of answers after which a client had to ask again; 0 for broken connections."""

    def _ask(self) -> None:
        while not self._over.is_set():
            body = {"seed": next(self._seeds), "num_inference_steps": 50}
            answer, troubles = retried(lambda: self._live.post(IMAGES, body))  # noqa: B023
            assert answer.status_code == 200, answer.text
            self.answered += 1
            self.troubles += troubles

    def __enter__(self) -> Load:
        """Start them."""
        self._threads = concurrent.futures.ThreadPoolExecutor(self._clients)
        self._futures = [self._threads.submit(self._ask) for _ in range(self._clients)]
        until(lambda: self.answered >= self._clients)
        return self

    def __exit__(self, *_: object) -> None:
        """End them, and check that none has failed."""
        answered = self.answered
        with contextlib.suppress(AssertionError):
            until(lambda: self.answered >= answered + self._clients)
        self._over.set()
        for future in self._futures:
            future.result()


@pytest.mark.nightly
def test_a_killed_replica_costs_a_retry_and_is_replaced(tiny_bundle: Path) -> None:
    with serving(f"plain={tiny_bundle}", *TWO) as live:
        before = processes(REPLICA, of=live.process.pid)
        assert len(before) == 2
        jobs = [live.post("/v1/jobs", LONG | {"seed": seed}).headers["Location"] for seed in range(6)]
        with Load(live) as load:
            os.kill(before[0], signal.SIGKILL)
            until(
                lambda: (
                    len(of_replicas(live, "unetc_ready")) == 2
                    and before[0] not in processes(REPLICA, of=live.process.pid)
                )
            )
        assert set(load.troubles) <= {0, 500, 503}
        assert len(load.troubles) <= 4, "no client met it twice"
        kept = [live.get(job).status_code for job in jobs]
        assert set(kept) == {200, 404}, "jobs of the killed replica are gone, and the others are not"


@contextlib.contextmanager
def cluster(cores: int) -> Iterator[str]:
    """Start a Ray that outlives commands, and return its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += [f"--num-cpus={cores}", "--include-dashboard=false"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        assert any("Ray runtime started" in line for line in process.stdout)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.nightly
def test_an_update_loses_nothing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second command takes the place of the first, whose replicas finish all that they have accepted."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with cluster(2) as address, contextlib.ExitStack() as servers:
        options = ("--ray", address, *TWO[2:], "--drain", "120")
        old = servers.enter_context(serving(f"plain={tiny_bundle}", *options))
        jobs = [old.post("/v1/jobs", LONG | {"seed": seed}).headers["Location"] for seed in range(4)]

        def follow(job: str) -> int:
            until(lambda: old.get(job).json()["state"] == "succeeded", seconds=120)
            return old.get(f"{job}/images/0").status_code

        with concurrent.futures.ThreadPoolExecutor() as threads, Load(old, clients=2) as load:
            followed = threads.map(follow, jobs)
            new = servers.enter_context(serving(f"plain={tiny_bundle}", *options, "--queue", "32"))
            assert new.address == old.address
            code, errors = old.wait()
            assert code == 0, errors
            assert list(followed) == [200] * len(jobs)
        assert load.troubles == []


@pytest.mark.nightly
def test_a_command_that_waits_for_room_says_so_and_leaves_nothing(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with cluster(1) as address:
        command = [sys.executable, "-m", "unetc", "serve", tiny_bundle, "--ray", address, "--threads", "2", "--port"]
        with subprocess.Popen([*map(str, command), "0"], stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None
            note = "no machine of the cluster has 2 CPUs for a replica; waiting for one."
            assert any(note in line for line in waiting.stderr)
            until(lambda: applications(address) == ["unetc"])
            waiting.terminate()
            assert "interrupted" in waiting.stderr.read()
            assert waiting.wait() == 128 + signal.SIGTERM
        assert applications(address) == []


def applications(address: str) -> list[str]:
    """List the applications of a cluster."""
    code = f"""
import json, ray
from ray import serve
ray.init({address!r}, log_to_driver=False, logging_level="ERROR")
print(json.dumps([*serve.status().applications]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


class Replicas:
    """Two replicas as the command sees them, with prepared answers: real ones are not too busy when a test wants it."""

    def __init__(self, unfinished: list[list[int | Exception] | Exception]) -> None:
        self.unfinished, self.questions = unfinished, list[str]()

    def broadcast(self, question: str) -> Replicas:
        self.questions.append(question)
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[int | Exception]:
        answers = self.unfinished.pop(0)
        if isinstance(answers, Exception):
            raise answers
        return answers


@pytest.mark.parametrize("silence", [TimeoutError(), [0, TimeoutError()]])
def test_a_silent_replica_is_not_taken_for_a_finished_one(
    monkeypatch: pytest.MonkeyPatch, silence: list[int | Exception] | Exception
) -> None:
    from unetc.server.cluster import _until_the_end

    deleted: list[str] = []
    monkeypatch.setattr("ray.serve.delete", deleted.append)
    replicas, signals = Replicas([silence, [0, 3], [0, 0]]), threading.Semaphore(1)
    ending = _until_the_end(cast(Any, replicas), "owner", signals, drain=30)
    assert replicas.questions == ["drain"] * 3
    assert ending == Ending(given_up=0, threads_left=False)
    assert len(deleted) == 1


def test_what_replicas_give_up_is_counted_without_the_silent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from unetc.server.cluster import _until_the_end

    monkeypatch.setattr("ray.serve.delete", lambda name: None)
    replicas, signals = Replicas([[2, 3], [2, TimeoutError()]]), threading.Semaphore(2)
    assert _until_the_end(cast(Any, replicas), "owner", signals, drain=30).given_up == 2


def test_ranges_of_replicas() -> None:
    assert ReplicaRange.parse("3") == ReplicaRange(least=3, most=3)
    assert ReplicaRange.parse("1:4") == ReplicaRange(least=1, most=4)
    for wrong in ("0", "2:1", "1:", ":2", "many", "-1", "1:2:3"):
        with pytest.raises(SessionError, match="Expected a number as 2, or a range as 1:4"):
            ReplicaRange.parse(wrong)


def test_metrics_of_processes_keep_their_values() -> None:
    processes = {name: Metrics() for name in ("one", "two")}
    processes["one"].ended("plain", Outcome.OK)
    text = Together({name: metrics.families() for name, metrics in processes.items()}).to_text().decode()
    assert 'unetc_requests_total{model="plain",outcome="ok",replica="one"} 1.0' in text
    assert text.count("# TYPE unetc_ready gauge") == 1
    assert text.count("unetc_ready{") == 2


def test_what_cannot_be_served_on_ray_is_refused_in_one_line(tiny_bundle: Path) -> None:
    for arguments, code, problem in (
        (("--replicas", "2"), 2, "--replicas needs --ray"),
        (("--ray", "local", "--replicas", "none"), 1, "cannot run 'none' replicas"),
        (("--ray", "local", "--degrade-to", "low"), 1, "'low' is not a quality level"),
    ):
        refused = run_alone("serve", tiny_bundle, *arguments, "--port", "0")
        assert refused.code == code
        assert problem in refused.err
        assert "Traceback" not in refused.err


@pytest.mark.nightly
def test_what_a_cluster_cannot_do_is_refused_in_one_line(tiny_bundle: Path) -> None:
    for arguments, problem in (
        (("--ray", "local", "--threads", "1024"), "replicas of 1024 CPUs need 1024, but this machine has"),
        (("--ray", "127.0.0.1:1"), "cannot reach Ray at '127.0.0.1:1'"),
    ):
        refused = run_alone("serve", tiny_bundle, *arguments, "--port", "0")
        assert refused.code == 1
        assert problem in refused.err.splitlines()[-1]


def test_the_extra_of_ray_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('no ray', name='ray')")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    refused = run_alone("serve", tiny_bundle, "--ray", "local", PYTHONPATH=path)
    assert refused.error == "unetc: this needs ray: pip install 'unetc[ray]'\n"


def test_arguments_of_a_configuration_file(tiny_bundle: Path) -> None:
    from unetc.server.replicas import build

    build({"bundles": [f"plain={tiny_bundle}"], "replicas": "1:2", "queue": 8})
    for wrong, problem in (
        ({}, "there is nothing to serve"),
        ({"bundles": [str(tiny_bundle)], "size": 1}, "unexpected keyword argument 'size'"),
    ):
        with pytest.raises(SessionError, match=problem):
            build(wrong)
