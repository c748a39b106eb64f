"""Build one engine into the cache, unless another process does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from unetc.controlnet import ControlNetInput
from unetc.errors import EngineBuildError, StaleEngineError
from unetc.nvidia.cache import EngineCache, EngineRecord
from unetc.nvidia.key import EngineKey

from .messages import STEPS, BuildRequest
from .supervise import Running, build_engine


def build_one(
    graph: str,
    key: EngineKey,
    folder: Path,
    engines: EngineCache,
    controlnet: tuple[ControlNetInput, ...],
    *,
    time_limit_s: float,
    on_advance: Callable[[int], None],
    on_note: Callable[[str], None],
    running: Running | None = None,
    gpu: int = 0,
) -> tuple[EngineRecord, bool]:
    """Build one engine and put it into the cache, unless another process or thread has built it or is building it.

    Args:
        graph: Name of the graph in the folder.
        key: Key of the engine.
        folder: A private folder with the graph, in the key's precision, and its weights.
        engines: The cache.
        controlnet: The graph's ControlNet inputs.
        time_limit_s: Limit for all tries together, without the time spent waiting for another process.
        on_advance: Called with the number of `STEPS` that are done.
        on_note: Called when another process is building the engine, and when it has built it.
        running: Lets another thread stop the build.
        gpu: Index of the key's GPU among those that CUDA shows to this process.

    Returns:
        The engine's record, and whether another process has built it.

    Raises:
        EngineBuildError: If it cannot be built.
        ArtifactError: If the cache cannot be written.
    """
    request = BuildRequest(
        target=key.origin.target,
        graph=graph,
        engine=f"{graph}.engine",
        timing="timing.cache",
        sizes=key.sizes,
        rows=key.rows,
        controlnet=controlnet,
        effort=key.effort,
        on_this_gpu=key.origin.gpu is not None,
        gpu=gpu,
    )
    running, waited = running or Running(), False

    def wait() -> None:
        nonlocal waited
        running.check()
        if not waited:
            on_note("the engine is being built elsewhere; waiting for it.")
        waited = True

    with engines.building(key, wait):
        try:
            record, _ = engines.open(key)
        except StaleEngineError:
            return _build(request, key, folder, engines, time_limit_s, on_advance, running), False
        on_note("the engine has been built elsewhere meanwhile; it is taken from the cache.")
        on_advance(STEPS)
        return record, True


def _build(
    request: BuildRequest,
    key: EngineKey,
    folder: Path,
    engines: EngineCache,
    time_limit_s: float,
    on_advance: Callable[[int], None],
    running: Running,
) -> EngineRecord:
    """Build one engine and put it into the cache."""
    outcome = build_engine(request, folder, time_limit_s=time_limit_s, on_advance=on_advance, running=running)
    try:
        serialized = outcome.engine.read_bytes()
        outcome.engine.unlink()
    except OSError as error:
        raise EngineBuildError(f"the engine cannot be read back: {error.strerror}.") from error
    on_advance(STEPS)
    return engines.put(
        EngineRecord(
            key=key,
            engine_sha256=hashlib.sha256(serialized).hexdigest(),
            engine_bytes=len(serialized),
            layers=outcome.built.layers,
            shapes=outcome.built.shapes,
            spent=outcome.effort,
            tries=outcome.tries,
            seconds=round(outcome.seconds, 3),
            peak_bytes=outcome.built.peak_bytes,
            scratch_bytes=outcome.built.scratch_bytes,
        ),
        serialized,
    )
