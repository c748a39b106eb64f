"""Jobs run in this process, and results that are files are never computed twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from unetc.artifacts.record import Record, read_cached
from unetc.jobs import Advance, InProcess, finish, run_all, run_one


class Square(Record, frozen=True, kw_only=True):
    number: int


@dataclass
class Counter:
    """A bench that remembers the jobs that ran on it."""

    ran: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Squaring:
    number: int

    @property
    def name(self) -> str:
        return f"{self.number}.json"

    @property
    def calls(self) -> int:
        return 10

    def read(self, path: Path) -> Square | None:
        return read_cached(path, Square)

    def run(self, bench: Counter, advance: Advance) -> Square:
        bench.ran.append(self.number)
        advance(5)
        return Square(number=self.number**2)


JOBS = [Squaring(number=number) for number in range(4)]


def test_results_come_in_the_order_of_the_jobs_and_are_computed_once(tmp_path: Path) -> None:
    counter = Counter()
    workers, wanted = InProcess(bench=counter), [Square(number=number**2) for number in range(4)]
    assert finish(workers, JOBS[2:], tmp_path) == wanted[2:]
    assert finish(workers, JOBS, tmp_path) == wanted
    assert counter.ran == [2, 3, 0, 1]
    (tmp_path / JOBS[1].name).write_text("{")
    assert finish(workers, JOBS, tmp_path) == wanted
    assert counter.ran == [2, 3, 0, 1, 1]


def test_progress_counts_what_was_read_and_what_a_job_has_done(tmp_path: Path) -> None:
    workers = InProcess(bench=Counter())
    finish(workers, JOBS[:2], tmp_path)
    reports: list[int] = []
    finish(workers, JOBS, tmp_path, advance=reports.append)
    assert reports == [20, 25, 30, 35, 40]


def test_no_job_begins_after_the_deadline_but_finished_ones_are_read(tmp_path: Path) -> None:
    workers = InProcess(bench=Counter())
    finish(workers, JOBS[1:2], tmp_path)
    assert finish(workers, JOBS, tmp_path, deadline=time.monotonic()) == [None, Square(number=1), None, None]


def test_an_interruption_keeps_the_finished_jobs(tmp_path: Path) -> None:
    class Interrupted(Counter):
        def __getattribute__(self, name: str) -> object:
            if name == "ran" and len(object.__getattribute__(self, "ran")) == 2:
                raise KeyboardInterrupt
            return object.__getattribute__(self, name)

    with pytest.raises(KeyboardInterrupt):
        finish(InProcess(bench=Interrupted()), JOBS, tmp_path)
    counter = Counter()
    finish(InProcess(bench=counter), JOBS, tmp_path)
    assert counter.ran == [2, 3]


def test_jobs_are_taken_when_the_results_before_them_are_known() -> None:
    known: list[int] = []

    def jobs() -> Iterator[Squaring]:
        number = 2
        while number < 300:
            yield Squaring(number=number)
            number = known[-1]

    for position, square in InProcess(bench=Counter()).run(jobs()):
        assert position == len(known)
        known.append(square.number)
    assert known == [4, 16, 256, 65536]


def test_all_results_keep_their_places_and_are_counted() -> None:
    ended: list[int] = []
    squares = run_all(InProcess(bench=Counter()), JOBS, ended.append)
    assert [square.number for square in squares] == [0, 1, 4, 9]
    assert ended == [1, 2, 3, 4]


def test_a_bench_is_extended_by_what_is_shared() -> None:
    @dataclass(frozen=True)
    class Shift:
        by: int

        def on(self, bench: Counter) -> Shifted:
            return Shifted(bench, self.by)

    @dataclass(frozen=True)
    class Shifted:
        bench: Counter
        by: int

    @dataclass(frozen=True)
    class Add:
        number: int
        name: str = "an addition"

        def run(self, bench: Shifted, advance: Advance) -> int:
            return self.number + bench.by

    workers = InProcess(bench=Counter(), machine="a machine", notes=("a note",)).sharing(Shift(10))
    assert run_one(workers, Add(1)) == workers.run_alone(Add(1)) == 11
    assert (workers.machine, workers.notes) == ("a machine", ("a note",))
