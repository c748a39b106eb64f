"""An engine that gives NaN or infinity costs one step of one image, and changes nothing in the images around it."""

from __future__ import annotations

import asyncio
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx2
import numpy as np
import torch

from tests.batching.levels import LEVELS, STEPS, Levels, scheduler_of
from tests.dropin.runs import STEPS as DROPIN_STEPS
from tests.dropin.runs import dropin_of, noise, run, session_of, words
from tests.models import tiny_of
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.promises.spoiler import Poison, Row, Spoiler
from tests.runtime.by_hand import ByHand, sample_by_hand
from tests.server.local import local
from unetc.backend import Array, Program
from unetc.call import CONTEXT
from unetc.compiler.schedulers.classes import Family
from unetc.errors import NonFiniteError
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.batching.batcher import Batcher
from unetc.runtime.batching.limits import BatchLimits
from unetc.runtime.batching.request import FULL, SampleRequest
from unetc.runtime.session import Session
from unetc.server import served as served_module
from unetc.server.service import Service

SCHEDULERS = "ddim", "dpmsolver++", "ddpm"
VALUES = np.nan, np.inf, -np.inf
NEIGHBOURS = 3
"""Requests that are made together with the one that is spoilt."""

Made = tuple[Array | None, int]
"""An image, or None where its request fails as it must, and the steps that were made again."""
Part = Callable[[random.Random], Outcome]
"""Spoils every step of an image once, in one of the places where images are made."""


def made(sample: Callable[[], Made]) -> Made:
    """Sample; None for the image if even the full model gives NaN or infinity."""
    try:
        return sample()
    except NonFiniteError:
        return None, 0


def poisons(dice: random.Random, rows: Sequence[Row], stand_ins: Sequence[Program] = ()) -> Iterator[Poison]:
    """Draw a poison for every call of an image; engines that may stand in for the full model are spoilt with it."""
    for row in rows:
        programs = dice.choice(((row.program, *stand_ins), stand_ins)) if stand_ins else (row.program,)
        branch = not stand_ins and dice.random() < 0.3  # the full model emits none
        yield Poison(programs=programs, sample=row.sample, value=dice.choice(VALUES), branch=branch)


def differences(who: str, actual: Made, expected: Made) -> list[str]:
    """Say where an image is not the expected one."""
    (image, repeated), (due, times) = actual, expected
    found = [] if repeated == times else [f"{who}: {repeated} steps made again, expected {times}"]
    if image is None or due is None:
        return found if image is due else [*found, f"{who}: {'failed' if image is None else 'did not fail'}"]
    if not np.isfinite(image).all():
        found.append(f"{who}: the image is not finite")
    return found if np.array_equal(image, due) else [*found, f"{who}: the image differs"]


@dataclass(frozen=True, eq=False)
class InSession:
    """Samples in two threads of one session; the reference calls the engines by hand."""

    spoiler: Spoiler
    sessions: Mapping[str, Mapping[str, Session]]
    """By scheduler and level."""

    def __call__(self, dice: random.Random) -> Outcome:
        """Spoil every step of one of two images."""
        spoiler, steps, level = self.spoiler, dice.choice(STEPS), dice.choice(LEVELS)
        scheduler, seed = dice.choice(SCHEDULERS), dice.randrange(2**32)
        session, full = self.sessions[scheduler][level], level == FULL

        def sample(seed: int) -> Made:
            before = session.non_finite_steps
            return session.sample(2, seed=seed, steps=steps, full_model=full), session.non_finite_steps - before

        neighbour = sample(seed + 1)
        spoiler.take()
        sample(seed)
        problems: list[str] = []
        rows = spoiler.take()[:: dice.choice((1, 2))]
        with ThreadPoolExecutor(1) as pool:
            for tried, spoiler.poison in enumerate(poisons(dice, rows), 1):
                expected = made(lambda: sample_by_hand(session, 2, seed=seed, steps=steps, full_model=full))
                other = pool.submit(session.sample, 2, seed=seed + 1, steps=steps, full_model=full)
                case = f"session, {level}, {scheduler}, {steps} steps, {spoiler.poison.value}, call {tried}"
                problems += differences(case, made(lambda: sample(seed)), expected)
                problems += differences(f"{case}, neighbour", (other.result(), 0), neighbour)
        return Outcome(tries=len(rows), broken=tuple(problems))


@dataclass(frozen=True, eq=False)
class InDropin:
    """Two runs of a pipeline's loop take turns; the reference calls the engines by hand."""

    spoiler: Spoiler
    place: Place

    def __call__(self, dice: random.Random) -> Outcome:
        """Spoil every step of one of two runs."""
        spoiler, full, seed = self.spoiler, dice.random() < 0.2, dice.randrange(2**31)
        session = session_of("cross-attention", self.place.shared, Family.BETAS, spoiler.wrap)

        def dropin() -> Any:
            return dropin_of("cross-attention", self.place.shared, wrap=spoiler.wrap, full_model=full)

        def by_hand(hand: ByHand, seen: torch.Tensor, timestep: Any, prompt: torch.Tensor) -> Any:
            inputs = {"sample": seen.numpy(), CONTEXT: prompt.numpy()}
            value = float(timestep)
            predicted = hand.predict(inputs, value, session.scheduler.log_snr_at(value))
            return SimpleNamespace(sample=torch.from_numpy(predicted))

        def alone(seed: int) -> Made:
            hand = ByHand(session, full_model=full)
            *_, image = run(lambda *call: by_hand(hand, *call), noise(seed), words(seed))
            return image.numpy(), hand.repeated

        neighbour = alone(seed + 1)
        spoiler.take()
        alone(seed)
        rows, problems = spoiler.take(), []
        for step, spoiler.poison in enumerate(poisons(dice, rows)):
            expected, before = made(lambda: alone(seed)), session.non_finite_steps
            unet, images = dropin(), []
            runs = [iter(run(unet, noise(seed + i), words(seed + i))) for i in range(2)]
            for _ in range(DROPIN_STEPS):
                images.append([made(lambda: (next(one).numpy(), 0))[0] if one else None for one in runs])  # noqa: B023
                runs = [one if image is not None else None for one, image in zip(runs, images[-1], strict=True)]
            own, other = images[-1]
            case = f"drop-in, full_model={full}, {spoiler.poison.value}, step {step}"
            problems += differences(case, (own, session.non_finite_steps - before), expected)
            problems += differences(f"{case}, neighbour", (other, 0), neighbour)
        return Outcome(tries=len(rows), broken=tuple(problems))


@dataclass(frozen=True, eq=False)
class InBatch:
    """Requests share the calls of a batcher; the reference is a session."""

    spoiler: Spoiler
    levels: Levels
    sessions: Mapping[str, Mapping[str, Session]]
    """By scheduler and level."""

    def __call__(self, dice: random.Random) -> Outcome:
        """Spoil every step of one of four requests."""
        sessions, seed = self.sessions[dice.choice(SCHEDULERS)], dice.randrange(2**32)
        levels = [dice.choice(LEVELS), *dice.choices(LEVELS, k=NEIGHBOURS - 1)]
        requests = [
            SampleRequest(
                level=level,
                steps=dice.choice(STEPS),
                seed=seed + i,
                conditions=self.levels.conditions(1, seed % 2**16 + i, scale=dice.choice((1.0, 3.0))),
            )
            for i, level in enumerate([*levels, levels[0]])  # one of the neighbours has the level of the victim
        ]
        batcher = Batcher(sessions, limits=BatchLimits(rows=dice.choice((4, 8)), seats=NEIGHBOURS + 1))

        def serial(request: SampleRequest) -> Made:
            session = sessions[request.level]
            before = session.non_finite_steps
            image = session.sample(
                seed=request.seed,
                steps=request.steps,
                conditions=request.conditions,
                full_model=request.level == FULL,
            )
            return image, session.non_finite_steps - before

        def batched() -> list[Made]:
            self.spoiler.open.clear()
            tickets = [batcher.submit(request) for request in requests[::-1]][::-1]
            self.spoiler.open.set()

            def result(ticket: Any) -> Made:
                answer = ticket.future.result(timeout=120)
                return answer.images, answer.non_finite_steps

            return [made(lambda: result(ticket)) for ticket in tickets]  # noqa: B023

        try:
            stand_ins = (sessions[LEVELS[1]].programs[0],) if levels[0] == FULL else ()
            return tried(f"batch, {levels[0]}", self.spoiler, dice, requests, serial, batched, stand_ins)
        finally:
            batcher.close()


@dataclass(frozen=True, eq=False)
class InServer:
    """Requests over HTTP share the calls of the server; the reference is a session."""

    spoiler: Spoiler
    runner: asyncio.Runner
    client: httpx2.AsyncClient
    service: Service

    def __call__(self, dice: random.Random) -> Outcome:
        """Spoil every step of one of four requests."""
        sessions = self.service.models["plain"].sessions
        level, steps, side = dice.choice([*sessions]), dice.choice((2, 3, 4, 5)), dice.choice((8, 16))
        seed = dice.randrange(2**32)
        requests = [
            SampleRequest(level=level, steps=steps, height=side, width=side, seed=seed + i)
            for i in range(NEIGHBOURS + 1)
        ]

        def serial(request: SampleRequest) -> Made:
            session, full = sessions[request.level], request.level == FULL
            before = session.non_finite_steps
            image = session.sample(
                seed=request.seed, steps=request.steps, height=request.height, width=request.width, full_model=full
            )
            return image, session.non_finite_steps - before

        async def ask(request: SampleRequest) -> Made:
            parameters = {"seed": request.seed, "steps": request.steps, "quality": request.level}
            parameters |= {"height": request.height, "width": request.width, "output_datatype": "FP32"}
            answer = await self.client.post("/v2/models/plain/infer", json={"inputs": [], "parameters": parameters})
            if answer.status_code == 500 and "produced NaN or infinity at timestep" in answer.json()["error"]:
                return None, 0
            body = answer.raise_for_status().json()
            image = next(output for output in body["outputs"] if output["name"] == "images")
            values = np.array(image["data"], np.float32).reshape(image["shape"])
            return np.moveaxis(values, -1, 1), body["parameters"]["non_finite_steps"]

        async def all_together() -> list[Made]:
            self.spoiler.open.clear()
            asked = [asyncio.create_task(ask(request)) for request in requests[::-1]]
            while len(self.service.running) < len(requests):
                await asyncio.sleep(0.001)
            self.spoiler.open.set()
            return (await asyncio.gather(*asked))[::-1]

        def batched() -> list[Made]:
            return self.runner.run(all_together())

        return tried(f"server, {level}, {side} pixels", self.spoiler, dice, requests, serial, batched, ())


def tried(
    where: str,
    spoiler: Spoiler,
    dice: random.Random,
    requests: Sequence[SampleRequest],
    serial: Callable[[SampleRequest], Made],
    batched: Callable[[], list[Made]],
    stand_ins: Sequence[Program],
) -> Outcome:
    """Spoil every step of the first request, while all of them share calls."""
    victim, *neighbours = requests
    spoiler.take()
    due = [serial(request) for request in neighbours]
    of_neighbours = len(spoiler.take())
    serial(victim)
    rows, problems, shared = spoiler.take(), [], 0
    each = len(rows) // victim.steps
    for call, spoiler.poison in enumerate(poisons(dice, rows, stand_ins)):
        expected = made(lambda: serial(victim))
        of_victim = len(spoiler.take())
        actual, ran = batched(), spoiler.take()
        if any(row.spoilt and row.program in stand_ins for row in ran):  # serial samples have none
            of_victim += each
            expected = expected[0], expected[1] + (expected[0] is not None)
        case = f"{where}, {victim.steps} steps, {spoiler.poison.value}, row {call} of {len(rows)}"
        for i, (one, other) in enumerate(zip(actual, [expected, *due], strict=True)):
            problems += differences(f"{case}, neighbour {i}" if i else case, one, other)
        if len(ran) != of_neighbours + of_victim:
            problems.append(f"{case}: {len(ran)} rows computed, expected {of_neighbours} + {of_victim}")
        shared += any(row.spoilt and row.company > each for row in ran)
    if not shared and not stand_ins:
        problems.append(f"{where}: no spoilt call had rows of others")
    return Outcome(tries=len(rows), broken=tuple(problems))


def by_scheduler(sessions: Mapping[str, Session]) -> dict[str, dict[str, Session]]:
    """Open sessions over the same engines along every scheduler."""
    return {
        name: {level: session.along(scheduler_of(name)) for level, session in sessions.items()} for name in SCHEDULERS
    }


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Load engines through a spoiler, for sessions, the drop-in and the server."""
    with ExitStack() as stack:
        logging.disable(logging.ERROR)  # every try is logged
        stack.callback(logging.disable, logging.NOTSET)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)
        spoiler = Spoiler(open_backend("onnxruntime:cpu", threads=1))
        plain, prompted = (
            Levels(tiny_of(name, place.shared), spoiler.inner) for name in ("attention", "cross-attention")
        )
        of_session, of_batch = (by_scheduler(levels.sessions("ddim", spoiler.wrap)) for levels in (plain, prompted))
        stack.enter_context(mock.patch.object(served_module, "backend_for", return_value=spoiler))
        runner = stack.enter_context(asyncio.Runner())
        serving = local(place.tiny_build / "bundle")
        client, service = runner.run(serving.__aenter__())
        stack.callback(lambda: runner.run(serving.__aexit__(None, None, None)))
        parts: tuple[Part, ...] = (
            InSession(spoiler, of_session),
            InDropin(spoiler, place),
            InBatch(spoiler, prompted, of_batch),
            InServer(spoiler, runner, client, service),
        )

        def trial(number: int) -> Outcome:
            """Spoil every step of one image, in each place in turn."""
            try:
                return parts[number % len(parts)](random.Random(number))
            finally:
                spoiler.poison = None
                spoiler.open.set()

        yield trial


PROMISE = Promise(
    name="non-finite",
    promised="An engine that gives NaN or infinity costs one step of one image, and no bit of its neighbours.",
    tried="NaN or infinity written into the prediction or the branches of an engine, at every step of an image, in a "
    "session, the drop-in, a batch and the server.",
    prepare=prepare,
    trials=400,
    short=4,
    seconds=0.22,
)
