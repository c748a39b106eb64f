"""No document, schedule or request that anybody makes up causes a traceback, a hang or an answer of status 500."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shutil
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import numpy as np
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

import unetc
from tests.disguises import Hang, within
from tests.ground.records import ARTIFACTS, CLASSES
from tests.promises import grammar
from tests.promises.audit import Event, heard
from tests.promises.mutation import documents
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.promises.requests import BODIES, PROMPTED, Sent, bodies, is_error, tensors
from tests.runtime.forgery import reseal
from tests.server.bundles import make_free_server
from tests.server.local import local
from unetc.artifacts import Plan, Profile
from unetc.artifacts.manifest import MANIFEST
from unetc.artifacts.record import Artifact
from unetc.cli import summary
from unetc.compiler.planner.planner import PlanOptions, make_plan
from unetc.errors import UnetcError
from unetc.runtime.bundle import Bundle
from unetc.sampler.table import SchedulerHeader, SchedulerTables, update
from unetc.server.app import make_app

LARGEST = 10**6
"""Most values of a sample that is made; larger ones only take time."""
SECONDS = 30
"""After which a case counts as a hang."""
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
QUIET = hypothesis.settings(
    database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=False
)

Check = Callable[[Any], None]
"""Tries one case; raises unless it is accepted, or refused as it should be."""
Answer = Callable[[Sent], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class Tried:
    """Cases of one trial."""

    cases: int = 0
    broken: list[str] = field(default_factory=list)

    def run(self, cases: st.SearchStrategy[Any], count: int, seed: int, check: Check) -> None:
        """Try cases until there are as many, or there are no more."""

        @hypothesis.seed(seed)
        @hypothesis.settings(QUIET, max_examples=count)
        @hypothesis.given(cases)
        def each(case: Any) -> None:
            self.cases += 1
            try:
                with within(SECONDS):
                    check(case)
            except UnetcError:
                pass
            except (Exception, Hang) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                self.broken.append(
                    f"{type(error).__name__}: {error} at {Path(place.filename).name}:{place.lineno} for {case!r:.300}"
                )

        with suppress(Unsatisfiable):  # nothing breaks a schema that allows everything
            each()


# Artifacts


def check_artifact(kind: type[Artifact]) -> Check:
    """Decode a document, and use it as the command line does."""

    def check(text: bytes) -> None:
        artifact = kind.from_json(text, "here")
        assert kind.from_json(artifact.to_json(), "here").to_json() == artifact.to_json()
        if isinstance(artifact, Profile):
            profile_is_used(artifact)
        else:
            json.dumps(summary.facts(artifact, Path("here")))  # type: ignore[arg-type]
            summary.render(artifact)  # type: ignore[arg-type]
        if isinstance(artifact, Plan):
            ends = (artifact.phases[0].low, artifact.phases[-1].high)
            artifact.schedule(np.linspace(*ends, 20).tolist() if math.isfinite(ends[1] - ends[0]) else ends)

    return check


def profile_is_used(profile: Profile) -> None:
    """Rank the components, and plan."""
    json.dumps(summary.profile_facts(profile, Path("here"), by=summary.By.WORTH, top=None, bin=None))
    summary.profile_table(profile, by=summary.By.DAMAGE)
    make_plan(profile, PlanOptions(budget=0.1))


def bundle_cases(original: Path, own: Path) -> tuple[st.SearchStrategy[bytes], Check]:
    """Make manifests that an attacker has resealed, in a bundle whose other files are as they were."""
    bundle = Path(shutil.copytree(original, own / "forged"))

    def check(text: bytes) -> None:
        reseal(bundle, text)
        session = unetc.load(bundle, target="null")
        if math.prod(session.sample_shape) <= LARGEST:
            session.sample(seed=0)

    return documents((original / MANIFEST).read_text()), check


# Schedules


def schedule_cases(bundle: Path) -> tuple[st.SearchStrategy[tuple[bytes, int, float]], Check]:
    """Make headers of a scheduler's tables, with an array in which one number differs."""
    opened = Bundle.open(bundle)
    tables = opened.tables or {"own": opened.scheduler}
    packed = [table.to_array() for table in tables.values()]
    headers = tuple(msgspec.json.encode(header).decode() for header, _ in packed)
    arrays = {len(array): array for _, array in packed}
    numbers = st.floats() | st.sampled_from([0.0, 1.0, -1.0, 1e308])

    def check(case: tuple[bytes, int, float]) -> None:
        text, place, number = case
        try:
            header = msgspec.json.decode(text, type=SchedulerHeader)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return  # an artifact refuses it in words, which other cases try
        for array in arrays.values():
            changed = array.copy()
            changed.flat[place % changed.size] = number
            schedule_is_used(SchedulerTables.from_array(header, changed))

    return st.tuples(documents(*headers), st.integers(0, 2**30), numbers), check


def schedule_is_used(tables: SchedulerTables) -> None:
    """Take a first step along every table, and look noise levels up."""
    for count in tables.counts[:3]:
        table = tables.table(count)
        first = table.first_step(1.0)
        table.first_step(0.5) if count > 1 else None
        sample = np.zeros((1, 1, 2, 2), np.float32)
        with np.errstate(all="ignore"):
            update(table.starting_at(first), first, [sample], [sample], noise=sample, variance=sample)
    tables.log_snr_at(float(tables.noise_levels()[0][0]))
    tables.to_array()


# Requests


@asynccontextmanager
async def answering(bundle: Path) -> AsyncIterator[tuple[dict[str, Any], Answer]]:
    """Serve a bundle; give the description of the server, and a function that sends a request and checks the answer."""
    options: dict[str, Any] = {"images": 2, "pixels": 4096, "queue": 8, "jobs": 20, "deadline": 10.0}
    async with local(bundle, body_bytes=2**16, **options) as (client, service):

        async def answer(request: Sent) -> None:
            got = await client.request(
                request.method, request.path, content=request.body, headers=request.headers, params=request.query
            )
            told = f"{request.method} {request.path}: {got.status_code} {got.text[:200]}"
            assert got.status_code < 500 or got.status_code in (503, 504), told
            if got.status_code >= 400 and request.method != "HEAD":
                assert is_error(request.path, got), told

        yield make_app(service).openapi(), answer


class Logged(logging.Handler):
    """Keeps the tracebacks that the product logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        if record.exc_info:
            self.found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


@contextmanager
def tracebacks() -> Iterator[list[str]]:
    """List the tracebacks that the product logs."""
    handler = Logged()
    logging.getLogger("unetc").addHandler(handler)
    try:
        yield handler.found
    finally:
        logging.getLogger("unetc").removeHandler(handler)


def outside(events: Sequence[Event]) -> list[str]:
    """List the addresses of other machines in events."""
    addresses = [address for _, arguments in events for address in arguments if isinstance(address, tuple | str)]
    hosts = [address[0] if isinstance(address, tuple) else address for address in addresses]
    return [f"{host} was addressed" for host in hosts if not str(host).startswith(("127.", "::1", "localhost"))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of cases."""

    name: str
    cases: Sequence[st.SearchStrategy[Any]]
    """Strategies that take turns."""
    check: Check
    count: int
    """Cases of one trial."""


def artifact_kinds(build: Path, own: Path) -> Iterator[Kind]:
    """List the kinds of cases that are files."""
    files = {"manifest": "bundle/manifest.json", "plan": "plan.json", "profile": "profile.json"}
    for name, strategy in ARTIFACTS.items():
        texts = tuple((build / file).read_text() for kind, file in files.items() if kind == name)
        cases = documents(*texts, *made(strategy))
        yield Kind(name=name, cases=(cases,), check=check_artifact(CLASSES[name]), count=40)
    forged, check = bundle_cases(build / "bundle", own)
    yield Kind(name="bundle", cases=(forged,), check=check, count=20)
    scheduled, check_schedule = schedule_cases(build / "bundle")
    yield Kind(name="schedule", cases=(scheduled,), check=check_schedule, count=40)

    def check_any(case: tuple[type[Artifact], bytes]) -> None:
        check_artifact(case[0])(case[1])

    yield Kind(name="schema", cases=grammar.artifacts(CLASSES), check=check_any, count=3)


def made(artifacts: st.SearchStrategy[Artifact], count: int = 5) -> tuple[str, ...]:
    """Make a few valid artifacts."""
    found: list[str] = []

    @hypothesis.seed(0)
    @hypothesis.settings(QUIET, max_examples=count)
    @hypothesis.given(artifacts)
    def keep(artifact: Artifact) -> None:
        found.append(artifact.to_json().decode())

    keep()
    return tuple(found)


def request_kinds(description: Mapping[str, Any], check: Check) -> Iterator[Kind]:
    """List the kinds of cases that are requests."""
    for path in BODIES:
        yield Kind(name=path, cases=(bodies(BODIES, path),), check=check, count=20)
    yield Kind(name="tensors", cases=(tensors(),), check=check, count=20)
    yield Kind(name="OpenAPI", cases=grammar.requests(description), check=check, count=3)


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Serve a bundle, and list the kinds of cases."""
    build = place.tiny_build
    with asyncio.Runner() as runner, ExitStack() as servers:

        def serve(bundle: Path) -> tuple[dict[str, Any], Check]:
            server = answering(bundle)
            description, answer = runner.run(server.__aenter__())
            servers.callback(lambda: runner.run(server.__aexit__(None, None, None)))
            return description, lambda request: runner.run(answer(request))

        @cache
        def prompted() -> Check:
            return serve(make_free_server(place.shared) / "bundle")[1]

        prompts = bodies(PROMPTED, *PROMPTED)
        kinds = [
            *artifact_kinds(build, place.own),
            *request_kinds(*serve(build / "bundle")),
            Kind(name="prompts", cases=(prompts,), check=lambda request: prompted()(request), count=20),
        ]  # the last kind is not among the short trials: a model with text encoders takes minutes to build

        def trial(number: int) -> Outcome:
            """Try some cases of one kind."""
            turn, which = divmod(number, len(kinds))
            kind = kinds[which]
            tried = Tried()
            with heard(*NETWORK) as addressed, tracebacks() as logged:
                tried.run(kind.cases[turn % len(kind.cases)], kind.count, number, kind.check)
            problems = (*tried.broken, *logged, *outside(addressed))
            return Outcome(tries=tried.cases, broken=tuple(f"{kind.name}: {one}" for one in problems))

        yield trial


PROMISE = Promise(
    name="fuzz",
    promised="No artifact, schedule or request causes a traceback, a hang or status 500; nothing leaves the machine.",
    tried=(
        "Valid documents and requests changed in up to three places, and cases that schemathesis makes from the "
        "schemas of the artifacts and the OpenAPI description of the server."
    ),
    prepare=prepare,
    trials=4320,
    short=17,
    seconds=0.12,
)
