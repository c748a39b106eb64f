"""Jobs: parts of a long measurement that each run by themselves, in this process or on other machines.

A job is a frozen value that can travel. It runs on a *bench*, which keeps a loaded model or anything else that takes
long to set up. Results of long jobs are files, written by the process that hands out the jobs. Any process may die at
any moment; the next run reads the files and goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from unetc.arguments import plain_fields
from unetc.artifacts.record import write_atomically
from unetc.errors import WorkerError

Bench = TypeVar("Bench")
Other = TypeVar("Other")
Result = TypeVar("Result")
BenchIn = TypeVar("BenchIn", contravariant=True)
BenchOut = TypeVar("BenchOut", covariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

Advance = Callable[[int], None]
"""Called with the amount of work that is done so far."""


def ignore(done: int) -> None:
    """Discard the progress."""


class Job(Protocol[BenchIn, ResultOut]):
    """A part of the work."""

    @property
    def name(self) -> str:
        """Name in messages; it tells the job from all others that run on equal benches."""

    def run(self, bench: BenchIn, advance: Advance) -> ResultOut:
        """Run on a bench. The result depends on nothing else, so it may run again."""


class FileJob(Job[BenchIn, ResultOut], Protocol[BenchIn, ResultOut]):
    """A job whose result is a file; its name is the name of the file."""

    @property
    def calls(self) -> int:
        """Amount of work."""

    def read(self, path: Path) -> ResultOut | None:
        """Read the result; None if it is missing, damaged or of another job."""


class Recipe(Protocol[BenchOut]):
    """How to set up a bench; it travels in place of the bench."""

    def open(self) -> BenchOut:
        """Set up the bench."""


class Shared(Protocol[BenchIn, BenchOut]):
    """An extension of benches that became known after they were set up; it travels once for many jobs."""

    def on(self, bench: BenchIn) -> BenchOut:
        """Extend a bench."""


class Workers(Protocol[BenchOut]):
    """Benches of one kind, on one machine or many, and who runs jobs on them."""

    @property
    def machine(self) -> str:
        """Kind of the machines: the processor or GPU, and the libraries that compute."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the machines for the user."""

    def run(
        self, jobs: Iterable[Job[BenchOut, Result] | None], *, deadline: float = math.inf, advance: Advance = ignore
    ) -> Iterator[tuple[int, Result]]:
        """Run jobs, and yield the position and the result of each as it ends, in any order.

        Args:
            jobs: The jobs. Each is taken when a worker is free for it, so it may depend on results that were yielded.
                None in place of a job: there is none before another result; it has no position.
            deadline: Time of the monotonic clock after which no job begins.
            advance: Told how far a job is, if jobs run one by one.
        """

    def run_alone(self, job: Job[BenchOut, Result], advance: Advance = ignore) -> Result:
        """Run a job while nothing else runs on its machine."""

    def sharing(self, shared: Shared[BenchOut, Other]) -> Workers[Other]:
        """Return workers with extended benches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A Ray cluster that runs jobs; see `unetc.ray_workers`."""

    address: str
    """Address of its head, `auto`, or `local`: a cluster on this machine that lasts as long as the work."""
    most_workers: int | None = None
    """Most workers; None for as many as there is room for."""

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            WorkerError: If it is not whole.
        """
        plain_fields(self, WorkerError)


@dataclass(frozen=True, slots=True, kw_only=True)
class InProcess(Workers[Bench]):
    """This process: it runs jobs one after the other."""

    bench: Bench
    machine: str = "this machine"
    notes: tuple[str, ...] = ()

    def run(
        self, jobs: Iterable[Job[Bench, Result] | None], *, deadline: float = math.inf, advance: Advance = ignore
    ) -> Iterator[tuple[int, Result]]:
        """Run jobs in their order."""
        for position, job in enumerate(jobs):
            if job is None or time.monotonic() >= deadline:
                return
            yield position, job.run(self.bench, advance)

    def run_alone(self, job: Job[Bench, Result], advance: Advance = ignore) -> Result:
        """Run a job."""
        return job.run(self.bench, advance)

    def sharing(self, shared: Shared[Bench, Other]) -> Workers[Other]:
        """Extend the bench."""
        return InProcess(bench=shared.on(self.bench), machine=self.machine, notes=self.notes)


def run_one(workers: Workers[Bench], job: Job[Bench, Result], advance: Advance = ignore) -> Result:
    """Run one job."""
    ((_, result),) = workers.run((job,), advance=advance)
    return result


def run_all(workers: Workers[Bench], jobs: Sequence[Job[Bench, Result]], advance: Advance = ignore) -> list[Result]:
    """Run jobs, and return their results in the order of the jobs.

    Args:
        workers: Who runs them.
        jobs: The jobs.
        advance: Told how many jobs have ended.
    """
    results: dict[int, Result] = {}
    for position, result in workers.run(jobs):
        results[position] = result
        advance(len(results))
    return [results[position] for position in range(len(jobs))]


def finish(
    workers: Workers[Bench],
    jobs: Sequence[FileJob[Bench, Result]],
    folder: Path,
    *,
    deadline: float = math.inf,
    advance: Advance = ignore,
) -> list[Result | None]:
    """Read the results that are already in a folder, and run the other jobs.

    Args:
        workers: Who runs them.
        jobs: The jobs.
        folder: Where results are.
        deadline: Time of the monotonic clock after which no job begins; finished ones are still read.
        advance: Told how much of the work of all jobs is done.

    Returns:
        The result of each job; None if there was no time for it.

    Raises:
        ArtifactError: If the folder cannot be written.
    """
    results = [job.read(folder / job.name) for job in jobs]
    missing = [position for position, result in enumerate(results) if result is None]
    done = sum(job.calls for job, result in zip(jobs, results, strict=True) if result is not None)
    advance(done)
    ended = workers.run(
        [jobs[position] for position in missing], deadline=deadline, advance=lambda own: advance(done + own)
    )
    for place, result in ended:
        job = jobs[missing[place]]
        write_atomically(folder / job.name, msgspec.json.encode(result))
        results[missing[place]] = result
        done += job.calls
        advance(done)
    return results
