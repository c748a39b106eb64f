"""Workers of a Ray cluster: killed ones lose no job, failures end with a clear error, deadlines hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest
import ray
import ray_cluster

from unetc import ray_workers
from unetc.compiler.place import place_for
from unetc.environment import machine_for
from unetc.errors import ProfileError, WorkerError
from unetc.jobs import Advance, Cluster, Workers, run_one
from unetc.progress import ignore
from unetc.ray_workers import Needs, joined, machines_of, workers_of

pytestmark = pytest.mark.nightly  # starting a cluster and its workers takes seconds; tests/analyzer/test_ray.py does it


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # workers do not find it
    with ray_cluster.started(cpus=2):
        yield
    ray.cloudpickle.unregister_pickle_by_value(module)


@dataclass(frozen=True)
class Recipe:
    """Makes a bench that is only a folder, in which jobs leave a mark."""

    folder: Path

    def open(self) -> Path:
        return self.folder


@dataclass(frozen=True)
class Mark:
    """Leaves a mark that says who ran it and when, and then works for a while or fails in one of several ways."""

    number: int
    seconds: float = 0.0
    failure: str = ""
    failures: int = 1000

    @property
    def name(self) -> str:
        return f"mark {self.number}"

    def run(self, bench: Path, advance: Advance) -> int:
        tries = len(list(bench.glob(f"{self.number}-*")))
        (bench / f"{self.number}-{time.monotonic()}-{os.getpid()}").touch()
        time.sleep(self.seconds)
        if self.failure and tries < self.failures:
            match self.failure:
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "refused":
                    raise ProfileError("it cannot be analysed")
                case _:
                    raise OSError(self.failure)
        return self.number**2


def workers_in(folder: Path, **changes: int) -> Workers[Path]:
    return workers_of(Recipe(folder), machines_of(Needs(**({"cpus": 1} | changes), gpu=False, describe=str)))  # type: ignore[arg-type]


def marks(folder: Path) -> list[tuple[int, float, int]]:
    """List (number, time, process) of every run, in the order of time."""
    parts = (path.name.split("-") for path in folder.iterdir())
    return sorted(((int(a), float(b), int(c)) for a, b, c in parts), key=lambda mark: mark[1])


def test_all_workers_run_jobs_and_results_keep_their_places(tmp_path: Path) -> None:
    workers = workers_in(tmp_path)

    def seen() -> set[int]:
        return {process for *_, process in marks(tmp_path)}

    until_both_work = takewhile(lambda number: number < 20 or len(seen()) < 2, range(2000))
    results = dict(workers.run(Mark(number, 0.05) for number in until_both_work))
    assert results == {n: n**2 for n in range(len(results))}
    assert len(first := seen()) == 2
    assert dict(workers.run([Mark(50)])) == {0: 2500}
    assert marks(tmp_path)[-1][2] in first, "a worker keeps its bench between runs"


def test_a_job_that_runs_alone_has_the_machine_for_itself(tmp_path: Path) -> None:
    workers = workers_in(tmp_path)
    assert workers.run_alone(Mark(3)) == 9
    assert ray.available_resources().get("CPU", 0) == 0, "no CPU is left for others"
    assert dict(workers.run([Mark(number, 0.1) for number in range(10)])) == {n: n**2 for n in range(10)}
    assert len({process for *_, process in marks(tmp_path)}) <= 2, "the first one keeps its bench"


@dataclass(frozen=True)
class Free:
    """Looks how many CPUs of the cluster are free while it runs, and who runs it."""

    name: str = "a look at the cluster"

    def run(self, bench: Path, advance: Advance) -> tuple[float, int]:
        time.sleep(0.5)  # Ray counts several times a second
        return ray.available_resources().get("CPU", 0.0), os.getpid()


def test_a_worker_keeps_its_bench_while_it_has_the_machine_for_itself(tmp_path: Path) -> None:
    workers = workers_in(tmp_path, most_workers=1)
    free, own = run_one(workers, Free())
    assert free == 1
    assert workers.run_alone(Free()) == (0, own)
    assert run_one(workers, Free()) == (1, own)


def test_workers_give_way_to_one_that_waits_for_a_machine_which_others_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "_LEFT_WITHIN_S", 0.5)
    workers = workers_in(tmp_path, most_workers=1)
    _, own = run_one(workers, Free())
    other = ray.remote(ray_workers._Rest).options(num_cpus=1).remote()
    ray.get(other.here.remote())
    leaves = threading.Timer(3, ray.kill, (other,))
    leaves.start()
    began = time.monotonic()
    free, alone = workers.run_alone(Free())
    leaves.join()
    assert free == 0
    assert alone != own
    assert time.monotonic() - began > 2


def test_a_job_may_depend_on_results_and_waits_for_them(tmp_path: Path) -> None:
    known: list[int] = []

    def jobs() -> Iterator[Mark | None]:
        yield Mark(3, 0.2)
        while not known:
            yield None
        yield from (Mark(known[0] + one) for one in range(3))

    for _, result in workers_in(tmp_path).run(jobs()):
        known.append(result)
    assert known[0] == 9
    assert sorted(known[1:]) == [81, 100, 121]


def test_fewer_workers_work_where_they_are_limited(tmp_path: Path) -> None:
    dict(workers_in(tmp_path, most_workers=1).run([Mark(number, 0.05) for number in range(6)]))
    assert len({process for *_, process in marks(tmp_path)}) == 1


def test_a_worker_that_dies_costs_its_job_only(tmp_path: Path) -> None:
    jobs = [Mark(number, 0.05, "killed" if number % 5 == 0 else "", failures=2) for number in range(10)]
    assert dict(workers_in(tmp_path).run(jobs)) == {n: n**2 for n in range(10)}
    assert Counter(number for number, *_ in marks(tmp_path)) == {n: 3 if n % 5 == 0 else 1 for n in range(10)}


FAILURES = [("killed", "died|killed|crashed"), ("the disk is full", "OSError: the disk is")]


@pytest.mark.parametrize(("failure", "said"), FAILURES)
def test_a_job_that_fails_everywhere_is_named_with_its_last_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, said: str
) -> None:
    monkeypatch.setattr(ray_workers, "MOST_TRIES", 2)
    message = rf"(?is)^mark 7 failed 2 times.*{said}.*the same command continues"
    with pytest.raises(WorkerError, match=message):
        dict(workers_in(tmp_path).run([Mark(7, failure=failure)]))
    assert len(marks(tmp_path)) == 2


def test_an_error_of_the_analysis_itself_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"^it cannot be analysed$"):
        dict(workers_in(tmp_path).run([Mark(7, failure="refused")]))
    assert len(marks(tmp_path)) == 1


def test_no_job_begins_after_the_deadline(tmp_path: Path) -> None:
    workers = workers_in(tmp_path)
    dict(workers.run([Mark(number) for number in (100, 101)]))  # both are up
    deadline = time.monotonic() + 0.7
    results = dict(workers.run([Mark(number, 0.2) for number in range(50)], deadline=deadline))
    begun = [at for number, at, _ in marks(tmp_path) if number < 100]
    assert 2 <= len(results) == len(begun) < 50
    assert max(begun) < deadline + 0.1


def test_what_is_shared_extends_the_benches(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Below:
        name: str

        def on(self, bench: Path) -> Path:
            (bench / self.name).mkdir(exist_ok=True)
            return bench / self.name

    dict(workers_in(tmp_path).sharing(Below("a")).sharing(Below("b")).run([Mark(5)]))
    assert len(marks(tmp_path / "a" / "b")) == 1


def test_a_cluster_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"no machine of the cluster has 64 CPUs .* or analyse with fewer --threads"):
        workers_in(tmp_path, cpus=64)
    with pytest.raises(WorkerError, match="no machine of the cluster has a GPU"):
        workers_of(Recipe(tmp_path), machines_of(Needs(cpus=1, gpu=True, describe=str)))
    opened = place_for("onnxruntime:cpu", 64, Cluster(address="auto"), ignore)
    with pytest.raises(WorkerError, match="has 64 CPUs"), opened:
        pytest.fail("a capture could begin")


def test_a_program_stays_in_the_cluster_that_it_has_joined() -> None:
    with joined("10.255.255.1:6379"):
        pass
    assert ray.is_initialized()


def test_a_machine_is_described_by_processor_and_libraries() -> None:
    import numpy as np
    import onnxruntime

    described = machine_for("onnxruntime:cpu")
    assert described.endswith(f", numpy {np.__version__}, onnxruntime {onnxruntime.__version__}")
    assert "torch" not in described
    assert "torch 2" in machine_for("torch:cpu")


def test_who_starts_a_cluster_keeps_its_own_answer_to_sigterm() -> None:
    """Ray sets one that ends the process without a word."""
    code = """
import os, signal, sys
from unetc.ray_workers import joined

signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
with joined("local"):
    os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 77, done.stderr
