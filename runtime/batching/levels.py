"""One session per quality level of a bundle, over shared programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unetc.artifacts.manifest import FULL
from unetc.backend import Backend, Program
from unetc.runtime.bundle import Bundle
from unetc.runtime.loaded_bundle import LoadedBundle
from unetc.runtime.session import Session

from .limits import BatchLimits

GAIN = 0.02
"""Larger calls than the chosen one save at most this share of the time per sample; they would only add latency."""
LONG = 0.5
"""Engines that take at least this share of the longest one's time count for the number of seats."""
FEW_SEATS = 4
"""Least number of seats, so that a second image need not wait for the whole first one."""


def open_levels(bundle: Bundle, backend: Backend) -> dict[str, Session]:
    """Open a session for the full model and one for every quality level of a bundle.

    Every graph is loaded once, and the sessions share its program and the decoder. Calls of different levels may
    therefore be batched wherever their program is the same object. With `memory="low"` on a GPU, every session
    releases the engines that its own rollouts do not need soon, and a call of another session loads them again.

    Args:
        bundle: The bundle.
        backend: Runs its engines.

    Returns:
        Sessions by the name of their level: "full" first, then from the smallest budget to the largest.
    """
    loaded = LoadedBundle(bundle, backend)
    names = (FULL, *(level.name for level in bundle.manifest.levels))
    return {name: Session.over(loaded, level=name) for name in names}


def largest_calls(bundle: Bundle, sessions: Mapping[str, Session]) -> dict[Program, int]:
    """Choose the largest call of every program, from the times that the build has measured by batch.

    It is the smallest measured batch whose time per sample is nearly the least one.

    Args:
        bundle: The bundle.
        sessions: Its sessions, from `open_levels`.

    Returns:
        Rows of a call with the bundle's guidance, by program; programs that were not timed are left out.
    """
    rows = bundle.conditions.rows_per_sample
    return {program: rows * best_batch(times) for program, times in _times(bundle, sessions).items()}


def limits_for(bundle: Bundle, sessions: Mapping[str, Session], *, queue: int) -> BatchLimits:
    """Choose how much a batcher does at once.

    There are seats for one call of the engines that take most of the time, and for a few images at least. More seats
    would fill calls a little better while many wait. But every image would take longer, and newcomers would slow down
    those on their way beyond what was estimated for them.

    Args:
        bundle: The bundle.
        sessions: Its sessions, from `open_levels`.
        queue: Most images that wait.
    """
    times = list(_times(bundle, sessions).values())
    if not times:
        return BatchLimits(queue=queue)
    longest = max(map(_alone, times))
    samples = max(best_batch(one) for one in times if _alone(one) >= LONG * longest)
    return BatchLimits(rows=samples * bundle.conditions.rows_per_sample, seats=max(FEW_SEATS, samples), queue=queue)


def _times(bundle: Bundle, sessions: Mapping[str, Session]) -> dict[Program, tuple[tuple[int, float], ...]]:
    """Collect the measured batches of every program, with their milliseconds."""
    manifest = bundle.manifest
    engines = {FULL: (manifest.full,), **{level.name: level.engines for level in manifest.levels}}
    return {
        program: engine.batch_ms
        for name, session in sessions.items()
        for program, engine in zip(session.programs, engines[name], strict=True)
        if engine.batch_ms
    }


def _alone(batch_ms: Sequence[tuple[int, float]]) -> float:
    """Return the milliseconds of the smallest batch."""
    return batch_ms[0][1]


def best_batch(batch_ms: Sequence[tuple[int, float]]) -> int:
    """Return the smallest batch whose time per sample is at most `GAIN` above the least."""
    least = min(ms / size for size, ms in batch_ms)
    return next(size for size, ms in batch_ms if ms / size <= least * (1 + GAIN))
