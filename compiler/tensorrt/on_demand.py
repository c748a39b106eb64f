"""Prepare graphs that no bundle has yet, so that they can be measured in the precision of their target.

Analysis and build load hundreds of graphs, all in float32. A target that loads graphs in half precision gets them
lowered. A target that runs engines gets each engine built when its graph is first loaded. Sampling a bundle does
neither.

Only the full model is searched for values that overflow float16, whereas `unetc compile` searches every engine of a
bundle. The cache that sampling reads therefore never serves an engine that was built here. These engines have a cache
of limited size, from which those unused for longest are deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from unetc.backend import Backend, EngineBackend, Loader, Program, SerialisedGraph
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.conditions import Conditions
from unetc.device import Device
from unetc.errors import StaleEngineError
from unetc.nvidia.cache import EngineCache, trim
from unetc.nvidia.key import Effort, EngineKey
from unetc.precision import Precision
from unetc.progress import OnProgress, Progress
from unetc.temporary import no_room

from .build_one import build_one
from .messages import STEPS
from .private_folder import lower_inside, private_folder

if TYPE_CHECKING:
    from unetc.compiler.prepare import Prepared

MOST_BYTES = 20 * 2**30
"""Most disk space for measured engines: a few of the largest model, 5 GB each, or a whole analysis of a small one."""
_GRAPH = "graph.onnx"
_APART = "measured"
"""Folder in the cache of engines for measured ones; it has one cache for each set of wide values."""
_STAGE = "build an engine"
"""Name of this stage of the work."""
_TIME_LIMIT_S = 3600.0
"""Limit for one engine."""


class OnDemand:
    """Prepares every graph when it is loaded; implements `unetc.backend.Preparation`."""

    def __init__(
        self, calls: MeasuredCalls, overflowing: Callable[[], frozenset[str]], on_progress: OnProgress
    ) -> None:
        """Prepare nothing yet.

        Args:
            calls: The calls that programs will get.
            overflowing: Finds the values that float16 cannot hold; called once, and only for a target in float16.
            on_progress: Called with the progress of each engine.
        """
        self.calls = calls
        self._overflowing = overflowing
        self._on_progress = on_progress

    def lowering(self, precision: Precision) -> Lowering | None:
        """Return the lowering to a precision; None for float32, which every graph already has."""
        if precision is Precision.FP32:
            return None
        return Lowering(precision=precision, wide=self.wide(precision))

    def lower(self, backend: Backend, precision: Precision) -> Backend:
        """Wrap a backend that loads graphs in a precision; the wrapper takes them in float32."""
        lowering = self.lowering(precision)
        return backend if lowering is None else LoweringBackend(backend, lowering)

    def build(self, backend: EngineBackend) -> Backend:
        """Wrap a backend that runs engines; the wrapper builds the engine of each graph that it loads."""
        wide = self.wide(backend.precision)
        digest = hashlib.sha256(repr(sorted(wide)).encode()).hexdigest()
        apart = backend.over(EngineCache(backend.engines.root / _APART / digest[:32]))
        return BuildingBackend(apart, self.calls, wide, self._on_progress)

    def wide(self, precision: Precision) -> frozenset[str]:
        """Name the values that stay float32 on a target of a precision."""
        return self._found if precision is Precision.FP16 else frozenset()

    @cached_property
    def _found(self) -> frozenset[str]:
        return self._overflowing()


def overflow_finder(
    prepared: Prepared, scheduler: str, conditions: Conditions, on_progress: OnProgress
) -> Callable[[], frozenset[str]]:
    """Return a function that finds the values of a model that float16 cannot hold."""

    def find() -> frozenset[str]:
        from .calibrate_model import overflowing_in_model  # needs onnxruntime, which most targets do not need

        return overflowing_in_model(prepared, scheduler, conditions, on_progress)

    return find


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """Lowers graphs to one precision."""

    precision: Precision
    """Lower than float32."""
    wide: frozenset[str]
    """Values that stay float32."""

    def lower(self, graph: SerialisedGraph) -> SerialisedGraph:
        """Lower a graph; a decoder, which has its weights inside, is returned unchanged."""
        from unetc.compiler.graph.lowering import lower_graph  # needs onnx_ir, which is not needed for float32

        return lower_graph(graph, self.precision, self.wide) if graph.weights else graph


class LoweringBackend:
    """Lowers graphs and runs them."""

    def __init__(self, backend: Backend, lowering: Lowering) -> None:
        self._backend = backend
        self._lowering = lowering

    @property
    def device(self) -> Device:
        """Device of the inputs and outputs."""
        return self._backend.device

    def open_weights(self, weights: bytes) -> Loader:
        """Take the weights."""
        return LoweringLoader(self._backend.open_weights(weights), self._lowering)


class LoweringLoader:
    """Lowers graphs and loads them."""

    def __init__(self, loader: Loader, lowering: Lowering) -> None:
        self._loader = loader
        self._lowering = lowering

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph."""
        return self._loader.load(self._lowering.lower(graph))


class BuildingBackend:
    """Builds engines and runs them."""

    def __init__(
        self, backend: EngineBackend, calls: MeasuredCalls, wide: frozenset[str], on_progress: OnProgress
    ) -> None:
        self._backend = backend
        self._calls = calls
        self._wide = wide
        self._on_progress = on_progress

    @property
    def device(self) -> Device:
        """Device of the inputs and outputs."""
        return self._backend.device

    def open_weights(self, weights: bytes) -> Loader:
        """Write the weights to a private folder, in which engines are built."""
        return BuildingLoader(self._backend, weights, self._calls, self._wide, self._on_progress)


class BuildingLoader:
    """Loads the engine of a graph, and builds it first if the cache does not have it."""

    def __init__(
        self,
        backend: EngineBackend,
        weights: bytes,
        calls: MeasuredCalls,
        wide: frozenset[str],
        on_progress: OnProgress,
    ) -> None:
        self._backend = backend
        self._loader = backend.open_weights(weights)
        self._weights_sha256 = hashlib.sha256(weights).hexdigest()
        self._calls = calls
        self._wide = wide
        self._on_progress = on_progress
        self._folder = private_folder(weights)  # deleted with the loader

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph.

        Raises:
            EngineBuildError: If the library cannot build its engine.
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
        if folder.name == _APART:  # the cache that sampling reads is never trimmed
            trim(folder, MOST_BYTES)
        return self._loader.load_engine(*found)

    def _build(self, graph: SerialisedGraph, key: EngineKey) -> None:
        folder = self._folder.path
        try:
            (folder / _GRAPH).write_bytes(graph.graph)
        except OSError as error:
            raise no_room("a graph", error) from error
        if key.precision is not Precision.FP32:
            folder = lower_inside(folder, [_GRAPH], key.precision, self._wide)

        def advance(done: int) -> None:
            self._on_progress(Progress(stage=_STAGE, done=done, total=STEPS))

        def note(text: str) -> None:
            self._on_progress(Progress(stage=_STAGE, done=0, total=STEPS, note=text))

        build_one(
            _GRAPH,
            key,
            folder,
            self._backend.engines,
            self._calls.controlnet,
            time_limit_s=_TIME_LIMIT_S,
            on_advance=advance,
            on_note=note,
            gpu=self._backend.gpu_index,
        )
