"""An analysis on a Ray cluster whose workers are killed, and the same analysis in this process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ray_cluster

from tests.analyzer.sweeps import REFERENCE, SHAPE, backend, table_of, tiny
from unetc.analyzer.analysis import AnalysisOptions, analyze
from unetc.analyzer.bench import AnalysisEquipment, Bench
from unetc.artifacts.profile import Profile
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.place import BenchRecipe
from unetc.conditions import UNCONDITIONAL
from unetc.environment import machine_for
from unetc.jobs import InProcess, Workers
from unetc.progress import Progress
from unetc.ray_workers import Needs, machines_of, workers_of

TARGET = "onnxruntime:cpu"


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
    equipment = AnalysisEquipment(
        graph=tiny().gated,
        conditions=UNCONDITIONAL,
        samples=options.samples,
        prediction_type=table_of(options.scheduler, options.steps).prediction_type,
    )
    calls = MeasuredCalls.of(SHAPE, options.batch, options.samples, UNCONDITIONAL)
    recipe = BenchRecipe(equipment=equipment.packed(), target=TARGET, threads=1, calls=calls)
    return workers_of(recipe, machines_of(Needs(cpus=1, gpu=False, describe=lambda: machine_for(TARGET))))


def check_kills(kills: int, options: AnalysisOptions, folder: Path) -> list[Progress]:
    """Analyse on the cluster while workers are killed, compare with an analysis in this process, and return progress.

    The second analysis gets the times of the first: they never repeat, and decide which ablations are measured.
    """
    reports: list[Progress] = []
    with ray_cluster.Killer(kills, lambda: len(reports)) as killer:
        spread = analyse(there(options), options, folder / "cluster", reports)
    assert killer.left == 0
    for times in (folder / "cluster").glob("cost-*"):
        shutil.copytree(times, folder / "process" / times.name)
    alone = analyse(here(options), options, folder / "process", [])
    assert spread.to_json() == alone.to_json()
    files = [sorted(path.name for path in (folder / place).rglob("*.json")) for place in ("cluster", "process")]
    assert files[0] == files[1]
    assert spread.timed_on == machine_for(TARGET)
    return reports
