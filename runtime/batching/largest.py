"""The largest useful call of each engine, from the times that the build measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unetc.artifacts.manifest import FULL, Manifest
from unetc.backend import Program
from unetc.runtime.session import Session

_CLOSE = 1.05
"""A batch is useful as long as a smaller one takes more than this multiple of its time per sample."""


def useful_batch(batch_ms: Sequence[tuple[int, float]]) -> int | None:
    """Choose the smallest batch whose time per sample is close to the least; None without measurements.

    Larger calls would make no more images per second, and let others wait for longer.

    Args:
        batch_ms: Numbers of samples with the milliseconds of a call.
    """
    if not batch_ms:
        return None
    least = min(ms / batch for batch, ms in batch_ms)
    return min(batch for batch, ms in batch_ms if ms / batch <= _CLOSE * least)


def largest_calls(manifest: Manifest, sessions: Mapping[str, Session]) -> dict[Program, int]:
    """List the most rows of a call by program, as `Batcher` takes them.

    Args:
        manifest: The manifest of the sessions' bundle.
        sessions: One session per quality level.
    """
    times: list[tuple[Program, Sequence[tuple[int, float]]]] = [(sessions[FULL].full, manifest.full.batch_ms)]
    for level in manifest.levels:
        programs: Sequence[Program] = sessions[level.name].programs
        times += [(program, one.batch_ms) for program, one in zip(programs, level.engines, strict=True)]
    rows = sessions[FULL].conditions.rows_per_sample
    return {program: batch * rows for program, measured in times if (batch := useful_batch(measured)) is not None}
