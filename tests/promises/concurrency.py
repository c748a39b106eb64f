"""Images that are made at the same time are the images that are made one after the other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np

import unetc
from tests.batching.levels import LEVELS, ROUNDING, STEPS, Levels
from tests.models import relative_error, tiny_of
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.server.bundles import PROMPTED_STEPS
from tests.server.live import Live, pair, serving, until
from unetc.backend import Array
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.batching.request import FULL
from unetc.runtime.session import Session, Step

THREADS, CLIENTS = 16, 64
SCHEDULERS = "ddim", "dpmsolver++", "ddpm"
CANCELLED = 0.2
"""Share of the requests that are cancelled."""
LONG_STEPS = {"plain": 1000, "prompted": PROMPTED_STEPS}
"""Steps of requests that are cancelled, by model."""
STEPS_OF = {"plain": (2, 4, 7), "prompted": (PROMPTED_STEPS,)}
SIDES = {"plain": (8, 16), "prompted": (32, 64)}
"""Pixels of a side, by model."""
BOUND = "largest difference to the serial twin / largest value"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Images that a thread or a client wants."""

    level: str
    steps: int
    side: int
    seed: int
    count: int
    model: str = "plain"
    cancelled: bool = False

    def sample(self, session: Session, **options: Any) -> Array:
        """Sample with a session."""
        return session.sample(
            self.count,
            seed=self.seed,
            steps=self.steps,
            height=self.side,
            width=self.side,
            full_model=self.level == FULL,
            **options,
        )


def stop(step: Step) -> None:
    """Cancel a sampling after two steps."""
    if step.index:
        raise InterruptedError


def in_threads(sessions: Mapping[str, Session], dice: random.Random) -> Outcome:
    """Sample with sessions that share their engines, from all threads at once."""
    wishes = [
        Wish(
            level=dice.choice(LEVELS),
            steps=dice.choice(STEPS),
            side=dice.choice((8, 16)),
            seed=dice.randrange(2**64),
            count=dice.randint(1, 3),
            cancelled=dice.random() < CANCELLED,
        )
        for _ in range(THREADS)
    ]

    def sample(wish: Wish) -> Array | None:
        try:
            return wish.sample(sessions[wish.level], on_step=stop if wish.cancelled else None)
        except InterruptedError:
            return None

    serial = list(map(sample, wishes))
    with ThreadPoolExecutor(THREADS) as pool:
        parallel = list(pool.map(sample, wishes))
    problems = [
        f"threads: {wish} differs"
        for wish, one, other in zip(wishes, serial, parallel, strict=True)
        if (one is None) != (other is None) or (one is not None and not np.array_equal(one, other))
    ]
    return Outcome(tries=sum(not wish.cancelled for wish in wishes), broken=tuple(problems))


@dataclass(frozen=True)
class Clients:
    """Clients of a server with two models."""

    live: Live
    sessions: Mapping[tuple[str, str], Session]
    """By model and level."""

    def __call__(self, dice: random.Random) -> Outcome:
        """Ask from all clients at once, and compare with sessions in this process."""
        wishes = [self._wish(dice) for _ in range(CLIENTS)]
        answers = asyncio.run(self._all(wishes))
        problems, largest = [], 0.0
        for wish, image in zip(wishes, answers, strict=True):
            if isinstance(image, str):
                problems.append(f"clients: {wish}: {image}")
            elif image is not None:
                error = relative_error(image, wish.sample(self.sessions[wish.model, wish.level]))
                largest = max(largest, error)
                problems += [f"clients: {wish} differs by {error:.2g}"] if error > ROUNDING else []
        until(lambda: not any(self.live.metric("unetc_running_images", model=model) for model in SIDES))
        tries = sum(not wish.cancelled for wish in wishes)
        return Outcome(tries=tries, broken=tuple(problems), figures={BOUND: largest})

    def _wish(self, dice: random.Random) -> Wish:
        model, cancelled = dice.choice((*SIDES,)), dice.random() < CANCELLED
        return Wish(
            model=model,
            level=dice.choice(self.live.models[model]),
            steps=LONG_STEPS[model] if cancelled else dice.choice(STEPS_OF[model]),
            side=dice.choice(SIDES[model]),
            seed=dice.randrange(2**32),
            count=dice.randint(1, 2),
            cancelled=cancelled,
        )

    async def _all(self, wishes: Sequence[Wish]) -> list[Array | str | None]:
        limits = httpx2.Limits(max_connections=CLIENTS)
        async with httpx2.AsyncClient(base_url=self.live.address, timeout=600, limits=limits) as client:
            return await asyncio.gather(*(ask(client, wish) for wish in wishes))


async def ask(client: httpx2.AsyncClient, wish: Wish) -> Array | str | None:
    """Ask for the samples of a wish; None if it was cancelled, and a sentence if something else came."""
    if wish.cancelled:
        body = {"model": wish.model, "n": wish.count, "seed": wish.seed, "num_inference_steps": wish.steps}
        job = await client.post("/v1/jobs", json=body)
        state = (await client.delete(job.headers["Location"])).json()["state"]
        return None if state in ("cancelled", "succeeded") else f"a cancelled job has {state}"
    parameters = {
        "seed": wish.seed,
        "count": wish.count,
        "steps": wish.steps,
        "height": wish.side,
        "width": wish.side,
        "quality": wish.level,
        "output_datatype": "FP32",
    }
    answer = await client.post(f"/v2/models/{wish.model}/infer", json={"inputs": [], "parameters": parameters})
    if answer.status_code != 200:
        return f"{answer.status_code}: {answer.text[:200]}"
    image = next(output for output in answer.json()["outputs"] if output["name"] == "images")
    return np.moveaxis(np.array(image["data"], np.float32).reshape(image["shape"]), -1, 1)


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Open sessions, and start a server."""
    with ExitStack() as stack:
        levels = Levels(tiny_of("attention", place.shared), open_backend("onnxruntime:cpu", threads=1))
        bundles = {"plain": place.tiny_build / "bundle", "prompted": place.prompted_build / "bundle"}
        live = stack.enter_context(serving(*pair(*bundles.values()), "--queue", 2 * CLIENTS))
        sessions = {
            (model, level): unetc.load(bundles[model], level=level)
            for model, names in live.models.items()
            for level in names
        }
        clients = Clients(live, sessions)

        def trial(number: int) -> Outcome:
            """Sample from threads and from clients in turn."""
            dice = random.Random(number)
            if number % 2:
                return clients(dice)
            return in_threads(levels.opened(SCHEDULERS[number // 2 % len(SCHEDULERS)]), dice)

        yield trial


PROMISE = Promise(
    name="concurrency",
    promised="Images that threads or clients want at the same time are those that they get one after the other: with "
    "the same bits from sessions, and up to rounding from the server, where they share calls.",
    tried="16 threads over sessions with shared engines, and 64 clients of a server with two models; plans, levels, "
    "steps and sizes mixed. A fifth of the requests is cancelled and not counted.",
    prepare=prepare,
    trials=200,
    short=2,
    seconds=3.1,
    limits={BOUND: ROUNDING},
)
