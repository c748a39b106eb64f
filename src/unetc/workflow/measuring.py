"""Measure on targets whose engines are built ahead: each is built when it is first loaded.

Analysis and build load graphs that no bundle has yet, some of them hundreds of times narrower than others. Sampling a
bundle builds nothing: that is `unetc compile`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from unetc.analyzer.analysis import largest_batch
from unetc.backend import Backend, Loader, Program, SerialisedGraph
from unetc.compiler.tensorrt.messages import STEPS
from unetc.conditions import Conditions
from unetc.device import Device
from unetc.errors import SessionError, StaleEngineError
from unetc.nvidia.key import Effort, EngineKey
from unetc.nvidia.library import LIBRARIES
from unetc.nvidia.precision import Precision
from unetc.nvidia.sizes import Range, Sizes
from unetc.progress import OnProgress, Progress
from unetc.residuals import Residual

from .compile import build_one, private_folder

if TYPE_CHECKING:
    from unetc.runtime.backends.tensorrt import TensorRtBackend, TensorRtLoader

_GRAPH = "graph.onnx"
_TIME_LIMIT_S = 3600.0
"""For one engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What programs will be called with."""

    sizes: Sizes
    rows: Mapping[str, tuple[int, ...]]
    """Shape of one row of each condition."""
    residuals: tuple[Residual, ...] = ()
    """What graphs take of a ControlNet."""

    @classmethod
    def of(cls, sample_shape: tuple[int, int, int], batch: int, samples: int, conditions: Conditions) -> Calls:
        """Foresee the calls of an analysis and of what is built from it.

        Args:
            sample_shape: [channel, height, width].
            batch: Samples per call where time is measured.
            samples: Trajectories of the analysis.
            conditions: Of the samples; guided ones double the batch.
        """
        _, height, width = (Range(least=size, usual=size, most=size) for size in sample_shape)
        each, most = conditions.rows_per_sample, max(batch, largest_batch(samples))
        rows = Range(least=1, usual=each * batch, most=each * most)
        return cls(
            sizes=Sizes(batch=rows, height=height, width=width),
            rows={name: tuple(array.shape[1:]) for name, array in conditions.own.items()},
            residuals=conditions.residuals,
        )


def build_as_needed(target: str, backend: Backend, calls: Calls, on_progress: OnProgress) -> Backend:
    """Let a backend whose engines are built ahead build those that it lacks; another is given back as it is.

    Raises:
        SessionError: If the target is one of a lower precision, which needs a finished bundle.
    """
    library, _, precision = target.partition(":")
    if library not in LIBRARIES:
        return backend
    if precision:
        raise SessionError(
            f"cannot measure on target {target}: what must stay float32 is decided over all engines of a bundle. "
            f"Analyse and build on {library}, then `unetc compile BUNDLE --target {library} --precision {precision}`."
        )
    return BuildingBackend(cast("TensorRtBackend", backend), calls, on_progress)


class BuildingBackend:
    """Builds engines of float32 and runs them."""

    def __init__(self, backend: TensorRtBackend, calls: Calls, on_progress: OnProgress) -> None:
        self._backend = backend
        self._calls = calls
        self._on_progress = on_progress

    @property
    def device(self) -> Device:
        """Where inputs and outputs live."""
        return self._backend.device

    def open_weights(self, weights: bytes) -> Loader:
        """Write the weights where only we can change them; engines are built there."""
        return BuildingLoader(self._backend, weights, self._calls, self._on_progress)


class BuildingLoader:
    """Builds the engine of a graph unless the cache has it, and loads it."""

    def __init__(self, backend: TensorRtBackend, weights: bytes, calls: Calls, on_progress: OnProgress) -> None:
        self._backend = backend
        self._loader: TensorRtLoader = backend.open_weights(weights)
        self._weights_sha256 = hashlib.sha256(weights).hexdigest()
        self._calls = calls
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
            precision=Precision.FP32,
            sizes=self._calls.sizes,
            rows=self._calls.rows,
            effort=Effort(),
        )
        try:
            found = self._backend.engines.open(key)
        except StaleEngineError:
            self._build(graph, key)
            found = self._backend.engines.open(key)
        return self._loader.load_engine(*found)

    def _build(self, graph: SerialisedGraph, key: EngineKey) -> None:
        folder = Path(self._folder.name)
        (folder / _GRAPH).write_bytes(graph.graph)

        def advance(done: int) -> None:
            self._on_progress(Progress(stage="build an engine", done=done, total=STEPS))

        engines, residuals = self._backend.engines, self._calls.residuals
        build_one(_GRAPH, key, folder, engines, residuals, time_limit_s=_TIME_LIMIT_S, on_advance=advance)
