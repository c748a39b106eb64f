"""A server with more requests than it can answer serves those that it accepts in time, and refuses the rest at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.server.live import Live, serving

FULL_SECONDS, SHORT_SECONDS = 600.0, 1.5
SATURATION_SHARE = 0.2
"""Seconds at saturation / seconds of overload."""
QUEUE = 16
"""Most images that wait."""
ASKED = {"n": 4, "num_inference_steps": 100, "quality": "full"}
"""Fields of a request: answers cost much more than questions, as the clients share a core with the server."""
BURST = 16
"""Requests that are sent at once, several times as many as the queue and the seats hold."""
ODD = 4
"""Slow clients, and clients that go away, at any time."""
LATENCY = "95th percentile of the seconds of accepted requests / at saturation"
REFUSAL = "95th percentile of the milliseconds until a refusal"
SLOWEST = "most milliseconds until a refusal"
LAST_LINE = "accepted requests are finished; the server has ended."


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, or the lack of one."""

    status: int
    """0 if the connection broke."""
    sent: float
    """Moment in seconds."""
    seconds: float
    problem: str = ""
    """Why the answer is not as it must be."""


async def exchange(live: Live, request: bytes, pause: float = 0.0) -> tuple[int, dict[str, str], bytes]:
    """Send a request on a new connection, and read the answer; a pause follows every part of either."""
    host, port = live.host.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        size = 64 if pause else len(request)
        for start in range(0, len(request), size):
            writer.write(request[start : start + size])
            await writer.drain()
            await asyncio.sleep(pause)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        await asyncio.sleep(pause)
        return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))
    finally:
        writer.close()


def post(live: Live, path: str, body: dict[str, Any]) -> bytes:
    """Write a POST request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {live.host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@dataclass
class Senders:
    """Clients of one server."""

    live: Live
    dice: random.Random
    seeds: Iterator[int] = field(default_factory=itertools.count)

    @property
    def body(self) -> dict[str, Any]:
        """Body of the next request."""
        return {"seed": next(self.seeds), **ASKED}

    async def ask(self, pause: float = 0.0) -> Answer:
        """Ask for an image."""
        sent = time.monotonic()
        try:
            status, headers, content = await exchange(
                self.live, post(self.live, "/v1/images/generations", self.body), pause
            )
        except (OSError, asyncio.IncompleteReadError) as error:
            return Answer(0, sent, time.monotonic() - sent, f"the connection broke: {type(error).__name__}")
        seconds = time.monotonic() - sent
        try:
            body = json.loads(content)
        except ValueError:
            return Answer(status, sent, seconds, f"{status}: {content[:200]!r}")
        wrong = {
            200: lambda: [bool(image["b64_json"]) for image in body["data"]] != [True] * ASKED["n"],
            429: lambda: not 1 <= int(headers.get("retry-after", 0)) <= 10 or body["error"]["code"] != "queue_full",
            503: lambda: "takes no more requests" not in body["error"]["message"],  # it was never accepted
        }
        problem = "" if status in wrong and not wrong[status]() else f"{status}: {content[:200]!r}"
        return Answer(status, sent, seconds, problem)

    async def closed(self, clients: int, seconds: float) -> list[Answer]:
        """Let clients ask again and again; none is refused."""
        end = time.monotonic() + seconds

        async def client() -> list[Answer]:
            answers = []
            while not answers or time.monotonic() < end:
                answers.append(await self.ask())
            return answers

        return [one for some in await asyncio.gather(*(client() for _ in range(clients))) for one in some]

    async def open(self, rate: float, seconds: float, burst: int = 0) -> list[Answer]:
        """Send requests at Poisson times that wait for no answer, after a burst."""
        tasks = [asyncio.create_task(self.ask()) for _ in range(burst)]
        at = end = time.monotonic()
        end += seconds
        while (at := at + self.dice.expovariate(rate)) < end:
            await asyncio.sleep(at - time.monotonic())
            tasks.append(asyncio.create_task(self.ask()))
        return list(await asyncio.gather(*tasks))

    async def vanish(self) -> None:
        """Send a part of a request, or all of it, and go away."""
        host, port = self.live.host.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        request = post(self.live, "/v1/images/generations", self.body)
        writer.write(request[: self.dice.choice((10, len(request) // 2, len(request)))])
        await writer.drain()
        await asyncio.sleep(self.dice.random() / 10)
        writer.transport.abort()

    async def odd(self, done: asyncio.Event) -> list[Answer]:
        """Be slow, or go away, until others are done; slow clients are answered too."""

        async def again_and_again(act: Callable[[], Awaitable[Answer | None]]) -> list[Answer | None]:
            found = []
            while not done.is_set():
                found.append(await act())
                await asyncio.sleep(0.1)
            return found

        acts: list[Callable[[], Awaitable[Answer | None]]] = [lambda: self.ask(pause=0.2), self.vanish] * (ODD // 2)
        found = await asyncio.gather(*map(again_and_again, acts))
        return [one for some in found for one in some if one is not None]


async def overloaded(senders: Senders, rate: float, seconds: float) -> tuple[list[Answer], list[Answer]]:
    """Send twice as many requests as can be answered, among odd clients; return the answers of both."""
    done = asyncio.Event()
    odd = asyncio.create_task(senders.odd(done))
    answers = await senders.open(2 * rate, seconds, burst=BURST)
    done.set()
    return answers, await odd


async def ended(senders: Senders) -> tuple[list[Answer], int, list[str]]:
    """Send SIGTERM under load; return the answers, the number of jobs, and the problems."""
    live = senders.live
    status, headers, _ = await exchange(live, post(live, "/v1/jobs", senders.body))
    jobs = [headers["location"]] if status == 202 else []
    tasks = [asyncio.create_task(senders.ask()) for _ in range(BURST)]
    await asyncio.sleep(senders.dice.random() / 5)
    at = time.monotonic()
    live.terminate()
    later = await senders.open(20.0, 0.3)
    answers = await asyncio.gather(*tasks)
    problems = [f"before SIGTERM, {one.problem}" for one in answers if one.problem]
    problems += [f"after SIGTERM, {one.problem}" for one in later if one.status and one.problem]
    problems += [f"accepted after SIGTERM: {one.status}" for one in later if one.status == 200 and one.sent > at + 0.1]
    if not any(one.status == 200 and one.sent + one.seconds > at for one in answers):
        problems.append("no request was left at SIGTERM")
    for job in jobs:
        get = f"GET {{}} HTTP/1.1\r\nHost: {live.host}\r\nConnection: close\r\n\r\n"
        while json.loads((await exchange(live, get.format(job).encode()))[2])["state"] in ("queued", "running"):
            await asyncio.sleep(0.05)
        status, _, _ = await exchange(live, get.format(f"{job}/images/0").encode())
        problems += [] if status == 200 else [f"a job that was accepted before SIGTERM has no image: {status}"]
    return [*answers, *later], len(jobs), problems


def p95(values: Sequence[float]) -> float:
    """Compute the 95th percentile."""
    return float(np.quantile(values, 0.95))


def attempt(bundle: Path, seconds: float, seed: int) -> Outcome:
    """Measure saturation, exceed it, and end the server under load."""
    with serving(f"plain={bundle}", "--queue", QUEUE) as live:
        senders = Senders(live, random.Random(seed))
        brief = SATURATION_SHARE * seconds
        began = time.monotonic()
        closed = asyncio.run(senders.closed(QUEUE // 4, brief))
        rate = len(closed) / (time.monotonic() - began)
        saturated = asyncio.run(senders.open(rate, brief, burst=1))
        answers, odd = asyncio.run(overloaded(senders, rate, seconds))
        problems = [one.problem for one in (*closed, *saturated, *answers, *odd) if one.problem]
        accepted, refused = ([one.seconds for one in answers if one.status == status] for status in (200, 429))
        if not accepted or not refused:
            problems.append(f"{len(accepted)} requests accepted and {len(refused)} refused of {len(answers)}")
        last, jobs, lost = asyncio.run(ended(senders))
        code, errors = live.wait()
        if code or errors.splitlines()[-1:] != [LAST_LINE]:
            problems.append(f"the server ended with {code}: {errors[-300:]}")
    figures = {}
    if seconds == FULL_SECONDS:
        at_saturation = p95([one.seconds for one in saturated if one.status == 200])
        figures = {
            "requests per second at saturation": rate,
            LATENCY: p95(accepted) / at_saturation,
            REFUSAL: 1000 * p95(refused),
            SLOWEST: 1000 * max(refused),
        }
    sent = len(closed) + len(saturated) + len(answers) + len(odd) + len(last) + jobs
    return Outcome(tries=sent, broken=tuple(problems + lost), figures=figures)


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Build the bundle."""
    bundle = place.tiny_build / "bundle"

    def trial(number: int) -> Outcome:
        """Overload a server, for a moment at first, and then for long."""
        return attempt(bundle, FULL_SECONDS if number else SHORT_SECONDS, number)

    yield trial


PROMISE = Promise(
    name="overload",
    promised="A server with twice the requests that it can answer serves the accepted ones in time, refuses the rest "
    "at once, and ends after SIGTERM without losing an accepted one.",
    tried="Requests at random times at twice the measured capacity, among slow clients and clients that go away; "
    "then SIGTERM while requests and a job are on their way.",
    prepare=prepare,
    trials=2,
    short=1,
    seconds=460,
    limits={LATENCY: 1.5, REFUSAL: 50.0},
)
