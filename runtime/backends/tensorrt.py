"""tensorrt and tensorrt_rtx on an NVIDIA GPU: engines that `unetc compile` has put into the cache of engines.

A target names the library and the precision, float32 if none: `tensorrt-rtx`, `tensorrt:fp16`. The hashes of graph and
weights identify the engine of a graph. It must have been built by this cache's owner, for these versions, this platform
and this GPU. A missing engine is never built here. `EngineCache.find` chooses between several that differ in their
call ranges. A call outside the ranges that an engine was built for is refused.

Tensors are torch's; no byte is copied on the way. A call is a CUDA graph, and each graph has a separate execution
context, because a graph stays valid only as long as its context is left alone. The scratch memory of engines comes from
torch's allocator at every call and every capture, and all graphs of a loader capture from one pool. Engines therefore
share it: they take the largest need, not the sum. Weights cannot be shared between engines.

With `memory="low"` engines stay in the memory of the process, and are on the GPU for the phases that need them. Each is
then launched kernel by kernel: a capture for one phase would cost more than it saves.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import Any

from unetc.backend import Backend, Preparation, Program, SerialisedGraph
from unetc.device import Device
from unetc.environment import cache_folder
from unetc.errors import MissingDependency, SessionError, brief
from unetc.nvidia.cache import EngineCache, EngineRecord
from unetc.nvidia.call_ranges import check_call
from unetc.nvidia.kernels import KernelFile
from unetc.nvidia.key import Origin
from unetc.nvidia.library import LIBRARIES, Library, started, words
from unetc.precision import Precision
from unetc.runtime.engine_pool import LoadedLater
from unetc.treatments import COMPUTED

from .registry import InPrecision, Memory

try:
    import torch
    from torch import Tensor

    from .cuda_graph import CapturedModule, Pool
    from .torch_device import Module, TorchDevice, TorchProgram, current, gpu_of
except Exception as error:  # a library that is broken raises anything
    raise MissingDependency(
        f"targets tensorrt* keep their tensors in torch ({brief(error)}): pip install torch, for CUDA"
    ) from error

logger = logging.getLogger(__name__)

_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""Types of elements by the library's names."""
_ALIGNMENT = 256
"""Bytes; torch's allocator aligns at least as much."""
_OLDER_GPUS = "Engines for many GPUs run from compute capability 8.0 on; below it, compile with --on-this-gpu."

Shapes = tuple[tuple[int, ...], ...]
"""Shapes of the inputs of a call."""


class Engine:
    """An engine on the GPU."""

    def __init__(self, library: Library, serialized: bytes, kernels: KernelFile) -> None:
        """Deserialise, which runs code of the engine.

        Args:
            library: The library that built it.
            serialized: The engine.
            kernels: File of the kernels that the library finishes here; unused by a library that finishes none.

        Raises:
            SessionError: If the library refuses it; the message quotes the library.
        """
        self._kernel_cache: KernelCache | None = None  # deleted first, because attributes are deleted in this order
        self._trt = library.load()
        self.complaints: list[str] = []
        self._logger = library.logger(self.complaints)  # the library does not keep these three alive
        self._runtime = started(self._trt.Runtime, self._logger)
        self._engine: Any = None if self._runtime is None else self._runtime.deserialize_cuda_engine(serialized)
        if self._engine is None:
            raise SessionError(
                f"{library.module} {self._trt.__version__} cannot load an engine: {words(self.complaints)}"
                + (f". {_OLDER_GPUS}" if library.portable else "")
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.types = {name: _TYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        is_input = {name: self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        outputs = [name for name in names if not is_input[name]]
        self.outputs = tuple(sorted(outputs, key=lambda name: name.startswith(COMPUTED)))
        """Names of the outputs, the prediction first."""
        self.scratch_bytes = int(self._engine.device_memory_size_v2)
        if library.portable:
            self._kernel_cache = KernelCache(self._trt, self._engine, kernels)

    def context(self) -> Any:
        """Make an execution context whose scratch memory is provided by the caller."""
        if self._kernel_cache is None:
            user_managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            return self._engine.create_execution_context(user_managed)
        return self._engine.create_execution_context(self._kernel_cache.config)

    def keep_kernels(self, shapes: Shapes) -> None:
        """Write the kernels that the library has finished to disk; called after a call has run."""
        if self._kernel_cache is not None:
            self._kernel_cache.keep(shapes)


class KernelCache:
    """Makes a library reuse the finished kernels on disk, and finish all others at once.

    No kernel is replaced later, after it has been captured.
    """

    def __init__(self, trt: Any, engine: Any, kernels: KernelFile) -> None:
        """Load the kernels on disk, if the library finds that they fit this GPU.

        Args:
            trt: The library.
            engine: The library's engine.
            kernels: The file.
        """
        self.config = engine.create_runtime_config()
        """Configuration of all execution contexts of the engine."""
        self.config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._kernels = kernels
        self._cache = self.config.create_runtime_cache()
        known = kernels.read()
        if known is not None and not self._cache.deserialize(known):
            logger.info("%s no longer fits this GPU or driver; its kernels are made again", kernels.path)
        self.config.set_runtime_cache(self._cache)
        self._kept: set[Shapes] = set()

    def keep(self, shapes: Shapes) -> None:
        """Write finished kernels to disk, once for every shape of a call, and therefore never during a capture."""
        if shapes in self._kept:
            return
        self._kept.add(shapes)
        finished = self._cache.serialize()
        if finished is not None:
            self._kernels.keep(bytes(finished))


class Execution:
    """An execution context of an engine; a captured one serves calls of one shape."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._context = engine.context()  # deleted before the engine, because attributes are deleted in this order
        self._engine = engine
        self._device = device

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Launch the engine on torch's stream.

        Raises:
            RuntimeError: If the library refuses; the message quotes the library.
        """
        engine, context = self._engine, self._context
        if context is None:
            raise RuntimeError(f"no execution context: {words(engine.complaints)}")
        tensors = {name: _aligned(t.to(engine.types[name])) for name, t in zip(engine.inputs, inputs, strict=True)}
        for name, tensor in tensors.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(words(engine.complaints))
        for name in engine.outputs:
            shape = tuple(context.get_tensor_shape(name))
            tensors[name] = torch.empty(shape, dtype=engine.types[name], device=self._device)
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise RuntimeError(words(engine.complaints))
        scratch = torch.empty(max(1, engine.scratch_bytes), dtype=torch.uint8, device=self._device)
        context.set_device_memory(scratch.data_ptr(), engine.scratch_bytes)
        if not context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise RuntimeError(words(engine.complaints))
        engine.keep_kernels(tuple(tuple(tensor.shape) for tensor in inputs))
        return tuple(tensors[name] for name in engine.outputs)

    def is_capturable(self) -> bool:
        """Ask the library whether calls can be captured; True if the library cannot be asked."""
        asked = getattr(self._context, "is_stream_capturable", None)  # tensorrt_rtx alone has it
        return asked is None or bool(asked(torch.cuda.current_stream(self._device).cuda_stream))


def _aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor at an address that the libraries take; copy only if needed."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


class Launched:
    """An execution that threads use in turns, in any stream."""

    def __init__(self, execution: Execution, pool: Pool) -> None:
        self._execution = execution
        self._pool = pool

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Launch the engine."""
        with self._pool.turn():
            return self._execution(*inputs)


class EngineProgram:
    """A program that first checks whether its engine takes a call."""

    def __init__(self, program: TorchProgram, record: EngineRecord) -> None:
        self._program = program
        self._record = record

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Check the call and run; the prediction is copied into the output."""
        check_call(self._record, {name: tuple(tensor.shape) for name, tensor in inputs.items()})
        return self._program(inputs, output)


class TensorRtLoader:
    """Finds and loads the engines of graphs over one weights file."""

    def __init__(self, backend: TensorRtBackend, weights_sha256: str) -> None:
        self._backend = backend
        self._weights_sha256 = weights_sha256
        self._pool = Pool(backend.gpu)

    def load(self, graph: SerialisedGraph) -> Program:
        """Load the engine of a graph.

        Raises:
            StaleEngineError: If the cache has no engine that can run here.
            SessionError: If the library refuses the engine.
        """
        backend = self._backend
        precision = backend.precision.over(self._weights_sha256)
        digest = hashlib.sha256(graph.graph).hexdigest()
        found = backend.engines.find(digest, self._weights_sha256, precision, backend.here, graph.call)
        if backend.memory is Memory.LOW:
            return LoadedLater(partial(self.load_engine, *found))
        return self.load_engine(*found)

    def load_engine(self, record: EngineRecord, serialized: bytes) -> EngineProgram:
        """Load an engine that the cache has returned."""
        library, device = self._backend.library, self._backend.gpu
        module: Module
        with current(device):  # whichever thread this is
            engine = Engine(library, serialized, KernelFile(self._backend.engines, record, self._backend.here))
            if self._backend.memory is Memory.LOW:
                module = Launched(Execution(engine, device), self._pool)
            else:
                module = CapturedModule(lambda: Execution(engine, device), self._pool)
        logger.info("%s: %s, %s", library.target, record.key.precision, record.key.sizes.options())
        program = TorchProgram(module, engine.inputs, engine.outputs, library=library.module)
        return EngineProgram(program, record)


class TensorRtBackend(InPrecision):
    """Runs engines of one library in one precision."""

    def __init__(
        self,
        library: Library,
        precision: Precision,
        *,
        here: Origin,
        engines: EngineCache,
        gpu: torch.device,
        memory: Memory = Memory.FAST,
    ) -> None:
        self.device: Device = TorchDevice(gpu)
        self.library = library
        self.precision = precision
        self.here = here
        self.engines = engines
        self.gpu = gpu
        self.memory = memory

    @property
    def reads(self) -> Precision:
        """Precision of the graphs that identify engines: always float32."""
        return Precision.FP32

    @property
    def gpu_index(self) -> int:
        """Index of the GPU among those that CUDA shows to this process."""
        return self.gpu.index or 0

    def over(self, engines: EngineCache) -> TensorRtBackend:
        """Return this backend over another cache."""
        other = copy(self)
        other.engines = engines
        return other

    def prepared_by(self, preparation: Preparation) -> Backend:
        """Return a backend that takes every graph in float32: the engine of each is built when it is loaded."""
        return preparation.build(self)

    def open_weights(self, weights: bytes) -> TensorRtLoader:
        """Hash the weights, which are inside the engines."""
        return TensorRtLoader(self, hashlib.sha256(weights).hexdigest())


def open_backend(target: str, *, threads: int, memory: Memory) -> TensorRtBackend:
    """Open the backend with the engines of this user's cache; `threads` is ignored.

    Raises:
        MissingDependency: If the library is not installed.
        SessionError: If there is no GPU.
    """
    name, _, precision = target.partition(":")
    library = LIBRARIES[name]
    library.load()
    gpu = gpu_of(target)
    return TensorRtBackend(
        library,
        Precision(precision or Precision.FP32),
        here=library.here(gpu.index),
        engines=EngineCache.inside(cache_folder()),
        gpu=gpu,
        memory=memory,
    )
