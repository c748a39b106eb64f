"""Workers of a Ray cluster.

A worker is an actor: a process that keeps one bench. Each has one job at a time, so that none begins after a deadline,
and a worker that dies costs one job. The job is given out again, and a new process takes the worker's place.

Everything that a bench needs travels through Ray's object store. Workers need unetc and the libraries of the target.

Source:
    https://docs.ray.io/en/latest/ray-core/actors.html
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import unetc
from unetc.environment import cores
from unetc.errors import UnetcError, WorkerError, brief
from unetc.jobs import Advance, Bench, Job, Other, Recipe, Result, Shared, Workers, ignore
from unetc.ray_token import LOCAL

logger = logging.getLogger(__name__)

MOST_TRIES = 5
"""Times that a job is given out before the work ends with an error, and times that a worker is started in a row."""
_ANSWERS_WITHIN_S = 120.0
"""Machines that do not describe themselves within this time are left out, and workers have it to set up their bench
before one of them runs a job alone."""
_CONNECTS_WITHIN_S = 10.0
"""Time within which the head of a cluster accepts a connection."""
_LOOK_EVERY_S = 1.0
"""Interval at which the deadline is looked at while jobs run."""
_LEFT_WITHIN_S = 10.0
"""Others have this time to leave a machine before all workers give way to one that waits for the whole machine."""


_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""Settings of a cluster that is started. It does not report its use. Workers are timed like any other process. Servers
run in Ray's event loop: with two loops, every request would wake two threads, which compete with the engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Needs of one worker."""

    cpus: int
    gpu: bool
    """Whether it has a GPU, which no other worker shares."""
    describe: Callable[[], str]
    """Describes the machine on which it is called; only machines with equal descriptions work together."""
    most_workers: int | None = None


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Join a cluster, or start one for as long as the context is open.

    A program that has joined a cluster stays in it, whatever the address.

    Raises:
        WorkerError: If there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    started: dict[str, Any] = {"num_cpus": cores(), "include_dashboard": False} if address == LOCAL else {}
    try:
        connect(address, **started)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        raise WorkerError(
            f"cannot join a Ray cluster at {address}: {brief(error)}. Give the address of its head, as host:6379, auto "
            f"for the one on this machine, or {LOCAL} to start one."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def connect(address: str, **options: Any) -> None:
    """Join a cluster, or start one, without a word from Ray.

    Args:
        address: The address, or `LOCAL`.
        options: Further arguments of `ray.init`.

    Raises:
        OSError: If nothing answers at the address.
        RuntimeError: If Ray refuses, or does not start in time.
        ValueError: If the address is none.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    _reach(address)
    try:
        with _own_end():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:
        if type(error) is Exception:  # as Ray says that a node has not started within half a minute
            raise RuntimeError(str(error)) from error
        raise


@contextmanager
def _own_end() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray sets one that ends it without a word, with another exit code."""
    answer = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # elsewhere Ray sets none
            signal.signal(signal.SIGTERM, answer)


def _reach(address: str) -> None:
    """Connect to a host and port, because Ray goes on trying for minutes.

    Raises:
        OSError: If nothing answers.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_CONNECTS_WITHIN_S).close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Machines of one kind, with seats for workers."""

    kind: str
    seats: Sequence[_Seat]
    notes: tuple[str, ...]
    """Why others were left out."""


def machines_of(needs: Needs) -> Machines:
    """Choose the machines of the joined cluster that work: the kind with room for most workers.

    Raises:
        WorkerError: If there is room for none.
    """
    kinds, notes = _kinds(needs)
    if not kinds:
        what = "a GPU" if needs.gpu else f"{needs.cpus} CPUs for the threads of one worker"
        raise WorkerError(
            f"no machine of the cluster has {what} and unetc {unetc.__version__}. "
            f"{' '.join(f'{note}.' for note in notes)} Check the cluster with `ray status`, or analyse with "
            "fewer --threads."
        )
    chosen = max(kinds, key=lambda kind: len(kinds[kind]))
    notes += [
        f"{_counted(len(seats))} on {kind} left out: results and times of unlike machines do not mix"
        for kind, seats in kinds.items()
        if kind != chosen
    ]
    return Machines(kind=chosen, seats=kinds[chosen][: needs.most_workers], notes=tuple(notes))


def workers_of(recipe: Recipe[Bench], machines: Machines) -> RayWorkers[Bench]:
    """Put workers into the seats of machines; they start with the first job."""
    crew = _Crew(ray.put(recipe), [replace(seat) for seat in machines.seats])
    return RayWorkers(crew=crew, machine=machines.kind, notes=machines.notes)


def _counted(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _kinds(needs: Needs) -> tuple[dict[str, list[_Seat]], list[str]]:
    """Group the seats for workers by the kind of their machine; note the machines that have none."""
    kinds: dict[str, list[_Seat]] = {}
    notes = []
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    asked = {
        ray.remote(_describe).options(num_cpus=0, scheduling_strategy=_on(node)).remote(needs.describe): node
        for node in nodes
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWERS_WITHIN_S)
    for answer in silent:
        notes.append(f"the machine {nodes[asked[answer]]['NodeManagerHostname']} was left out: it does not answer")
    for answer in answered:
        node = nodes[asked[answer]]
        try:
            kind, version = ray.get(answer)
        except RayError as error:
            notes.append(f"the machine {node['NodeManagerHostname']} was left out: {_said(error)}")
            continue
        if version != unetc.__version__:
            notes.append(f"the machine {node['NodeManagerHostname']} was left out: it has unetc {version}")
            continue
        cpus, gpus = node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)
        count = int(gpus if needs.gpu else cpus // needs.cpus)
        seat = _Seat(node=node["NodeID"], cpus=1 if needs.gpu else needs.cpus, all_cpus=cpus, gpus=int(needs.gpu))
        if count:
            kinds.setdefault(kind, []).extend(replace(seat) for _ in range(count))
    return kinds, notes


def _describe(describe: Callable[[], str]) -> tuple[str, str]:
    return describe(), unetc.__version__


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


class _Worker:
    """A process that keeps a bench."""

    def open(self, recipe: Recipe[Any]) -> None:
        """Set up the bench."""
        self._bench = recipe.open()

    def run(self, job: Job[Any, Any], *shared: Shared[Any, Any]) -> Any:
        """Run a job."""
        bench = self._bench
        for extension in shared:
            bench = extension.on(bench)
        return job.run(bench, ignore)


@dataclass(slots=True, kw_only=True, eq=False)
class _Seat:
    """A place for a worker: its machine, its share of the machine, and the worker's state."""

    node: str
    cpus: float
    all_cpus: float
    """CPUs of the machine."""
    gpus: int
    actor: Any = None
    answer: Any = None
    """The object that the worker is making; None if it waits for a job."""
    position: int | None = None
    """Position of its job; None while it sets up its bench."""
    failed: int = 0
    """Times that setting up failed in a row."""

    def start(self, recipe: Any) -> None:
        """Start a worker."""
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0}
        self.actor = ray.remote(_Worker).options(scheduling_strategy=_on(self.node), **options).remote()
        self.answer, self.position = self.actor.open.remote(recipe), None

    def stop(self) -> None:
        """Stop the worker, so that its share of the machine is free."""
        if self.actor is not None:
            ray.kill(self.actor)
        self.actor = self.answer = self.position = None

    def alone(self) -> _Seat:
        """Return a seat for a worker that has all CPUs of the machine."""
        return replace(self, cpus=self.all_cpus, actor=None, answer=None, position=None)


class _Rest:
    """A process that does nothing; it takes the CPUs of a machine that workers leave free."""

    def here(self) -> None:
        """Answer."""


class _Crew:
    """The workers of all seats, or a single one that has its machine for itself."""

    def __init__(self, recipe: Any, seats: Sequence[_Seat]) -> None:
        self._recipe = recipe
        self._seats = list(seats)
        self._working: list[_Seat] = []

    @property
    def count(self) -> int:
        """Number of seats."""
        return len(self._seats)

    def spread(self, jobs: Iterable[Job[Any, Any] | None], shared: tuple[Any, ...], deadline: float) -> Iterator[Any]:
        """Run jobs on all workers; see `Workers.run`."""
        jobs = iter(jobs)
        if (first := next(jobs, None)) is None:
            return iter(())
        if self._working is not self._seats:
            self._start(self._seats)
        return self._run(self._working, chain((first,), jobs), shared, deadline)

    def spread_over_one(self, job: Job[Any, Any], shared: tuple[Any, ...]) -> Any:
        """Run a job on a worker that has its machine for itself; the others keep their benches and wait."""
        longest = _ANSWERS_WITHIN_S
        if not self._working:
            self._start(self._seats)
            longest = math.inf  # a worker alone would take as long
        if self._working is self._seats and self._settled(longest):
            with self._rest_of(self._seats[0]) as taken:
                if taken:
                    ((_, result),) = self._run(self._seats[:1], (job,), shared, math.inf)
                    return result
        if self._working is self._seats:
            self._start([self._seats[0].alone()])
        ((_, result),) = self._run(self._working, (job,), shared, math.inf)
        return result

    def _start(self, seats: list[_Seat]) -> None:
        """Stop the workers, and start others."""
        for seat in self._working:
            seat.stop()
        self._working = seats
        for seat in seats:
            seat.start(self._recipe)

    def _settled(self, longest: float) -> bool:
        """Wait until no worker of the first machine sets up its bench, which would disturb a timing.

        Args:
            longest: Most seconds to wait.

        Returns:
            False if one does not end in time.
        """
        deadline = time.monotonic() + longest
        while any(seat.answer is not None for seat in self._seats if seat.node == self._seats[0].node):
            if time.monotonic() >= deadline:
                return False
            self._ended(self._seats)
        return True

    @contextmanager
    def _rest_of(self, seat: _Seat) -> Iterator[bool]:
        """Take the CPUs of a machine that workers leave free; False if others do not leave them."""
        cpus = seat.all_cpus - sum(other.cpus for other in self._seats if other.node == seat.node)
        if cpus <= 0:
            yield True
            return
        rest = ray.remote(_Rest).options(num_cpus=cpus, scheduling_strategy=_on(seat.node)).remote()
        try:
            taken, _ = ray.wait([rest.here.remote()], timeout=_LEFT_WITHIN_S)
            yield bool(taken)
        finally:
            ray.kill(rest)

    def _run(
        self, seats: list[_Seat], jobs: Iterable[Job[Any, Any] | None], shared: tuple[Any, ...], deadline: float
    ) -> Iterator[Any]:
        fresh, given = iter(jobs), list[Job[Any, Any]]()
        again, tries = deque[int](), Counter[int]()
        while True:
            none_left = time.monotonic() >= deadline
            for seat in seats:
                if seat.answer is not None or none_left:
                    continue
                if (job := next(fresh, None)) is not None:
                    given.append(job)
                    seat.position = len(given) - 1
                elif again:  # a job that kills every worker comes last
                    seat.position = again.popleft()
                else:
                    none_left = True
                    continue
                seat.answer = seat.actor.run.remote(given[seat.position], *shared)
            if none_left and all(seat.position is None for seat in seats):
                return
            for position, result, error in self._ended(seats):
                if position is None:
                    continue
                if error is None:
                    yield position, result
                    continue
                tries[position] += 1
                if tries[position] == MOST_TRIES:
                    raise WorkerError(
                        f"{given[position].name} failed {MOST_TRIES} times on the cluster; the last time: "
                        f"{_said(error)}. The same command continues from the results in its cache."
                    ) from error
                logger.info("%s is given out again: %s", given[position].name, _said(error))
                again.append(position)

    def _ended(self, seats: list[_Seat]) -> list[tuple[int | None, Any, RayError | None]]:
        """Wait a moment for workers to end a job or their set-up; return the position, the result and the error."""
        answers = {seat.answer: seat for seat in seats if seat.answer is not None}
        ended, _ = ray.wait(list(answers), num_returns=1, timeout=_LOOK_EVERY_S)
        outcomes: list[tuple[int | None, Any, RayError | None]] = []
        for answer in ended:
            seat = answers[answer]
            position = seat.position
            try:
                outcomes.append((position, ray.get(answer), None))
            except RayError as error:
                self._start_again(seats, seat, error)
                outcomes.append((position, None, error))
                continue
            seat.answer = seat.position = None
            seat.failed = 0
        return outcomes

    def _start_again(self, seats: list[_Seat], seat: _Seat, error: RayError) -> None:
        """Give a seat another worker if its own has died, unless its machine fails again and again.

        Raises:
            UnetcError: If a job or the set-up raised it: it would be the same everywhere.
            WorkerError: If no seat is left.
        """
        if isinstance(error, RayTaskError) and isinstance(error.cause, UnetcError):
            raise error.cause
        if isinstance(error, RayTaskError) and seat.position is not None:
            seat.answer = seat.position = None
            return
        seat.failed = seat.failed + 1 if seat.position is None else 0
        seat.stop()
        if seat.failed < MOST_TRIES:
            seat.start(self._recipe)
            return
        for places in (seats, self._working):
            if seat in places:
                places.remove(seat)
        if not seats:
            raise WorkerError(
                f"no worker of the cluster can be started; the last one: {_said(error)}. Check the cluster with "
                "`ray status`. The same command continues from the results in its cache."
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RayWorkers(Workers[Bench]):
    """Workers on machines of one kind."""

    crew: _Crew
    shared: tuple[Any, ...] = ()
    """Extensions of the benches, in the object store."""
    machine: str
    notes: tuple[str, ...] = field(default=())

    @property
    def count(self) -> int:
        """Number of workers."""
        return self.crew.count

    def __str__(self) -> str:
        """Count them in words."""
        return _counted(self.count)

    def run(
        self, jobs: Iterable[Job[Bench, Result] | None], *, deadline: float = math.inf, advance: Advance = ignore
    ) -> Iterator[tuple[int, Result]]:
        """Run jobs on all workers.

        Raises:
            WorkerError: If a job fails again and again, or no worker is left.
        """
        return self.crew.spread(jobs, self.shared, deadline)

    def run_alone(self, job: Job[Bench, Result], advance: Advance = ignore) -> Result:
        """Run a job on a worker that holds all CPUs of its machine."""
        result: Result = self.crew.spread_over_one(job, self.shared)
        return result

    def sharing(self, shared: Shared[Bench, Other]) -> Workers[Other]:
        """Put the extension of the benches into the object store."""
        extended = (*self.shared, ray.put(shared))
        return RayWorkers(crew=self.crew, shared=extended, machine=self.machine, notes=self.notes)


def _said(error: RayError) -> str:
    """Describe the failure of a worker in one line."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {brief(cause)}" if isinstance(cause, Exception) else brief(error)
