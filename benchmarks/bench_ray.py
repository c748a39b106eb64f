"""How does an analysis scale over workers of a Ray cluster, and what do killed workers cost?

    python benchmarks/bench_ray.py --only digits              # about a quarter of an hour on two cores
    python benchmarks/bench_ray.py --terrain terrain/         # also the pipeline of terrain.py, some components
    python benchmarks/bench_ray.py --only terrain --terrain terrain/    # it alone; the result keeps the other rows

Each model is analysed in this process with one thread, and by one, two and four workers of a local Ray cluster, in
turns. All start from the same measured costs, so they carry the same ablations to the final output, and their profiles
must be equal byte for byte. Seconds count without the start of the cluster. The components were timed once, which is
the same work everywhere; figures say where it is included. Then, with `digits`, workers are killed at random moments
while they run a job.

The search for a plan of `digits` is measured alike, from one profile and with times of engines that are made up: real
ones would lead every search elsewhere. All searches must sample the same schedules and find the same plan.

Larger clusters are *simulated*: `ray_simulation.py` hands out jobs of the measured durations to workers, some of which
are slow. Writes `results/ray.json` and docs/images/ray.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkout import commit
from command_line import add_only, add_results, chosen
from ray_search import BUDGET, search
from ray_simulation import SIZES, Work, simulate
from result_file import absent, earlier, picture_of, write

from unetc.analyzer.analysis import AnalysisOptions
from unetc.environment import cores
from unetc.progress import Progress

THREADS = 1
PAUSE_S = 10.0
"""Longest time between two kills: a job that is killed five times ends the analysis, and jobs take seconds."""
NUMBERS = {2: "two", 4: "four"}
"""Numbers of workers in words."""
OPTIONS: dict[str, dict[str, Any]] = {
    "digits": {"steps": 50, "samples": 16, "decisive": 7, "rounds": 4, "components": []},
    "terrain": {
        "steps": 10,
        "samples": 2,
        "decisive": 7,
        "rounds": 4,
        "bins": 2,
        "components": ["down_blocks.3.*", "mid_block.*"],
    },
}
"""Options of the analysis of each model."""
STAGES = ("timing", "full model", "screen", "ablations")


def options_of(case: Mapping[str, Any]) -> AnalysisOptions:
    """Make the options of a case."""
    return AnalysisOptions(threads=THREADS, **{**case["options"], "components": tuple(case["options"]["components"])})


def child(case: Mapping[str, Any]) -> dict[str, Any]:
    """Analyse a model in this process, or on a local cluster; return seconds and the number of repeated jobs."""
    import logging

    import unetc
    from unetc.jobs import Cluster

    repeated: list[logging.LogRecord] = []

    class Repeats(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            repeated.append(record)

    reports: list[tuple[float, Progress]] = []

    def watch(progress: Progress) -> None:
        reports.append((time.perf_counter(), progress))

    def measure(cluster: Cluster | None) -> float:
        begin = time.perf_counter()
        profile = unetc.analyze(
            case["model"], options_of(case), cache=case["cache"], cluster=cluster, on_progress=watch
        )
        seconds = time.perf_counter() - begin
        profile.save(Path(case["profile"]))
        return seconds

    if not case["workers"]:
        return {"seconds": measure(None), "stages": stages(reports)}
    from ray_cluster import Killer, started

    begin = time.perf_counter()
    with started(cpus=case["workers"]):
        start_s = time.perf_counter() - begin
        repeats = logging.getLogger("unetc.ray_workers")
        repeats.addHandler(Repeats())
        repeats.setLevel(logging.INFO)
        with Killer(case["kills"], lambda: len(reports), seed=1, pause_s=PAUSE_S) as killer:
            seconds = measure(Cluster(address="local", most_workers=case["workers"]))
    return {
        "seconds": seconds,
        "start_s": start_s,
        "stages": stages(reports),
        "kills": case["kills"] - killer.left,
        "repeats": len(repeated),
    }


def stages(reports: list[tuple[float, Progress]]) -> dict[str, float]:
    """Return the seconds of each stage, from the end of the one before it to its last report.

    The first one begins when the model is captured and the workers are known.
    """
    ends = {progress.stage: at for at, progress in reports}
    before = max(at for at, progress in reports if progress.stage not in STAGES)
    seconds = {}
    for stage in (one for one in STAGES if one in ends):
        seconds[stage], before = ends[stage] - before, ends[stage]
    return seconds


def run(case: Mapping[str, Any]) -> dict[str, Any]:
    """Run a case in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"an analysis failed:\n{result.stderr}")
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    print(case["model"], case["workers"], case["kills"], measured, file=sys.stderr, flush=True)
    return measured


def jobs_of(work: Path) -> dict[str, list[dict[str, Any]]]:
    """Read how long each job of an analysis in one process took: from one result's file to the next."""
    found = sorted((path.stat().st_mtime, path.name) for path in work.rglob("bin*.json"))
    durations = [(name, later - before) for (before, _), (later, name) in pairwise(found)]
    return {
        "screen": [{"name": name, "seconds": seconds} for name, seconds in durations if "-local" in name],
        "ablations": [{"name": name, "seconds": seconds} for name, seconds in durations if "-local" not in name],
    }


def measure(
    name: str,
    model: str,
    options: Mapping[str, Any],
    work: Path,
    *,
    workers: Sequence[int],
    rounds: int,
    kills: int,
    searches_too: bool,
) -> dict[str, Any]:
    """Measure one model.

    Args:
        name: Its name in figures.
        model: The model.
        options: Options of the analysis.
        work: Folder for caches.
        workers: Numbers of workers, rising from 1.
        rounds: Turns of each number of workers.
        kills: Most workers to kill.
        searches_too: Whether to measure the search for a plan.
    """
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    case = {"model": model, "options": options, "kills": 0}
    first = run({**case, "workers": 0, "cache": str(folder / "first"), "profile": str(folder / "first.json")})
    expected = (folder / "first.json").read_bytes()
    runs: dict[str, list[dict[str, Any]]] = {str(count): [] for count in (0, *workers)}
    searches: dict[str, list[dict[str, Any]]] = {str(count): [] for count in (0, *workers) if searches_too}
    equal = True

    def again(count: int, kills: int = 0) -> dict[str, Any]:
        """Analyse from the measured costs alone."""
        cache, profile = folder / "again", folder / "again.json"
        shutil.rmtree(cache, ignore_errors=True)
        ignored = shutil.ignore_patterns("damage-*", "*.lock")
        shutil.copytree(folder / "first", cache, ignore=ignored)
        measured = run(
            {
                **case,
                "workers": count,
                "kills": kills,
                "cache": str(cache),
                "profile": str(profile),
            }
        )
        nonlocal equal
        equal = equal and profile.read_bytes() == expected
        return measured

    for _ in range(rounds):
        for count in (0, *workers):
            runs[str(count)].append(again(count))
            if searches_too:
                whole = {"model": model, "workers": count, "kills": 0, "cache": str(folder / "first")}
                searches[str(count)].append(run({**whole, "profile": str(folder / "first.json"), "search": True}))
    killed = again(workers[-1], kills) if kills else None
    jobs = Work.of(first["stages"], jobs_of(folder / "first"), runs["0"], runs["1"])
    return {
        "options": options,
        "first": first,
        "runs": runs,
        "searches": searches,
        "killed": killed,
        "equal": equal,
        "simulated": {name: simulate(jobs), f"{name}, ten times the jobs": simulate(jobs.times(10))},
    }


def figures_of(name: str, result: Mapping[str, Any]) -> list[dict[str, object]]:
    """List the figures of a model."""
    timing = result["first"]["stages"]["timing"]

    def median(of: Callable[[Mapping[str, Any]], float], above: int, below: int, kind: str = "runs") -> float:
        runs = zip(result[kind][str(above)], result[kind][str(below)], strict=True)
        ratios = [of(one) / of(other) for one, other in runs]
        return float(statistics.median(ratios))

    def alone(run: Mapping[str, Any]) -> float:
        return float(run["seconds"])

    def whole(run: Mapping[str, Any]) -> float:
        return float(timing + run["seconds"])

    def jobs(run: Mapping[str, Any]) -> float:
        return float(run["stages"]["screen"] + run["stages"]["ablations"])

    least, most = {"goal": {"at_least": 1.7}}, {"goal": {"at_most": 1.05}}
    rows: list[dict[str, object]] = [
        {"figure": f"{name}: seconds with one worker / in one process, timing included", "value": median(whole, 1, 0)}
        | most,
        {"figure": f"{name}: seconds of the jobs with one worker / in one process", "value": median(jobs, 1, 0)},
        {"figure": f"{name}: seconds to start a cluster", "value": result["runs"]["1"][0]["start_s"]},
        {"figure": f"{name}: profiles equal byte for byte", "value": float(result["equal"]), "goal": {"at_least": 1}},
    ]
    if result["searches"]:
        rows += [
            {
                "figure": f"{name}: seconds of a search for a plan with one worker / in one process",
                "value": median(alone, 1, 0, "searches"),
            },
            {
                "figure": f"{name}: plans equal byte for byte",
                "value": float(len({run["plan"] for runs in result["searches"].values() for run in runs}) == 1),
                "goal": {"at_least": 1},
            },
        ]
    counts = sorted(map(int, result["runs"]))
    for count in (count for count in counts if count > 1):
        many, goal = NUMBERS.get(count, str(count)), least if count == 2 else {}
        rows += [
            {"figure": f"{name}: seconds of the jobs with one worker / with {many}", "value": median(jobs, 1, count)}
            | goal,
            {
                "figure": f"{name}: seconds with one worker / with {many}, timing included",
                "value": median(whole, 1, count),
            },
        ]
        if result["searches"]:
            searching = f"{name}: seconds of a search for a plan with one worker / with {many}"
            rows.append({"figure": searching, "value": median(alone, 1, count, "searches")})
    if (killed := result["killed"]) is not None:
        undisturbed = statistics.median(run["seconds"] for run in result["runs"][str(counts[-1])])
        rows += [
            {"figure": f"{name}: workers killed", "value": killed["kills"]},
            {"figure": f"{name}: jobs repeated / workers killed", "value": killed["repeats"] / max(1, killed["kills"])},
            {
                "figure": f"{name}: seconds that a killed worker costs",
                "value": (killed["seconds"] - undisturbed) / max(1, killed["kills"]),
            },
        ]
    return rows


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the speed-up against the number of workers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    axis.plot(SIZES, SIZES, color="#9aa0a6", linestyle=":", label="linear")
    simulated = [(name, rows) for result in results.values() for name, rows in result["simulated"].items()]
    for colour, (name, rows) in zip(("#2a6fdb", "#e08e45", "#3a9d5d", "#8e5fbf"), simulated, strict=False):
        speedups = [row["speedup"] for row in rows]
        axis.plot([row["workers"] for row in rows], speedups, marker="o", color=colour, label=f"{name}, simulated")
    for marker, (name, result) in zip("x+", results.items(), strict=False):
        seconds = {
            int(count): statistics.median(run["seconds"] for run in runs) for count, runs in result["runs"].items()
        }
        counts = [count for count in seconds if count]
        axis.scatter(
            counts,
            [seconds[1] / seconds[count] for count in counts],
            marker=marker,
            color="black",
            zorder=3,
            label=f"{name}, measured on {cores()} cores",
        )
    axis.set(xlabel="workers", ylabel="speed-up over one worker", xscale="log", yscale="log")
    axis.set_xticks(SIZES, [str(size) for size in SIZES])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def record_of(results: Mapping[str, Any], settings: Mapping[str, object]) -> dict[str, Any]:
    """Make the result of the measured models."""
    columns = ["analysis", "workers", "speed-up", "share of the time: timing", "trajectory", "screening", "ablations"]
    rows = [
        [name, row["workers"], f"{row['speedup']:.1f}", *(f"{row['shares'][stage]:.2f}" for stage in STAGES)]
        for result in results.values()
        for name, own in result["simulated"].items()
        for row in own
    ]
    return {
        "settings": settings,
        "figures": [row for name, result in results.items() for row in figures_of(name, result)],
        "absent": absent(OPTIONS, results),
        "tables": [{"title": "Simulated, with the measured durations of jobs", "columns": columns, "rows": rows}],
        "measured": results,
    }


def main() -> None:
    """Measure, simulate, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/ray", help="caches")
    parser.add_argument("--terrain", type=Path, help="pipeline folder of terrain.py")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of workers, 1 among them")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each number of workers")
    parser.add_argument("--kills", type=int, default=50, help="most workers to kill in an analysis of digits")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    add_only(parser)
    add_results(parser)
    options = parser.parse_args()
    if options.child:
        case = json.loads(options.child)
        print(json.dumps(search(case) if "search" in case else child(case)))
        return
    names = chosen(parser, options.only, OPTIONS)
    if options.terrain is None and options.only == "":
        names.remove("terrain")
    if options.terrain is None and "terrain" in names:
        parser.error("terrain needs its pipeline: give --terrain, a folder that terrain.py has made")
    workers = sorted({1, *options.workers})
    settings = {"workers": workers, "rounds of each": options.rounds, "threads": THREADS, "budget of a search": BUDGET}
    results = earlier(options.results, "ray", again=names, settings=settings)
    for name in names:
        own = name == "digits"
        results[name] = measure(
            name,
            name if own else str(options.terrain.resolve()),
            OPTIONS[name],
            options.work,
            workers=workers,
            rounds=options.rounds,
            kills=options.kills if own else 0,
            searches_too=own,
        ) | {"settings": settings, "commit": commit()}
        results = {name: results[name] for name in OPTIONS if name in results}
        write(options.results, "ray", record_of(results, settings))
        draw(results, picture_of(options.results, "ray.png"))


if __name__ == "__main__":
    main()
