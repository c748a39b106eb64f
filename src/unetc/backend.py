"""The contract between engines and the code that runs them; implemented in `unetc.runtime.backends`.

The analyzer is handed a backend too, so costs and damages are measured by the code that ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .device import Array as Array
from .device import Device, Tensor
from .precision import Precision

if TYPE_CHECKING:
    from .nvidia.cache import EngineCache, EngineRecord
    from .nvidia.key import Origin

WEIGHTS = "weights.safetensors"
"""Name that graphs use for the file of their external initializers."""
DOMAIN = "unetc"
"""Domain of the operators that graphs define themselves."""
GROUP_NORM = "GroupNorm"
"""Such an operator: `GroupNormalization` of ONNX, with a definition that is precise and fast in onnxruntime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialisedGraph:
    """An ONNX graph as bytes, with the names of the initializers it expects from the weights file."""

    graph: bytes
    weights: frozenset[str]
    """Names of weights; `unetc.precision` defines the names of rounded ones."""
    call: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)
    """Shapes of the inputs in the usual call, as far as they are known; of several engines one is chosen for it."""


class Program(Protocol):
    """One loaded graph."""

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run the graph and write its first output into `output`, which has the right shape.

        Args:
            inputs: C-contiguous tensors of the backend's device, or outputs of this backend's programs. Inputs that
                the graph does not read are ignored.
            output: The tensor to write into.

        Returns:
            The graph's further outputs by name, on the device; no later call overwrites them.
        """
        ...


class Loader(Protocol):
    """Loads graphs that read one weights file."""

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph."""
        ...


class Backend(Protocol):
    """Runs graphs on one device."""

    @property
    def device(self) -> Device:
        """Device of the inputs and outputs of its programs."""
        ...

    def open_weights(self, weights: bytes) -> Loader:
        """Take the content of a weights file, in the form that loading graphs needs."""
        ...


@runtime_checkable
class TargetBackend(Backend, Protocol):
    """The backend of a target: it knows the graphs that it takes."""

    @property
    def reads(self) -> Precision:
        """Precision of the graphs that it loads: float32 for engines, which are lowered when they are built."""
        ...

    def exact(self) -> Backend | None:
        """Return the same backend in float32; None if this one is."""
        ...

    def prepared_by(self, preparation: Preparation) -> Backend:
        """Return a backend that takes every graph in float32.

        A backend that loads less than float32 asks the preparation to lower graphs, one that runs engines asks it to
        build them.
        """
        ...


class EngineLoader(Loader, Protocol):
    """Loads engines that were built from graphs over one weights file."""

    def load_engine(self, record: EngineRecord, serialized: bytes) -> Program:
        """Load an engine that the cache has returned."""
        ...


@runtime_checkable
class EngineBackend(Backend, Protocol):
    """Runs engines from a cache, which were built before they are loaded."""

    @property
    def precision(self) -> Precision:
        """Precision of its engines."""
        ...

    @property
    def here(self) -> Origin:
        """This machine, as the place where engines run."""
        ...

    @property
    def engines(self) -> EngineCache:
        """Cache of its engines."""
        ...

    @property
    def gpu_index(self) -> int:
        """Index of its GPU among those that CUDA shows to this process."""
        ...

    def over(self, engines: EngineCache) -> EngineBackend:
        """Return the same backend over another cache."""
        ...

    def open_weights(self, weights: bytes) -> EngineLoader:
        """Take the content of a weights file, from which the engines were built."""
        ...


class Preparation(Protocol):
    """Makes graphs in float32 loadable by a target; the compiler implements it, so that the runtime does not need it.

    Implemented by `unetc.compiler.tensorrt.on_demand`.
    """

    def lower(self, backend: Backend, precision: Precision) -> Backend:
        """Wrap a backend that loads graphs in a precision; the result takes them in float32."""
        ...

    def build(self, backend: EngineBackend) -> Backend:
        """Wrap a backend that runs engines; the result builds the engine of every graph that it loads."""
        ...
