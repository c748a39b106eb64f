"""Build several engines at once, as far as memory and cores allow it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from unetc.backend import WEIGHTS
from unetc.controlnet import ControlNetInput
from unetc.environment import cores, free_memory
from unetc.errors import EngineBuildError
from unetc.nvidia.cache import EngineCache, EngineRecord
from unetc.nvidia.key import EngineKey
from unetc.nvidia.library import library_of
from unetc.precision import Precision
from unetc.progress import OnProgress, Progress

from .build_one import build_one
from .messages import STEPS
from .options import CompileOptions
from .private_folder import flat_name
from .supervise import Running
from .wanted import Wanted

_BASE_BYTES = 900 * 2**20
"""Memory of a building process without weights: libraries, kernels, and its records of about a thousand layers."""
_COPIES_OF_WEIGHTS = 4
"""Copies of the weights in its memory at the peak. Both numbers are above everything in
benchmarks/results/rtx_build.json."""


def build_all(
    wanted: Mapping[Wanted, EngineKey],
    folders: Mapping[Precision, Path],
    controlnet: tuple[ControlNetInput, ...],
    engines: EngineCache,
    options: CompileOptions,
    on_progress: OnProgress,
) -> list[tuple[Wanted, tuple[EngineRecord, bool]]]:
    """Build engines into the cache, several at once where there is room; each is stored as soon as it is finished.

    Args:
        wanted: Keys of the engines.
        folders: Private folder with the graphs and weights of each precision.
        controlnet: ControlNet inputs of the graphs.
        engines: The cache.
        options: Limits of the work.
        on_progress: Called with the progress of each engine.

    Returns:
        Each engine in the order of completion: its record, and whether another process has built it.

    Raises:
        EngineBuildError: If an engine cannot be built; the others are stopped.
        ArtifactError: If the cache cannot be written.
    """
    running = Running()

    def build(one: Wanted) -> tuple[Wanted, tuple[EngineRecord, bool]]:
        graph, key = one[0], wanted[one]
        stage = f"build {Path(graph).stem}" + (f" in {key.precision}" if key.precision is not options.precision else "")

        def advance(done: int) -> None:
            on_progress(Progress(stage=stage, done=done, total=STEPS))

        def note(text: str) -> None:
            on_progress(Progress(stage=stage, done=0, total=STEPS, note=f"{graph}: {text}"))

        try:
            return one, build_one(
                flat_name(graph),
                key,
                folders[key.precision],
                engines,
                controlnet,
                time_limit_s=options.time_limit_s,
                on_advance=advance,
                on_note=note,
                running=running,
            )
        except EngineBuildError as error:
            raise EngineBuildError(f"{graph}: {error}") from error

    weights = max((folder / WEIGHTS).stat().st_size for folder in folders.values())
    with ThreadPoolExecutor(_jobs(options, weights)) as pool:
        futures = [pool.submit(build, one) for one in wanted]
        try:
            return [future.result() for future in as_completed(futures)]
        except BaseException:
            running.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _jobs(options: CompileOptions, weights_bytes: int) -> int:
    """Count the builds that can run at once: each has a core and enough memory, and one is always tried.

    Builds that time kernels would disturb each other's measurements on the GPU that they share.
    """
    if library_of(options.target).times_kernels:
        return 1
    fit = min(options.jobs, cores())
    if (free := free_memory()) is not None:
        fit = min(fit, free // (_BASE_BYTES + _COPIES_OF_WEIGHTS * weights_bytes))
    return max(1, fit)
