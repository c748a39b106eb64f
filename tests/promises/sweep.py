"""An analysis that is killed many times ends as one that nobody killed, and makes no finished job again.

Times never repeat, and decide which ablations are measured. So both analyses get the same ones.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec

from tests.promises.desk import Desk, Process
from tests.promises.promise import Outcome, Place, Promise, Trial
from unetc.analyzer.ablation import PeriodicTreatment
from unetc.analyzer.sweep import Batch, Course, Swept
from unetc.artifacts.profile import Effect, Estimate
from unetc.jobs import InProcess, finish
from unetc.treatments import Treatment

RESUMED_S = "CPU seconds to find 10,000 finished jobs"
REPEATED = "jobs given out again for one killed worker"


class Drivers:
    """Runs one analysis on this machine, from a capture that is in the cache."""

    def __init__(self, place: Place, desk: Desk, bins: int) -> None:
        """Begin nothing yet."""
        self._desk = desk
        self._captured = place.captured
        options = ("--steps", bins, "--samples", 2, "--bins", bins, "--batch", 2, "--threads", 1, "--exhaustive")
        kept = ("--components", "mid_block.*", "--cache", "cache", "-o", "profile.json")
        self._command = ("analyze", place.tiny_model, *options, *kept)

    def begin(self) -> None:
        """Forget all results."""
        folder = self._desk.folder
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tmp").mkdir(parents=True)
        for name, graph in self._captured.items():
            shutil.copytree(graph, folder / name)

    def complete(self) -> dict[str, bytes]:
        """Run a driver to its end; return all results."""
        done = self._desk.run(self._command, clock="clock")
        assert done.code == 0, done.words
        return {path.name: path.read_bytes() for path in (self._desk.folder / "profile.json", *self._finished())}

    def kill(self, jobs: int, delay_s: float) -> bool:
        """Run a driver, and kill it some time after it has finished some jobs; tell whether it was there."""

        def wait(driver: Process) -> None:
            while self.finished < jobs and not driver.ends_within(0.005):
                pass
            driver.ends_within(delay_s)
            driver.send(signal.SIGKILL)

        return self._desk.run(self._command, clock="clock", meanwhile=wait).killed

    @property
    def finished(self) -> int:
        """Count the finished jobs."""
        return sum(1 for _ in self._finished())

    def marks(self) -> dict[str, tuple[int, int]]:
        """Mark the files of finished jobs: a job that runs again replaces its own."""
        return {path.name: ((own := path.stat()).st_ino, own.st_mtime_ns) for path in self._finished()}

    def _finished(self) -> Iterator[Path]:
        return (self._desk.folder / "cache").glob("*/damage-*/bin*.json")


def killed_drivers(place: Place, dice: random.Random, *, kills: int, bins: int) -> Outcome:
    """Kill the driver of an analysis in one process, and run it again each time."""
    with Desk(place.own / "work") as desk:
        drivers = Drivers(place, desk, bins)
        drivers.begin()
        begun = time.monotonic()
        expected = drivers.complete()
        jobs = drivers.finished
        longest_s = 2 * (time.monotonic() - begun) / jobs
        drivers.begin()
        killed = again = 0
        marks: dict[str, tuple[int, int]] = {}
        for count in sorted(dice.choices(range(jobs), k=kills)):
            killed += drivers.kill(count, dice.uniform(0.0, longest_s))
            again += _replaced(marks, marks := drivers.marks())
        results = drivers.complete()
        again += _replaced(marks, drivers.marks())
    broken = [f"{again} finished jobs ran again or are lost"] * bool(again)
    broken += [f"{name} differs" for name in expected if results.get(name) != expected[name]]
    broken += [f"{name} should not be" for name in results.keys() - expected.keys()]
    return Outcome(tries=killed, broken=tuple(broken))


def _replaced(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> int:
    return sum(after.get(name) != mark for name, mark in before.items())


def killed_workers(place: Place, dice: random.Random, *, kills: int) -> Outcome:
    """Kill workers of an analysis on Ray; the driver gives their jobs out again."""
    os.environ.setdefault("UNETC_TESTS_SHARED", str(place.shared))
    from tests.analyzer.on_ray import check_kills, options_of  # imported late: Ray takes long
    from tests.bare_cluster import bare_cluster

    absent = place.own / "absent"
    absent.mkdir()
    given_out = Lines("is given out again")
    log = logging.getLogger("unetc.ray_workers")
    log.addHandler(given_out)
    log.setLevel(logging.INFO)
    try:
        with bare_cluster(absent, cpus=2):
            check_kills(kills, options_of(steps=12, samples=8, bins=6, decisive=None), place.own / "ray")
    finally:
        log.removeHandler(given_out)
    return Outcome(tries=kills, figures={REPEATED: given_out.count / kills})


class Lines(logging.Handler):
    """Counts lines of a log."""

    def __init__(self, with_text: str) -> None:
        """Count nothing yet."""
        super().__init__()
        self._text = with_text
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a line."""
        self.count += self._text in record.getMessage()


def finished_before(place: Place, dice: random.Random, *, jobs: int) -> Outcome:
    """Find the results of many finished jobs, none of which may run again."""
    folder, periodic = place.own / "finished", PeriodicTreatment(treatment=Treatment.DROP, period=1)
    folder.mkdir()
    batches = [
        Batch(bin=0, periodic=periodic, names=tuple(f"blocks.{i}.{k}" for k in range(8)), calls=8) for i in range(jobs)
    ]
    for batch in batches:
        (folder / batch.name).write_bytes(msgspec.json.encode(_result_of(batch)))
    nobody: InProcess[Course] = InProcess(bench=None)  # type: ignore[arg-type]
    begun = time.process_time()
    found = finish(nobody, batches, folder)
    seconds = time.process_time() - begun
    lost = sum(result is None for result in found)
    return Outcome(broken=(f"{lost} jobs are lost",) * bool(lost), figures={RESUMED_S: seconds})


def _result_of(batch: Batch) -> Swept:
    damage = Estimate(mean=0.2, low=0.1, high=0.3)
    effects = tuple(
        Effect(
            component=name,
            treatment=batch.periodic.treatment,
            period=1,
            bin=batch.bin,
            measured=True,
            relative_l2=damage,
        )
        for name in batch.names
    )
    return Swept(effects=effects, non_finite=())


PLANS: tuple[Callable[[Place, random.Random], Outcome], ...] = (
    partial(killed_drivers, kills=2, bins=2),
    partial(killed_drivers, kills=50, bins=8),
    partial(killed_workers, kills=50),
    partial(finished_before, jobs=10_000),
)
"""The trials; the first one is short."""


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Give every trial a folder."""

    def trial(number: int) -> Outcome:
        """Run one of the plans."""
        own = place.own / str(number)
        own.mkdir()
        return PLANS[number](Place(shared=place.shared, own=own), random.Random(number))

    yield trial


PROMISE = Promise(
    name="sweep",
    promised="An analysis whose processes are killed again and again ends in the same profile, bit by bit; no job is "
    "lost, and a kill repeats at most the jobs that were running.",
    tried="SIGKILL of the process of an analysis, which is run again each time, and of workers of an analysis on Ray; "
    "then one that has 10,000 finished jobs goes on.",
    prepare=prepare,
    trials=len(PLANS),
    short=1,
    seconds=98,
    limits={RESUMED_S: 2.0, REPEATED: 1.0},
)
