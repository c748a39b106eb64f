"""Measure graphs that no bundle has yet, in the precision of their target.

Analysis and build load hundreds of graphs, all in float32. Where a target loads them in half precision, they are
lowered first; where its engines are built ahead, each is built when it is first loaded. Sampling a bundle does neither.

What overflows float16 is looked for in the full model alone. `compile` looks at every engine of a bundle; so no engine
that was built here is ever given out by the cache that sampling reads, and those used longest ago are deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, cast

from unetc.backend import Backend, Loader, LowPrecision, Program, SerialisedGraph
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.conditions import Conditions
from unetc.device import Device
from unetc.errors import StaleEngineError
from unetc.nvidia.cache import EngineCache, trim
from unetc.nvidia.key import Effort, EngineKey
from unetc.nvidia.library import LIBRARIES
from unetc.precision import Precision
from unetc.progress import OnProgress, Progress

from .compile_bundle import build_one
from .messages import STEPS
from .private_folder import lower_beside, private_folder

if TYPE_CHECKING:
    from unetc.compiler.prepare import Prepared
    from unetc.runtime.backends.tensorrt import TensorRtBackend, TensorRtLoader

_GRAPH = "graph.onnx"
_APART = "measured"
"""Folder in the cache of engines for those that are never served; it has one cache for each set of wide values."""
_MOST_BYTES = 20 * 2**30
"""Most that these engines take on disk: a few of the largest model, 5 GB each, or all of an analysis of a small one."""
_STAGE = "build an engine"
"""A stage of the work."""
_TIME_LIMIT_S = 3600.0
"""For one engine."""


def take_any_graph(
    target: str,
    backend: Backend,
    calls: MeasuredCalls,
    overflowing: Callable[[], frozenset[str]],
    on_progress: OnProgress,
) -> Backend:
    """Let a backend take every graph in float32: lower it, or build its engine, where that is needed.

    Args:
        target: What the backend was opened for.
        backend: The backend; given back as it is if it takes every graph.
        calls: What programs will be called with.
        overflowing: Finds the values that float16 cannot hold; asked if the target is one of float16.
        on_progress: Told how far an engine is.
    """
    if isinstance(backend, LowPrecision) and backend.reads is not Precision.FP32:
        return LoweringBackend(backend, _wide(backend.reads, overflowing))
    if target.partition(":")[0] not in LIBRARIES:
        return backend
    engines = cast("TensorRtBackend", backend)
    wide = _wide(engines.precision, overflowing)
    digest = hashlib.sha256(repr(sorted(wide)).encode()).hexdigest()
    engines = engines.over(EngineCache(engines.engines.root / _APART / digest[:32]))
    return BuildingBackend(engines, calls, wide, on_progress)


def overflow_finder(
    prepared: Prepared, scheduler: str, conditions: Conditions, on_progress: OnProgress
) -> Callable[[], frozenset[str]]:
    """Make what finds the values of a model that float16 cannot hold."""

    def find() -> frozenset[str]:
        from .calibrate_model import overflowing_in_model  # needs onnxruntime, which most targets do without

        return overflowing_in_model(prepared, scheduler, conditions, on_progress)

    return find


def _wide(precision: Precision, overflowing: Callable[[], frozenset[str]]) -> frozenset[str]:
    return overflowing() if precision is Precision.FP16 else frozenset()


class LoweringBackend:
    """Lowers graphs and runs them."""

    def __init__(self, backend: LowPrecision, wide: Collection[str]) -> None:
        self.precision = backend.reads
        self._backend = backend
        self._wide = wide

    @property
    def device(self) -> Device:
        """Where inputs and outputs live."""
        return self._backend.device

    def open_weights(self, weights: bytes) -> Loader:
        """Take the weights."""
        return LoweringLoader(self._backend.open_weights(weights), self)

    def lower(self, graph: SerialisedGraph) -> SerialisedGraph:
        """Lower a graph; one with its weights inside, a decoder, stays as it is."""
        from unetc.compiler.graph.lowering import lower_graph  # needs onnx_ir, which float32 does without

        return lower_graph(graph, self.precision, self._wide) if graph.weights else graph


class LoweringLoader:
    """Lowers graphs and loads them."""

    def __init__(self, loader: Loader, backend: LoweringBackend) -> None:
        self._loader = loader
        self._backend = backend

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph."""
        return self._loader.load(self._backend.lower(graph))


class BuildingBackend:
    """Builds engines and runs them."""

    def __init__(
        self, backend: TensorRtBackend, calls: MeasuredCalls, wide: Collection[str], on_progress: OnProgress
    ) -> None:
        self._backend = backend
        self._calls = calls
        self._wide = wide
        self._on_progress = on_progress

    @property
    def device(self) -> Device:
        """Where inputs and outputs live."""
        return self._backend.device

    def open_weights(self, weights: bytes) -> Loader:
        """Write the weights where only we can change them; engines are built there."""
        return BuildingLoader(self._backend, weights, self._calls, self._wide, self._on_progress)


class BuildingLoader:
    """Builds the engine of a graph unless the cache has it, and loads it."""

    def __init__(
        self,
        backend: TensorRtBackend,
        weights: bytes,
        calls: MeasuredCalls,
        wide: Collection[str],
        on_progress: OnProgress,
    ) -> None:
        self._backend = backend
        self._loader: TensorRtLoader = backend.open_weights(weights)
        self._weights_sha256 = hashlib.sha256(weights).hexdigest()
        self._calls = calls
        self._wide = wide
        self._on_progress = on_progress
        self._folder = private_folder(weights)  # goes with the loader

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph.

        Raises:
            EngineBuildError: If the library cannot build it.
        """
        key = EngineKey(
            origin=self._backend.here,
            graph_sha256=hashlib.sha256(graph.graph).hexdigest(),
            weights_sha256=self._weights_sha256,
            precision=self._backend.precision.over(self._weights_sha256),
            sizes=self._calls.sizes,
            rows=self._calls.rows,
            effort=Effort(),
        )
        try:
            found = self._backend.engines.open(key)
        except StaleEngineError:
            self._build(graph, key)
            found = self._backend.engines.open(key)
        self._backend.engines.touch(key)
        folder = self._backend.engines.root.parent
        if folder.name == _APART:  # never what is served
            trim(folder, _MOST_BYTES)
        return self._loader.load_engine(*found)

    def _build(self, graph: SerialisedGraph, key: EngineKey) -> None:
        folder = Path(self._folder.name)
        (folder / _GRAPH).write_bytes(graph.graph)
        if key.precision is not Precision.FP32:
            folder = lower_beside(folder, [_GRAPH], key.precision, self._wide)

        def advance(done: int) -> None:
            self._on_progress(Progress(stage=_STAGE, done=done, total=STEPS))

        def note(said: str) -> None:
            self._on_progress(Progress(stage=_STAGE, done=0, total=STEPS, note=said))

        build_one(
            _GRAPH,
            key,
            folder,
            self._backend.engines,
            self._calls.controlnet,
            time_limit_s=_TIME_LIMIT_S,
            on_advance=advance,
            on_note=note,
            gpu=self._backend.gpu.index or 0,
        )
