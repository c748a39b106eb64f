"""An analysis on clusters that are not here, simulated from the durations of its jobs: for bench_ray.py.

The model: one machine times the components. A worker computes the full model's trajectory. Every worker takes the next
job of the screening, and when all have ended, of the ablations. Workers need the same time to start. One in twenty is a
straggler, three times slower than the others. Nothing else costs time: no network, no driver. So the result is an upper
bound of the speed-up, and shows where the jobs themselves stop it.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SIZES = 1, 2, 8, 64, 512
STRAGGLERS, SLOWER = 1 / 20, 3.0
SEEDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The parts of an analysis, in seconds of one worker."""

    start: float
    """Start of the workers: seconds that one worker adds to the same analysis in one process."""
    timing: float
    trajectory: float
    screen: tuple[float, ...]
    ablations: tuple[float, ...]

    @classmethod
    def of(
        cls,
        stages: Mapping[str, float],
        jobs: Mapping[str, Sequence[Mapping[str, Any]]],
        none: Sequence[Mapping[str, Any]],
        one: Sequence[Mapping[str, Any]],
    ) -> Work:
        """Take the stages and jobs of an analysis in one process.

        Args:
            stages: Seconds of its stages.
            jobs: Its jobs by stage.
            none: Runs in one process from the same measured costs.
            one: The same runs with one worker, which starts in the first stages.
        """
        screen, ablations = (tuple(job["seconds"] for job in jobs[kind]) for kind in ("screen", "ablations"))
        first = "timing", "full model"
        added = [
            sum(with_worker["stages"][stage] - run["stages"][stage] for stage in first)
            for run, with_worker in zip(none, one, strict=True)
        ]
        return cls(
            start=max(0.0, statistics.median(added)),
            timing=stages["timing"],
            trajectory=stages["full model"],
            screen=screen,
            ablations=ablations,
        )

    def times(self, factor: int) -> Work:
        """Return an analysis with more jobs of the same durations, such as one of a model with more components."""
        return replace(self, screen=self.screen * factor, ablations=self.ablations * factor)


def simulate(work: Work) -> list[dict[str, Any]]:
    """Compute the speed-up over one worker for every size, and the share of the time that each stage takes."""
    alone = sum(_stages(work, [1.0]).values())
    rows = []
    for size in SIZES:
        drawn = [_stages(work, _speeds(size, seed)) for seed in range(SEEDS)]
        seconds = statistics.mean(sum(stages.values()) for stages in drawn)
        shares = {stage: statistics.mean(own[stage] for own in drawn) / seconds for stage in drawn[0]}
        rows.append({"workers": size, "seconds": seconds, "speedup": alone / seconds, "shares": shares})
    return rows


def _speeds(size: int, seed: int) -> list[float]:
    """Draw how many times slower each worker is; a single one is not."""
    slow = np.random.default_rng(seed).random(size) < STRAGGLERS
    return [SLOWER if own and size > 2 else 1.0 for own in slow]


def _stages(work: Work, speeds: Sequence[float]) -> dict[str, float]:
    """Compute the seconds of every stage."""
    return {
        "timing": work.timing,
        "full model": work.start + work.trajectory * speeds[0],
        "screen": _spread(work.screen, speeds),
        "ablations": _spread(work.ablations, speeds),
    }


def _spread(jobs: Sequence[float], speeds: Sequence[float]) -> float:
    """Hand out jobs in their order, each to the worker that is free first; return when the last one ends."""
    free = [(0.0, worker) for worker in range(len(speeds))]
    ends = [0.0]
    for seconds in jobs:
        at, worker = heapq.heappop(free)
        ends.append(at + seconds * speeds[worker])
        heapq.heappush(free, (ends[-1], worker))
    return max(ends)
