"""A command that may not take the memory that it needs says so, loses nothing and leaves nothing behind."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx2

from tests.promises.commands import commands_of, desks
from tests.promises.limits import Limits, held
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.promises.shortage import tried
from tests.server.live import serving

UNIT_BYTES = 2**16

IMAGES = "/v1/images/generations"
SMALL = {"n": 1, "seed": 1, "response_format": "b64_json"}
LARGE = {**SMALL, "n": 16, "size": "64x64"}
"""Has 256 times the pixels of `SMALL`, and attention between them."""


@contextmanager
def limited(room: int) -> Iterator[Limits]:
    """Let a process take only some units of memory more than it has when it begins."""
    yield Limits(memory=UNIT_BYTES * room)


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """List the commands."""
    light, heavy = commands_of(place)
    with desks(place.own) as both:

        def trial(number: int) -> Outcome:
            """Run one command with too little memory; in turns, take memory away from a server that runs."""
            dice = random.Random(number)
            turn, kind = divmod(number, len(light))
            if turn % 4 == 3:
                return served(str(place.tiny_build / "bundle"), UNIT_BYTES * dice.randrange(2**10))
            command = heavy[turn // 4 % len(heavy)] if turn % 4 == 2 and kind == 0 else light[kind]
            return tried(
                both.desk(heavy=command.heavy),
                command,
                limited,
                dice.randrange(2**10 if command.heavy else 2**9),
                ("memory",),
                older=dice.random() < 0.5,
                cache=place.cache if dice.random() < 0.75 else None,
            )

        yield trial


def served(bundle: str, room: int) -> Outcome:
    """Ask a server for much while it may take little memory, and for little once it may take more again."""
    with serving(bundle) as server:
        before = server.post(IMAGES, SMALL).json()["data"]
        process, (_, most) = server.process.pid, resource.prlimit(server.process.pid, resource.RLIMIT_DATA)
        answer = None
        with suppress(httpx2.TransportError):
            while room and (answer is None or answer.status_code == 200):
                resource.prlimit(process, resource.RLIMIT_DATA, (held(process) + room, most))
                answer = server.post(IMAGES, LARGE)
                room //= 2
        if (server.process.poll() or 0) < 0 or answer is None or answer.status_code == 200:
            return Outcome(tries=0)
        resource.prlimit(process, resource.RLIMIT_DATA, (most, most))
        again = server.post(IMAGES, SMALL)
        server.terminate()
        code, errors = server.wait()
    problems = {
        f"does not name the lack: {answer.status_code} {answer.text[:300]}": "memory" in answer.text,
        f"with memory, says {again.status_code} {again.text[:300]}": again.status_code == 200
        and again.json()["data"] == before,
        f"ended with {code}: {errors[-600:]}": code == 0,
    }
    return Outcome(broken=tuple(f"server, room for {room}: {text}" for text, kept in problems.items() if not kept))


PROMISE = Promise(
    name="memory",
    promised="Too little memory is an error that says so; nothing is lost or left behind, and with memory the same "
    "command completes or the same server goes on.",
    tried="Limits of memory (RLIMIT_DATA) of any size at which sample, export, serve, build, analyze and pareto fail, "
    "also under a server that runs. Where a native library ends the process, nothing is lost, but no try counts.",
    prepare=prepare,
    trials=120,
    short=3,
    seconds=12.0,
)
