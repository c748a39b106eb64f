"""The search for a plan on workers of a local Ray cluster, with made-up times of engines: a part of bench_ray.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - makes unetc importable
from hand_timed import HandTimed

from unetc.artifacts.profile import Profile
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.find_plan import find_plan
from unetc.compiler.search.repair import RepairOptions
from unetc.compiler.search.set_up import set_up
from unetc.jobs import Cluster
from unetc.models.find import find_model
from unetc.progress import ignore

BUDGET = 0.3


def search(case: Mapping[str, Any]) -> dict[str, Any]:
    """Search for a plan in this process, or on a local cluster; return seconds, sampled schedules and the plan.

    Args:
        case: Model, profile, cache and number of workers; 0 for this process.
    """
    from ray_cluster import started

    workers, profile = case["workers"], Profile.load(Path(case["profile"]))
    cluster = Cluster(address="local", most_workers=workers) if workers else None
    with (
        started(cpus=workers) if workers else nullcontext(),
        set_up(
            find_model(case["model"]), profile, steps=profile.steps, cache=Path(case["cache"]), cluster=cluster
        ) as setup,
    ):
        table = setup.scheduler.table(profile.steps)
        workbench = replace(setup.workbench, workers=HandTimed(workers=setup.workbench.workers, table=table))
        begin = time.perf_counter()
        found = find_plan(workbench, PlanOptions(budget=BUDGET), RepairOptions(), [], profile.seed + 1, ignore)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "schedules": len(found.evaluated), "plan": found.candidate.plan.sha256()}
