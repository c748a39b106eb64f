"""How many images per second, and how soon: `unetc serve` against servers without step batching.

    python benchmarks/bench_serve.py --bundles /tmp/bundles     # about half an hour on two quiet cores
    python benchmarks/bench_serve.py --bundles /tmp/bundles --only digits   # some cases; the result keeps the others

Contenders, each a process behind FastAPI on the same bundle: `unetc serve`; `unetc.load` with one request after the
other; batches of whole requests, which wait 50 ms for up to 8; and the model's own pipeline in torch (the full model,
one request after the other). Requests come from this process, in turns for all contenders, at the same times. Arrivals
are Poisson and do not wait for answers. A 95th percentile is taken over the requests of all rounds together, as many
for every contender. Turns are short, so that a machine whose speed drifts is as fast for one contender as for the
others. Saturation is measured with 48 requests on their way, and with two for torch, where each takes seconds. Missing
bundles are built from the committed profiles. Writes `results/serve.json` and a picture of latency against load.

The engines themselves set a limit: `serve_simulation.py` queues requests before calls that take the times measured by
the build, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from checkout import commit
from command_line import add_only, add_results, chosen
from result_file import absent, earlier, picture_of, write
from serve_contenders import BATCH, WINDOW
from serve_simulation import arrivals, simulate

import unetc
from unetc.runtime.bundle import Bundle

HERE = Path(__file__).parent
PROFILES = {"digits": "digits-ddim", "prompted-digits": "prompted-digits"}
"""Committed profiles by model."""
STEPS = 20, 50
NAMES = {f"{model}, {steps} steps": (model, steps) for model in PROFILES for steps in STEPS}
"""Model and number of steps of each case."""
BUDGETS = "0.27,0.4,0.55"
LEVEL = "27%"
"""Quality of all contenders but torch, unless a figure says otherwise."""
ON_THEIR_WAY = 48
LADDER_QUEUE = 32
"""Requests that may wait where the ladder is tried: less than come too many."""
LOADS = 0.4, 0.6, 0.8, 1.0, 1.4, 1.8
"""Loads of the picture, relative to the capacity of one request after the other."""
THREADS = 2
UNETC = sys.executable, "-c", "from unetc.cli import main; main()"
"""The command line, of the same environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and a number of steps."""

    model: str
    bundle: Path
    steps: int
    prompts: tuple[str, ...]
    guidance_scale: float

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.model}, {self.steps} steps"

    def body(self, seed: int, quality: str = LEVEL, **more: object) -> dict[str, Any]:
        """Make the body of a request."""
        body: dict[str, Any] = {"seed": seed, "num_inference_steps": self.steps, "quality": quality, **more}
        if self.prompts:
            body |= {"prompt": self.prompts[seed % len(self.prompts)]}
        return body

    def for_contender(self, body: dict[str, Any]) -> dict[str, Any]:
        """Add the fields that only the plain servers know."""
        return {**body, "prompt_index": body["seed"], "guidance_scale": self.guidance_scale}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request."""

    seconds: float
    status: int
    level: str = ""
    relative_l2: float = 0.0


class Server:
    """A contender's process."""

    def __init__(self, name: str, case: Case, port: int, extra: Sequence[str] = ()) -> None:
        """Start it."""
        self.name, self.case = name, case
        self.address = f"http://127.0.0.1:{port}"
        if name == "unetc":
            options = ["--port", str(port), "--queue", "512", *extra]
            command = [*UNETC, "serve", str(case.bundle), *options]
        else:
            what = case.model if name == "diffusers" else str(case.bundle)
            command = [sys.executable, str(HERE / "serve_contenders.py"), name, what, str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    async def wait(self, client: aiohttp.ClientSession) -> None:
        """Wait until it is ready, and make two requests."""
        for _ in range(600):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended with {self.process.returncode}")
            try:
                async with client.get(f"{self.address}/health/ready") as answer:
                    if answer.status == 200:
                        break
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.1)
        await asyncio.gather(*(self.ask(client, self.case.body(seed)) for seed in range(2)))

    async def post(self, client: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        """Send a request, and return the status, the headers and the body of the answer."""
        sent = body if self.name == "unetc" else self.case.for_contender(body)
        async with client.post(f"{self.address}/v1/images/generations", json=sent) as answer:
            return answer.status, answer.headers, await answer.read()

    async def ask(self, client: aiohttp.ClientSession, body: dict[str, Any]) -> Answer:
        """Send a request and wait for the answer."""
        began = time.perf_counter()
        status, _, answer = await self.post(client, body)
        seconds = time.perf_counter() - began
        told = json.loads(answer).get("unetc", {}) if status == 200 else {}
        damage = told.get("damage") or {"relative_l2": 0.0}
        return Answer(
            seconds=seconds,
            status=status,
            level=told.get("level", ""),
            relative_l2=damage["relative_l2"],
        )

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@asynccontextmanager
async def serving(
    case: Case, *names: str, extra: Sequence[str] = ()
) -> AsyncIterator[tuple[aiohttp.ClientSession, list[Server]]]:
    """Run servers; only one of them gets requests at a time."""
    ports = itertools.count(18000 + os.getpid() % 2000)
    servers = [Server(name, case, next(ports), extra if name == "unetc" else ()) for name in names]
    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
            for server in servers:
                await server.wait(client)
            yield client, servers
    finally:
        for server in servers:
            server.stop()


async def saturate(client: aiohttp.ClientSession, server: Server, seconds: float, quality: str = LEVEL) -> float:
    """Measure images per second with many requests on their way, and with two for torch, where each takes seconds."""
    seeds, finished = itertools.count(1), []
    end = time.perf_counter() + seconds

    async def ask_again_and_again() -> None:
        while time.perf_counter() < end:
            answer = await server.ask(client, server.case.body(next(seeds), quality))
            assert answer.status == 200, answer
            finished.append(time.perf_counter())

    began = time.perf_counter()
    clients = 2 if server.name == "diffusers" else ON_THEIR_WAY
    await asyncio.gather(*(ask_again_and_again() for _ in range(clients)))
    return len(finished) / (max(finished) - began)


async def arrive(
    client: aiohttp.ClientSession,
    server: Server,
    rate: float,
    count: int,
    seed: int,
    body: Callable[[int], dict[str, Any]],
) -> list[Answer]:
    """Send requests at Poisson times; return all answers, in the order of arrival."""
    began, tasks = time.perf_counter(), []
    for k, at in enumerate(arrivals(rate, count, seed)):
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        tasks.append(asyncio.create_task(server.ask(client, body(k))))
    return list(await asyncio.gather(*tasks))


def p95(answers: Sequence[Answer]) -> float:
    """Compute the 95th percentile of the latency in seconds."""
    assert all(answer.status == 200 for answer in answers), {answer.status for answer in answers}
    return float(np.quantile([answer.seconds for answer in answers], 0.95))


async def measure(case: Case, rounds: int, seconds: float, requests: int) -> dict[str, Any]:
    """Measure capacities and latencies of all contenders."""
    async with serving(case, "unetc", "serial", "whole", "diffusers") as (client, servers):
        by_name = {server.name: server for server in servers}
        runs = {name: partial(saturate, client, server, seconds) for name, server in by_name.items()}
        capacity = {name: statistics.median(values) for name, values in (await in_turns(rounds, runs)).items()}
        latency: dict[str, dict[str, float]] = {}
        for against in ("serial", "whole"):
            rate, pair = 0.8 * capacity[against], ("unetc", against)
            answers: dict[str, list[Answer]] = {name: [] for name in pair}
            for turn in range(rounds):
                for name in pair if turn % 2 else reversed(pair):
                    answers[name] += await arrive(client, by_name[name], rate, requests, turn, case.body)
            latency[against] = {name: p95(one) for name, one in answers.items()}
        curve = []
        for load in LOADS if case.steps == STEPS[-1] else ():
            rate = load * capacity["serial"]
            for name in ("unetc", "serial", "whole"):
                if rate < 0.97 * capacity[name]:
                    found = await arrive(client, by_name[name], rate, requests, 99, case.body)
                    curve.append({"server": name, "load": load, "images_per_s": rate, "p95_s": p95(found)})
    return {
        "capacity": capacity,
        "latency": latency,
        "curve": curve,
        "engines_alone": engines_alone(case, rounds, requests),
    }


def engines_alone(case: Case, rounds: int, requests: int) -> dict[str, Any]:
    """Queue the same requests before calls that take the measured times, and nothing else."""
    session = unetc.load(case.bundle)
    level = next(one for one in Bundle.open(case.bundle).manifest.levels if one.name == LEVEL)
    schedule = session.plan.schedule(session.scheduler.table(case.steps).log_snr.tolist())
    batch_ms = [engine.batch_ms for engine in level.engines]
    return simulate(schedule, batch_ms, batch=BATCH, window_s=WINDOW, requests=requests, rounds=rounds)


async def in_turns(rounds: int, runs: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Make every measurement once per round, in an order that turns around."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in runs if turn % 2 else reversed(list(runs)):
            found[name].append(await runs[name]())
    return found


async def measure_alone(case: Case, rounds: int) -> float:
    """Measure what the server adds to a session's time, one request at a time, in turns."""
    session = unetc.load(case.bundle)
    ratios = []
    async with serving(case, "unetc") as (client, (server,)):

        async def own(seed: int) -> float:
            conditions = session.conditions.take([seed])
            began = time.perf_counter()
            session.sample(1, seed=seed, steps=case.steps, conditions=conditions)
            return time.perf_counter() - began

        async def served(seed: int) -> float:
            return (await server.ask(client, case.body(seed))).seconds

        for seed in range(rounds):
            seconds = {one: await one(seed) for one in ((own, served) if seed % 2 else (served, own))}
            ratios.append(seconds[served] / seconds[own])
    return statistics.median(ratios)


async def measure_share(case: Case, rounds: int, others: int = 7) -> dict[str, float]:
    """Measure a request for the full model among fast ones, relative to its share of the machine.

    Its share: the time that all of them would take one after the other.
    """
    async with serving(case, "unetc") as (client, (server,)):
        full, fast, together = [], [], []
        for seed in range(rounds):
            full.append((await server.ask(client, case.body(seed, "full"))).seconds)
            fast.append((await server.ask(client, case.body(seed, "55%"))).seconds)
            answers = await asyncio.gather(
                server.ask(client, case.body(seed, "full")),
                *(server.ask(client, case.body(100 * seed + k, "55%")) for k in range(others)),
            )
            together.append(answers[0].seconds)
    share = statistics.median(full) + others * statistics.median(fast)
    return {"alone_s": statistics.median(full), "together_s": statistics.median(together), "share_s": share}


async def measure_ladder(case: Case, seconds: float, requests: int) -> dict[str, Any]:
    """Offer half more than the full model can make, with and without leave to step down.

    The queue is short, so requests are refused where they come faster than images are made.
    """
    async with serving(case, "unetc") as (client, (server,)):
        full = await saturate(client, server, seconds, "full")
        alone = (await server.ask(client, case.body(1, "full"))).seconds
    target, rate = 20 * alone, 1.5 * full
    short = ["--queue", str(LADDER_QUEUE)]
    found = {}
    for name, options in (("with", ["--degrade-to", "55%", "--target-p95", f"{target:.3f}"]), ("without", [])):
        body = partial(case.body, quality="full", degrade=name == "with")
        async with serving(case, "unetc", extra=[*short, *options]) as (client, (server,)):
            found[name] = of_ladder(await arrive(client, server, rate, 4 * requests, 7, body))
    return {"capacity_full": full, "offered": rate, "target_s": target, "queue": LADDER_QUEUE, **found}


def of_ladder(answers: Sequence[Answer]) -> dict[str, Any]:
    """Count the refused requests, and describe the images of the others."""
    made = [answer for answer in answers if answer.status == 200]
    levels = [answer.level for answer in made]
    return {
        "refused": len(answers) - len(made),
        "p95_s": p95(made),
        "mean_relative_l2": statistics.fmean(answer.relative_l2 for answer in made),
        "levels": {level: levels.count(level) / len(levels) for level in sorted(set(levels))},
    }


def cases(bundles: Path, names: Collection[str]) -> Iterator[Case]:
    """Open the bundles of the cases with some names; build those that are missing."""
    for model, steps in (own for name, own in NAMES.items() if name in names):
        bundle = bundles / model
        if not bundle.exists():
            measured = HERE.parent / "tests" / "planner" / "profiles" / f"{PROFILES[model]}.json"
            options = ["--profile", str(measured), "--budget", BUDGETS, "--no-controls", "-o", str(bundle)]
            subprocess.run([*UNETC, "build", model, *options], check=True)
        conditioning = Bundle.open(bundle).manifest.conditioning
        prompts = () if conditioning is None else conditioning.prompts
        scale = 1.0 if conditioning is None else conditioning.guidance_scale
        yield Case(model=model, bundle=bundle, steps=steps, prompts=prompts, guidance_scale=scale)


def figures(results: dict[str, dict[str, Any]]) -> list[dict[str, object]]:
    """List the figures with their goals."""
    rows: list[dict[str, object]] = []

    def add(figure: str, value: float, **goal: float) -> None:
        rows.append({"figure": figure, "value": round(value, 3), **({"goal": goal} if goal else {})})

    for name, result in results.items():
        capacity, latency = result["capacity"], result["latency"]
        mine = capacity["unetc"]
        add(f"{name}: images per second / one request after the other", mine / capacity["serial"], at_least=2.0)
        add(f"{name}: images per second / whole requests", mine / capacity["whole"], at_least=1.15)
        add(f"{name}: images per second / diffusers in torch", mine / capacity["diffusers"])
        for against, words, goal in (("serial", "one request after the other", 0.4), ("whole", "whole requests", 0.6)):
            ratio = latency[against]["unetc"] / latency[against][against]
            add(f"{name}: p95 at 0.8 of its capacity / {words}", ratio, at_most=goal)
        alone = result["engines_alone"]
        add(f"{name}: images per second / whole requests, engines alone, best seats", alone["images_per_s"])
        for key, words in (("p95_serial", "one request after the other"), ("p95", "whole requests")):
            figure = f"{name}: p95 at 0.8 of its capacity / {words}, engines alone, best seats"
            add(figure, min(alone[key].values()))
        if "adds" in result:
            add(f"{name}: seconds of one request alone / the session's", result["adds"], at_most=1.03)
        if "share" in result:
            ratio = result["share"]["together_s"] / result["share"]["share_s"]
            add(f"{name}: full model among 7 fast requests / its share", ratio, at_most=1.0)
        if "ladder" in result:
            ladder = result["ladder"]
            there = f"{name}: 1.5 x the full model's capacity"
            own, queue = ladder["with"], f"queue of {ladder['queue']}"
            add(f"{there}, {queue}: refused, with the ladder", own["refused"], at_most=0)
            add(f"{there}, {queue}: refused, without the ladder", ladder["without"]["refused"])
            add(f"{there}: p95 with the ladder / target", own["p95_s"] / ladder["target_s"], at_most=1.0)
            add(f"{there}: mean relative L2 with the ladder", own["mean_relative_l2"])
    return rows


def record_of(results: dict[str, dict[str, Any]], settings: Mapping[str, object]) -> dict[str, Any]:
    """Make the result of some cases."""
    return {"settings": settings, "figures": figures(results), "absent": absent(NAMES, results), "measured": results}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw latency against load."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = {name: result for name, result in results.items() if result["curve"]}
    words = {"serial": "one after the other", "whole": "whole requests, up to 8", "unetc": "unetc serve"}
    colours = {"serial": "#9aa0a6", "whole": "#e08e45", "unetc": "#2a6fdb"}
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 3.4), squeeze=False)
    for axis, (name, result) in zip(axes[0], shown.items(), strict=True):
        for server, label in words.items():
            points = [point for point in result["curve"] if point["server"] == server]
            axis.plot(
                [point["images_per_s"] for point in points],
                [1000 * point["p95_s"] for point in points],
                marker="o",
                color=colours[server],
                label=label,
            )
            axis.axvline(result["capacity"][server], color=colours[server], linestyle=":", linewidth=1)
        axis.set(title=name, xlabel="requests per second", ylabel="95th percentile of latency, ms", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


async def run(
    bundles: Path, names: Collection[str], rounds: int, seconds: float, requests: int
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Measure the cases with some names."""
    for case in cases(bundles, names):
        print(f"{case.name} …", file=sys.stderr, flush=True)
        result = await measure(case, rounds, seconds, requests)
        if case.steps == STEPS[-1]:
            result["adds"] = await measure_alone(case, 10 * rounds)
            result["share"] = await measure_share(case, rounds)
            result["ladder"] = await measure_ladder(case, seconds, requests)
        print(json.dumps({case.name: result}), file=sys.stderr, flush=True)
        yield case.name, {**result, "commit": commit()}


def main() -> None:
    """Measure, draw and write."""
    asyncio.run(write_all())


async def write_all() -> None:
    """Measure; draw and write after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, required=True, help="Folder of the bundles; missing ones are built.")
    add_only(parser)
    parser.add_argument("--rounds", type=int, default=6, help="Turns of each measurement.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Length of one measurement of capacity.")
    parser.add_argument("--requests", type=int, default=100, help="Requests of one measurement of latency.")
    add_results(parser)
    options = parser.parse_args()
    settings = {"rounds": options.rounds, "seconds": options.seconds, "requests": options.requests}
    settings |= {"quality": LEVEL, "threads": THREADS}
    again = chosen(parser, options.only, NAMES)
    results = earlier(options.results, "serve", again=again, settings=settings)
    async for name, result in run(options.bundles, again, options.rounds, options.seconds, options.requests):
        results[name] = {**result, "settings": settings}
        write(options.results, "serve", record_of(results, settings))
        if any(one["curve"] for one in results.values()):
            draw(results, picture_of(options.results, "serve-latency.png"))


if __name__ == "__main__":
    main()
