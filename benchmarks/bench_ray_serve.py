"""What Ray Serve costs and gives: throughput against the plain server, a killed replica, and overload.

    python benchmarks/bench_ray_serve.py --bundle /tmp/bundles/digits     # about five minutes on two quiet cores

Throughput: `unetc serve` and `unetc serve --ray local` with one replica, on the same bundle, with the same threads,
cores and open connections, in turns. Each turn starts the server again, so the other one costs nothing meanwhile.

A killed replica: two replicas of one thread each serve clients that ask again and again, and once more after an error.
One replica gets SIGKILL. Recovered means that both answer again. Overload: many more clients than the queues hold,
which obey Retry-After. An accepted request is lost if it ends with anything but its images.

Writes `results/ray_serve.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import signal
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from bench_serve import LEVEL, ON_THEIR_WAY, Case, Server, saturate, serving
from command_line import add_results, at_least_one
from ray_processes import REPLICA, processes
from result_file import write

STEPS = 20
CLIENTS = 16
"""Clients while a replica is killed."""
CROWD = 128
"""Clients of the overload."""
QUEUE = 16
"""Images that wait per replica in the overload."""
TRIES = 100
REFUSAL = "overload: seconds of a refusal, p95"
"""A figure that is not measured where nothing is refused."""
TWO = "--ray", "local", "--replicas", "2", "--threads", "1"
READY = re.compile(r'^unetc_ready\{replica="\w+"\} 1\.0$', re.MULTILINE)


async def ready(client: aiohttp.ClientSession, server: Server) -> int:
    """Count the replicas that are ready."""
    async with client.get(f"{server.address}/metrics") as answer:
        return len(READY.findall(await answer.text()))


async def throughput(case: Case, rounds: int, seconds: float, threads: int) -> dict[str, list[float]]:
    """Measure both servers in turns."""
    options: dict[str, tuple[str, ...]] = {"plain": (), "ray": ("--ray", "local", "--replicas", "1")}
    found: dict[str, list[float]] = {name: [] for name in options}
    for turn in range(rounds):
        for name in options if turn % 2 else reversed(options):
            extra = ("--threads", str(threads), *options[name])
            async with serving(case, "unetc", extra=extra) as (client, (server,)):
                await saturate(client, server, seconds / 4)
                found[name].append(await saturate(client, server, seconds))
    return found


class Load:
    """Clients that ask until they are told to stop, and ask again after errors."""

    def __init__(self, client: aiohttp.ClientSession, server: Server, clients: int) -> None:
        """Start the clients."""
        self._client = client
        self._server = server
        self._over = False
        self._seeds = itertools.count()
        self.statuses: Counter[int] = Counter()
        """Answers by status; 0 for broken connections."""
        self.lost = 0
        """Requests that never got their images, whatever their client did."""
        self.answers: list[float] = []
        """Times of images."""
        self.refusals: list[float] = []
        """Seconds until a refusal."""
        self._tasks = [asyncio.create_task(self._ask_again_and_again()) for _ in range(clients)]

    async def stop(self) -> None:
        """Let every client finish its request."""
        self._over = True
        await asyncio.gather(*self._tasks)

    async def _ask_again_and_again(self) -> None:
        while not self._over:
            seed = next(self._seeds)
            for _ in range(TRIES):
                if await self._served(seed):
                    break
            else:
                self.lost += 1

    async def _served(self, seed: int) -> bool:
        """Ask once; after a failure, wait as long as the answer says."""
        began = time.perf_counter()
        try:
            status, headers, _ = await self._server.post(self._client, self._server.case.body(seed))
        except (aiohttp.ClientError, TimeoutError):
            self.statuses[0] += 1
            await asyncio.sleep(0.2)
            return False
        self.statuses[status] += 1
        if status == 200:
            self.answers.append(time.perf_counter())
            return True
        if status == 429:
            self.refusals.append(time.perf_counter() - began)
        await asyncio.sleep(float(headers.get("Retry-After", 0.2)))
        return False


async def kill(case: Case, kills: int) -> list[dict[str, Any]]:
    """Kill one of two replicas, and measure until both answer again."""
    found = []
    async with serving(case, "unetc", extra=TWO) as (client, (server,)):
        for _ in range(kills):
            load = Load(client, server, CLIENTS)
            await asyncio.sleep(2)
            (victim, *_), began = processes(REPLICA, of=server.process.pid), time.perf_counter()
            os.kill(victim, signal.SIGKILL)
            while victim in processes(REPLICA, of=server.process.pid) or await ready(client, server) < 2:
                await asyncio.sleep(0.1)
            recovered = time.perf_counter() - began
            await asyncio.sleep(2)
            await load.stop()
            gaps = np.diff([began, *sorted(one for one in load.answers if one > began)])
            found.append(
                {
                    "recovered_s": recovered,
                    "longest_silence_s": float(gaps.max()),
                    "statuses": dict(load.statuses),
                    "lost": load.lost,
                }
            )
    return found


async def overload(case: Case, seconds: float) -> dict[str, Any]:
    """Let many more clients ask than the queues hold."""
    async with serving(case, "unetc", extra=(*TWO, "--queue", str(QUEUE))) as (client, (server,)):
        load = Load(client, server, CROWD)
        await asyncio.sleep(seconds)
        await load.stop()
    return of_crowd(load.statuses, load.lost, load.refusals, load.answers)


def of_crowd(
    statuses: Mapping[int, int], lost: int, refusals: Sequence[float], answers: Sequence[float]
) -> dict[str, Any]:
    """Describe an overload; a figure without enough answers is None."""
    return {
        "statuses": dict(statuses),
        "lost": lost,
        "refused_p95_s": float(np.quantile(refusals, 0.95)) if refusals else None,
        "images_per_s": len(answers) / (answers[-1] - answers[0]) if len(answers) > 1 else None,
    }


def figures(result: dict[str, Any]) -> list[dict[str, object]]:
    """List the figures with their goals."""
    rows: list[dict[str, object]] = []

    def add(figure: str, value: float, **goal: float) -> None:
        rows.append({"figure": figure, "value": round(value, 3), **({"goal": goal} if goal else {})})

    rates = {name: statistics.median(values) for name, values in result["throughput"].items()}
    add("images per second of the plain server", rates["plain"])
    add("images per second through Ray Serve / the plain server", rates["ray"] / rates["plain"], at_least=0.9)
    kills, crowd = result["kills"], result["overload"]
    add(
        "a killed replica: seconds until both answer again, longest",
        max(one["recovered_s"] for one in kills),
        at_most=10.0,
    )
    add("a killed replica: seconds without any answer, longest", max(one["longest_silence_s"] for one in kills))
    again = [sum(count for status, count in one["statuses"].items() if status != 200) for one in kills]
    add("a killed replica: requests sent again, most", max(again))
    add("a killed replica: requests lost after retries", sum(one["lost"] for one in kills), at_most=0)
    statuses = crowd["statuses"]
    add("overload: refused with 429 / all answers", statuses.get(429, 0) / sum(statuses.values()))
    if crowd["refused_p95_s"] is not None:
        add(REFUSAL, crowd["refused_p95_s"])
    add(
        "overload: accepted requests lost, or refused by Ray",
        sum(count for status, count in statuses.items() if status not in (200, 429)),
        at_most=0,
    )
    add("overload: requests lost after retries", crowd["lost"], at_most=0)
    return rows


def record_of(measured: dict[str, Any], settings: dict[str, object]) -> dict[str, Any]:
    """Make the result."""
    missing = {REFUSAL: "nothing was refused"} if measured["overload"]["refused_p95_s"] is None else {}
    return {"settings": settings, "figures": figures(measured), "absent": missing, "measured": measured}


async def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    return {
        "throughput": await throughput(case, options.rounds, options.seconds, options.threads),
        "kills": await kill(case, options.kills),
        "overload": await overload(case, options.seconds),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="Bundle of the model digits.")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="Turns of the throughput.")
    parser.add_argument("--seconds", type=float, default=12.0, help="Length of one measurement.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each server of the throughput.")
    parser.add_argument("--kills", type=at_least_one, default=3, help="Replicas to kill, one after the other.")
    add_results(parser)
    options = parser.parse_args()
    case = Case(model="digits", bundle=options.bundle, steps=STEPS, prompts=(), guidance_scale=1.0)
    measured = asyncio.run(run(case, options))
    settings = {name: getattr(options, name) for name in ("rounds", "seconds", "threads", "kills")}
    settings |= {"quality": LEVEL, "steps": STEPS, "clients": ON_THEIR_WAY, "crowd": CROWD, "queue": QUEUE}
    write(options.results, "ray_serve", record_of(measured, settings))


if __name__ == "__main__":
    main()
