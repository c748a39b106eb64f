"""Stand-ins for the parts of TensorRT that run engines: onnxruntime computes on the CPU, at the given addresses.

Engines of the real libraries cannot run without an NVIDIA GPU. This module follows the order of calls in their
documentation, and refuses calls that are out of order. `tests/nvidia/test_execution.py` checks that the real library
has the same names.

The stand-ins follow the documentation and have not been compared with a GPU yet. Each class names the test, marked
`gpu`, that checks the same on a real GPU; these tests are in `tests/nvidia/test_tensorrt_backend.py` and
`tests/runtime/test_backends.py`.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from unetc.backend import Loader, Program, SerialisedGraph
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.tensorrt.shapes import resolve
from unetc.nvidia.cache import EngineCache, EngineRecord
from unetc.nvidia.key import Effort, EngineKey
from unetc.nvidia.library import Library
from unetc.precision import Precision
from unetc.runtime.backends.onnxruntime import HandingLoader
from unetc.runtime.backends.registry import Memory
from unetc.runtime.backends.tensorrt import TensorRtBackend

__version__ = "1.0.cpu"
NAME = "tensorrt:cpu"
LIBRARY = Library(target=NAME, module=__name__, extra="none", portable=True, times_kernels=False)

SCRATCH_BYTES = 4096
_LENGTH = struct.Struct("<Q")
KERNELS = b"kernels of the CPU"


class CpuTensorRt:
    """The backend for engines, over this module; each engine is built when it is loaded, and stored in a cache.

    On a GPU: the targets `tensorrt` and `tensorrt-rtx` of every test in `test_backends.py`.
    """

    def __init__(self, library: Library, memory: Memory, calls: MeasuredCalls, engines: EngineCache) -> None:
        here = library.origin()
        self._calls = calls
        self._backend = TensorRtBackend(
            library, Precision.FP32, here=here, engines=engines, gpu=torch.device("cpu"), memory=memory
        )
        self.device = self._backend.device

    def open_weights(self, weights: bytes) -> Loader:
        """Take the weights, which engines have inside."""
        return CpuLoader(self._backend, weights, self._calls)


class CpuLoader:
    """Builds engines of graphs, puts them into the cache, and loads them from the cache.

    On a GPU: the targets `tensorrt` and `tensorrt-rtx` of every test in `test_backends.py`.
    """

    def __init__(self, backend: TensorRtBackend, weights: bytes, calls: MeasuredCalls) -> None:
        self._backend = backend
        self._weights = weights
        self._calls = calls

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph."""
        serialized = serialize(graph.graph, self._weights)
        record = EngineRecord(
            key=EngineKey(
                origin=self._backend.here,
                graph_sha256=hashlib.sha256(graph.graph).hexdigest(),
                weights_sha256=hashlib.sha256(self._weights).hexdigest(),
                precision=Precision.FP32,
                sizes=self._calls.sizes,
                rows=self._calls.rows,
                effort=Effort(),
            ),
            engine_sha256=hashlib.sha256(serialized).hexdigest(),
            engine_bytes=len(serialized),
            layers=1,
            shapes=resolve(signature(graph.graph), self._calls.sizes, self._calls.rows),
            spent=Effort(),
            tries=1,
            seconds=0.0,
            peak_bytes=0,
            scratch_bytes=SCRATCH_BYTES,
        )
        self._backend.engines.put(record, serialized)
        return self._backend.open_weights(self._weights).load(graph)


def signature(graph: bytes) -> dict[str, tuple[int | str, ...]]:
    """Read the shapes of a graph's inputs: sizes, or their names."""
    return {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in _inputs(onnx.load_model_from_string(graph).graph)
    }


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    inside = {one.name for one in graph.initializer}
    return [value for value in graph.input if value.name not in inside]


def without_streams(patch: pytest.MonkeyPatch) -> None:
    """Give torch a stream where there is no GPU; no graph is captured."""
    patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))


class ILogger:
    """Gets the library's messages.

    On a GPU: `test_a_shape_outside_the_call_ranges_is_an_error_that_quotes_the_library`.
    """

    class Severity(enum.IntEnum):
        """Lower numbers are more severe."""

        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Severity, message: str) -> None:
        """Take a message."""
        raise NotImplementedError


DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT32 INT64 BOOL")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
ExecutionContextAllocationStrategy = enum.Enum(
    "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
)
DynamicShapesKernelSpecializationStrategy = enum.Enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE")

_ELEMENTS = {
    onnx.TensorProto.FLOAT: (DataType.FLOAT, np.dtype(np.float32)),
    onnx.TensorProto.INT64: (DataType.INT64, np.dtype(np.int64)),
}


def serialize(graph: bytes, weights: bytes) -> bytes:
    """Build a serialized engine."""
    return _LENGTH.pack(len(graph)) + graph + weights


class Runtime:
    """Loads engines.

    On a GPU: `test_an_engine_that_is_found_is_loaded_and_captured`.
    """

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized: bytes) -> ICudaEngine | None:
        """Load an engine; None if the bytes are not an engine."""
        if len(serialized) < _LENGTH.size:
            self.logger.log(ILogger.Severity.ERROR, "the engine is too short")
            return None
        (length,) = _LENGTH.unpack_from(serialized)
        graph = bytes(serialized[_LENGTH.size : _LENGTH.size + length])
        return ICudaEngine(self.logger, graph, bytes(serialized[_LENGTH.size + length :]))


@dataclass
class IRuntimeCache:
    """Finished kernels.

    On a GPU: `test_finished_kernels_are_stored_and_used_at_the_next_start`.
    """

    kernels: bytes = b""

    def serialize(self) -> bytes:
        """Return the finished kernels."""
        return self.kernels

    def deserialize(self, blob: bytes) -> bool:
        """Load kernels that were finished before; False if they do not fit."""
        if blob != KERNELS:
            return False
        self.kernels = blob
        return True


@dataclass
class IRuntimeConfig:
    """Settings of an engine's execution contexts.

    On a GPU: `test_finished_kernels_are_stored_and_used_at_the_next_start`.
    """

    dynamic_shapes_kernel_specialization_strategy: Any = None
    strategy: Any = ExecutionContextAllocationStrategy.STATIC
    cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        """Set who allocates scratch memory."""
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        """Make an empty cache."""
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        """Set the cache of finished kernels."""
        self.cache = cache
        return True


class ICudaEngine:
    """A loaded engine.

    On a GPU: `test_an_engine_that_is_found_is_loaded_and_captured`.
    """

    def __init__(self, logger: ILogger, graph: bytes, weights: bytes) -> None:
        self.logger = logger
        proto = onnx.load_model_from_string(graph).graph
        external = {one.name for one in proto.initializer if one.data_location == onnx.TensorProto.EXTERNAL}
        inputs = _inputs(proto)
        self._tensors = [*inputs, *proto.output]
        loader = HandingLoader(weights, 1, _session)
        self.session: Any = loader.load(SerialisedGraph(graph=graph, weights=frozenset(external)))
        self.elements = {value.name: _ELEMENTS[value.type.tensor_type.elem_type] for value in self._tensors}
        self.inputs = [value.name for value in inputs]
        self.outputs = [value.name for value in proto.output]
        self.device_memory_size_v2 = SCRATCH_BYTES

    @property
    def num_io_tensors(self) -> int:
        """Number of inputs and outputs together."""
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        """Return the name of an input or output."""
        return str(self._tensors[index].name)

    def get_tensor_dtype(self, name: str) -> Any:
        """Return the type of a tensor's elements."""
        return self.elements[name][0]

    def get_tensor_mode(self, name: str) -> Any:
        """Return whether a tensor is an input or an output."""
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def create_runtime_config(self) -> IRuntimeConfig:
        """Make a configuration with the default settings."""
        return IRuntimeConfig()

    def create_execution_context(self, how: IRuntimeConfig | Any) -> IExecutionContext:
        """Make a context; the libraries take a strategy, or a configuration that contains one."""
        if isinstance(how, IRuntimeConfig):
            if how.cache is not None:
                how.cache.kernels = KERNELS
            how = how.strategy
        return IExecutionContext(self, user_managed=how is ExecutionContextAllocationStrategy.USER_MANAGED)


def _session(graph: SerialisedGraph, options: Any, weights: object) -> Any:
    session = onnxruntime.InferenceSession(graph.graph, options, providers=["CPUExecutionProvider"])
    return session, weights  # which must live as long


@dataclass
class IExecutionContext:
    """Runs an engine, one call after the other.

    On a GPU: `test_an_engine_that_is_found_is_loaded_and_captured`, and `test_backends.py` for its results.
    """

    engine: ICudaEngine
    user_managed: bool
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    scratch: tuple[int, int] = (0, 0)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """Set the shape of an input."""
        if name not in self.engine.inputs:
            return self._refuse(f"{name} is no input")
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return a shape; the shape of an output is known once all inputs have one."""
        if name in self.shapes:
            return self.shapes[name]
        if missing := [one for one in self.engine.inputs if one not in self.shapes]:
            self._refuse(f"no shape of {missing[0]}")
            return (-1,)
        zeros = {one: np.zeros(self.shapes[one], self.engine.elements[one][1]) for one in self.engine.inputs}
        return dict(zip(self.engine.outputs, (value.shape for value in self._run(zeros)), strict=True))[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Set the address of a tensor."""
        if not address:
            return self._refuse(f"{name} has no address")
        self.addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        """Provide scratch memory for the next call."""
        self.scratch = address, size

    def is_stream_capturable(self, stream: int) -> bool:
        """Return whether calls can be captured; on the CPU they cannot."""
        return False

    def execute_async_v3(self, stream: int) -> bool:
        """Read the inputs, compute, and write the outputs; the scratch memory is for one call."""
        engine, (address, size), self.scratch = self.engine, self.scratch, (0, 0)
        if self.user_managed and (not address or size < engine.device_memory_size_v2):
            return self._refuse("no scratch memory")
        lost = [name for name in itertools.chain(engine.inputs, engine.outputs) if name not in self.addresses]
        if lost:
            return self._refuse(f"no address of {lost[0]}")
        if size:
            ctypes.memset(address, 255, size)  # nothing may be kept in scratch memory
        results = self._run({name: self._at(name, self.shapes[name]).copy() for name in engine.inputs})
        for name, value in zip(engine.outputs, results, strict=True):
            self._at(name, value.shape)[...] = value
        return True

    def _run(self, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        session, _ = self.engine.session
        results: list[NDArray[Any]] = session.run(self.engine.outputs, inputs)
        return results

    def _at(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """View the memory of a tensor."""
        element = self.engine.elements[name][1]
        count = int(np.prod(shape, dtype=np.int64)) * element.itemsize
        return np.frombuffer((ctypes.c_char * count).from_address(self.addresses[name]), element).reshape(shape)

    def _refuse(self, message: str) -> bool:
        self.engine.logger.log(ILogger.Severity.ERROR, message)
        return False
