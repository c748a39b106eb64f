"""A build and a curve on a Ray cluster are the same as in this process, given the same times, even if workers die."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray_cluster
from hand_timed import HandTimed
from ray_processes import WORKER, processes

from tests.bare_cluster import bare_cluster
from tests.command import run
from unetc.artifacts.profile import Profile
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.bench import SearchBench
from unetc.compiler.search.fit import hold_everywhere
from unetc.compiler.search.pareto import ParetoOptions, pareto
from unetc.compiler.search.repair import RepairOptions
from unetc.compiler.search.set_up import set_up
from unetc.compiler.search.workbench import Workbench
from unetc.errors import ProfileError, SessionError
from unetc.jobs import Cluster, Workers
from unetc.models.find import find_model
from unetc.progress import Progress

STEPS = 8
WORKERS = 3
CLUSTER = Cluster(address="local")
REPAIR = RepairOptions(evaluations=12, patience=6)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with bare_cluster(tmp_path_factory.mktemp("absent"), cpus=WORKERS):
        yield


@pytest.fixture
def profile(tiny_build: Path) -> Profile:
    return Profile.load(tiny_build / "profile.json")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[HandTimed]:
    """Make up the times of every search, and list who measured for each."""
    made: list[HandTimed] = []

    def by_hand(*, workers: Workers[SearchBench], **own: Any) -> Workbench:
        sampling = own["sampling"]
        made.append(HandTimed(workers=workers, table=sampling.scheduler.table(sampling.steps)))
        return Workbench(workers=made[-1], **own)

    monkeypatch.setattr("unetc.compiler.search.set_up.Workbench", by_hand)
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (STEPS,))  # the other tables are not used
    return made


def options_of(*ladder: float, repair: RepairOptions = REPAIR) -> BuildOptions:
    budget = PlanOptions(budget=0.25)
    return BuildOptions(plan=budget, ladder=ladder, steps=STEPS, repair=repair, random_plans=1, text=False)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_kills(kills: int, options: BuildOptions, model: Path, profile: Profile, cache: Path, folder: Path) -> int:
    """Build on the cluster while workers are killed, compare with a build in this process, and count repeated jobs."""
    reports: list[Progress] = []
    repeats: list[logging.LogRecord] = []

    class Repeats(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            repeats.append(record)

    make, handler = partial(build, find_model(str(model)), profile), Repeats()
    logger = logging.getLogger("unetc.ray_workers")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with ray_cluster.Killer(kills, lambda: len(reports)) as killer:
            make(folder / "cluster", options, cache=cache, cluster=CLUSTER, on_progress=reports.append)
    finally:
        logger.removeHandler(handler)
    assert killer.left == 0
    make(folder / "process", options, cache=cache)
    assert content(folder / "cluster") == content(folder / "process")
    (workers,) = {report.note for report in reports if report.stage == "workers"}
    assert workers.startswith(f"{WORKERS} workers: ")
    return len(repeats)


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
def test_the_bundle_is_the_same_as_from_this_process_though_workers_are_killed(
    tiny_model: Path, profile: Profile, cache: Path, tmp_path: Path, timed: list[HandTimed]
) -> None:
    assert 1 <= check_kills(2, options_of(), tiny_model, profile, cache, tmp_path) <= 2
    there, here = timed
    assert there.alone == here.alone, "timings come in the same order"
    assert any(name.startswith("measuring") for name in there.alone)


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
def test_a_ladder_is_the_same_though_many_workers_are_killed(
    tiny_model: Path, profile: Profile, cache: Path, tmp_path: Path, timed: list[HandTimed]
) -> None:
    options = options_of(0.4, repair=RepairOptions(evaluations=30, patience=12))
    assert check_kills(20, options, tiny_model, profile, cache, tmp_path) <= 20


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
def test_a_curve_is_the_same_as_from_this_process(
    tiny_model: Path, profile: Profile, cache: Path, timed: list[HandTimed]
) -> None:
    options, model = ParetoOptions(budgets=4, steps=STEPS, repair=REPAIR), find_model(str(tiny_model))
    there, here = (pareto(model, profile, options, cache=cache, cluster=place) for place in (CLUSTER, None))
    assert there.to_json() == here.to_json()
    assert len({point.budget for point in there.points}) > 1


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
def test_a_timing_has_the_machine_and_workers_keep_their_benches(
    tiny_model: Path, profile: Profile, cache: Path
) -> None:
    fewer, model = replace(CLUSTER, most_workers=2), find_model(str(tiny_model))
    with set_up(model, profile, steps=STEPS, cache=cache, cluster=fewer) as setup:
        candidate = setup.workbench.compile(hold_everywhere(profile, "step", 2))
        assert candidate.full_ms > candidate.step_ms[1] > 0
        setup.workbench.damages([candidate] * 8, seed=1)
        before = {*processes(WORKER)}
        assert setup.workbench.measure(candidate, seed=2).measurement.time_ratio > 0
        assert before <= {*processes(WORKER)}  # a slow machine may start the second one late


@pytest.mark.parametrize("target", ["tensorrt-rtx:fp16", "onnxruntime:tensorrt", "cpu"])
def test_targets_that_no_cluster_has_are_refused_before_it_is_joined(
    tiny_model: Path, profile: Profile, cache: Path, target: str
) -> None:
    profile, options = msgspec.structs.replace(profile, target=target), ParetoOptions(steps=STEPS)
    match = "no backend for target 'cpu'" if target == "cpu" else r"builds engines, which differ .*without --ray"
    with pytest.raises((ProfileError, SessionError), match=match):
        pareto(find_model(str(tiny_model)), profile, options, cache=cache, cluster=Cluster(address="nowhere"))


@pytest.mark.parametrize("command", ["build", "pareto"])
def test_a_number_of_workers_without_a_cluster_is_refused(command: str) -> None:
    refused = run(command, "digits", "--workers", 2)
    assert refused.code == 2
    assert "--workers limits the workers" in refused.err
