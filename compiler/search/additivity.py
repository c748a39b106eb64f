"""Check how far damages add up: engines of a plan alone and in pairs, all else computed in full."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

from unetc.artifacts.manifest import EnginePair
from unetc.progress import OnProgress, Progress
from unetc.runtime.rollout import FULL_ENGINE

from .workbench import Candidate, Workbench


def check_pairs(
    workbench: Workbench, candidate: Candidate, seed: int, on_progress: OnProgress
) -> tuple[EnginePair, ...]:
    """Measure the damage of each engine of a plan alone, and of every two of them together.

    Args:
        workbench: Where to measure.
        candidate: The plan.
        seed: Seed of the noise.
        on_progress: Called as the work advances.
    """
    used = sorted({*workbench.schedule(candidate)} - {FULL_ENGINE})
    pairs = list(combinations(used, 2))
    if not pairs:
        return ()
    total = len(used) + len(pairs)
    alone: dict[int, float] = {}
    for engine in used:
        alone[engine] = _damage_of(workbench, candidate, {engine}, seed)
        on_progress(Progress(stage="additivity", done=len(alone), total=total))
    result = []
    for first, second in pairs:
        together = _damage_of(workbench, candidate, {first, second}, seed)
        result.append(EnginePair(engines=(first, second), alone=(alone[first], alone[second]), together=together))
        on_progress(Progress(stage="additivity", done=len(used) + len(result), total=total))
    return tuple(result)


def _damage_of(workbench: Workbench, candidate: Candidate, engines: Collection[int], seed: int) -> float:
    """Measure the relative L2 damage of a plan's schedule with all engines but some replaced by engine 0."""
    schedule = [engine if engine in engines else FULL_ENGINE for engine in workbench.schedule(candidate)]
    return workbench.damage(workbench.reschedule(candidate, schedule), seed=seed).relative_l2.mean
