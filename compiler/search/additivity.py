"""Check how far damages add up: engines of a plan alone and in pairs, all else computed in full."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

from unetc.artifacts.manifest import EnginePair
from unetc.progress import OnProgress, Progress
from unetc.runtime.rollout import FULL_ENGINE

from .candidate import Candidate
from .workbench import Workbench


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
    kept = [*((engine,) for engine in used), *pairs]

    def advance(done: int) -> None:
        on_progress(Progress(stage="additivity", done=done, total=len(kept)))

    candidates = [_with(workbench, candidate, engines) for engines in kept]
    damages = workbench.damages(candidates, seed=seed, advance=advance)
    damage = {engines: own.relative_l2.mean for engines, own in zip(kept, damages, strict=True)}
    return tuple(
        EnginePair(engines=pair, alone=(damage[pair[:1]], damage[pair[1:]]), together=damage[pair]) for pair in pairs
    )


def _with(workbench: Workbench, candidate: Candidate, engines: Collection[int]) -> Candidate:
    """Replace all engines of a plan's schedule but some by engine 0."""
    schedule = [engine if engine in engines else FULL_ENGINE for engine in workbench.schedule(candidate)]
    return workbench.reschedule(candidate, schedule)
