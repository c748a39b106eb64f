"""An analysis on a Ray cluster gives the same profile as one in this process, whoever dies on the way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_cluster

from tests.analyzer.sweeps import REFERENCE, SHAPE, backend, table_of, tiny
from unetc.analyzer.analysis import AnalysisOptions, analyze
from unetc.analyzer.bench import Bench, BenchRecipe
from unetc.artifacts.profile import Profile
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.conditions import UNCONDITIONAL
from unetc.environment import machine_for
from unetc.jobs import InProcess, Workers
from unetc.progress import Progress
from unetc.ray_workers import Needs, workers_of

TARGET = "onnxruntime:cpu"
ABSENT = ("torch", "diffusers", "transformers", "torchmetrics", "onnxscript")
"""Libraries that workers do not need."""


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start a cluster whose processes cannot import the libraries of a capture."""
    absent = tmp_path_factory.mktemp("absent")
    for library in ABSENT:
        (absent / f"{library}.py").write_text(f"raise ModuleNotFoundError({library!r})")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(absent), os.environ.get("PYTHONPATH", "")]))
        with ray_cluster.started(cpus=2):
            yield


def options_of(**changes: Any) -> AnalysisOptions:
    options = {"steps": 6, "samples": 4, "bins": 3, "threads": 1, "batch": 1, "rounds": 1, "decisive": 5}
    return AnalysisOptions(**(options | changes))


def analyse(workers: Workers[Bench], options: AnalysisOptions, work: Path, reports: list[Progress]) -> Profile:
    table = table_of(options.scheduler, options.steps)
    return analyze(
        tiny().gated,
        REFERENCE,
        table,
        workers,
        sample_shape=SHAPE,
        options=options,
        work=work,
        on_progress=reports.append,
    )


def here(options: AnalysisOptions) -> Workers[Bench]:
    kind = table_of(options.scheduler, options.steps).prediction_type
    bench = Bench.of(tiny().gated, backend(), samples=options.samples, prediction_type=kind)
    return InProcess(bench=bench, machine=machine_for(TARGET))


def there(options: AnalysisOptions) -> Workers[Bench]:
    recipe = BenchRecipe(
        graph=tiny().gated.pack(),
        conditions=UNCONDITIONAL,
        samples=options.samples,
        prediction_type=table_of(options.scheduler, options.steps).prediction_type,
        target=TARGET,
        threads=1,
        calls=MeasuredCalls.of(SHAPE, options.batch, options.samples, UNCONDITIONAL),
        wide=frozenset(),
    )
    return workers_of(recipe, Needs(cpus=1, gpu=False, describe=lambda: machine_for(TARGET)))


def with_times_of(finished: Path, work: Path) -> Path:
    """Make a folder that holds the times of another one: they never repeat, and choose what is measured."""
    for folder in finished.glob("cost-*"):
        shutil.copytree(folder, work / folder.name)
    return work


def test_the_profile_is_the_same_as_in_this_process_though_workers_are_killed(tmp_path: Path) -> None:
    options, reports = options_of(), []
    local = analyse(here(options), options, tmp_path / "local", [])
    work = with_times_of(tmp_path / "local", tmp_path / "cluster")
    with ray_cluster.Killer(3) as killer:
        spread = analyse(there(options), options, work, reports)
    assert killer.left == 0
    assert spread.to_json() == local.to_json()
    assert sorted(path.name for path in work.rglob("*.json")) == sorted(
        path.name for path in (tmp_path / "local").rglob("*.json")
    )
    for stage in ("screen", "ablations"):
        done = [report.done for report in reports if report.stage == stage]
        assert done == sorted(done)
        assert done[-1] == next(report.total for report in reports if report.stage == stage)
        assert len(done) > 3


def test_times_are_measured_by_a_worker_and_kept(tmp_path: Path) -> None:
    options = options_of(decisive=0, bins=1, steps=2, samples=1)
    first = analyse(there(options), options, tmp_path, [])
    again = analyse(here(options), options, tmp_path, [])
    assert first.to_json() == again.to_json()
    assert first.timed_on == machine_for(TARGET)


@pytest.mark.nightly
def test_fifty_killed_workers_lose_no_job(tmp_path: Path) -> None:
    options = options_of(steps=30, samples=16, bins=6, decisive=None)
    local = analyse(here(options), options, tmp_path / "local", [])
    work = with_times_of(tmp_path / "local", tmp_path / "cluster")
    with ray_cluster.Killer(50, pause_s=1.0) as killer:
        spread = analyse(there(options), options, work, [])
    assert killer.left == 0
    assert spread.to_json() == local.to_json()
