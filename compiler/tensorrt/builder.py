"""Build one engine with a library; runs in a separate process, which may crash."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from unetc.artifacts.record import write_atomically
from unetc.backend import DOMAIN, GROUP_NORM
from unetc.environment import peak_memory
from unetc.errors import EngineBuildError, OutOfMemory
from unetc.memory import SIGNS
from unetc.nvidia.library import Library, library_of, started, words
from unetc.nvidia.sizes import Shape

from .messages import STEPS, BuildRequest, Built
from .shapes import Dimension, resolve

_NO_KERNEL = "could not find any implementation"
"""Part of the libraries' messages where no kernel fits into memory."""


def build(request: BuildRequest, folder: Path, on_advance: Callable[[int], bool]) -> Built:
    """Parse a graph with its weights, build an engine for ranges of shapes and write it to a file.

    Args:
        request: The engine to build.
        folder: Folder of the files that the request names.
        on_advance: Called with the number of `STEPS` that are done; the build is cancelled when it returns False.

    Raises:
        EngineBuildError: If the library cannot parse the graph or build the engine; the message quotes the library.
        OutOfMemory: If the library reports a lack of memory.
    """
    library = library_of(request.target)
    trt = library.load()
    complaints: list[str] = []
    logger = library.logger(complaints)
    builder = started(trt.Builder, logger)
    if builder is None:
        raise EngineBuildError(f"{library.module} cannot start: {words(complaints)}")
    network = builder.create_network(_strongly_typed(trt))
    _parse(trt, network, logger, folder / request.graph)
    _let_decompose(trt, network)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    signature = {value.name: _declared(value) for value in inputs}
    shapes = resolve(signature, request.sizes, request.rows, request.controlnet)
    config = builder.create_builder_config()
    config.add_optimization_profile(_call_ranges(builder, shapes))
    config.builder_optimization_level = request.effort.optimization_level
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32; lower precision is chosen in the graph
    if library.portable:  # its runtime would allocate memory at some sizes, which no CUDA graph can capture
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    workspace = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace * request.effort.workspace_share))
    if request.on_this_gpu and library.portable:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    monitor = _monitor(trt, on_advance)
    config.progress_monitor = monitor  # the config does not keep the monitor alive
    timing = _attach_timing(library, config, folder / request.timing)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        said = words(complaints)
        refused = OutOfMemory if any(sign in said.lower() for sign in (*SIGNS, _NO_KERNEL)) else EngineBuildError
        raise refused(f"{library.module} {trt.__version__} cannot build the engine: {said}")
    (folder / request.engine).write_bytes(memoryview(serialized))
    if timing is not None:
        write_atomically(folder / request.timing, bytes(timing.serialize()))
    return Built(
        layers=network.num_layers,
        shapes=shapes,
        peak_bytes=peak_memory(),
        scratch_bytes=_scratch(trt, logger, serialized),
    )


def _parse(trt: Any, network: Any, logger: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(_read(path), str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
        raise EngineBuildError(f"the parser of {trt.__name__} {trt.__version__} refuses the graph: {said}")


def _read(path: Path) -> bytes:
    """Read a graph; its group norms become those of ONNX, for which the libraries have kernels."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, GROUP_NORM):
            node.domain, node.op_type = "", "GroupNormalization"
    graph: bytes = model.SerializeToString()
    return graph


def _strongly_typed(trt: Any) -> int:
    """Return the flag that takes every precision from the graph; later versions always do so."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _let_decompose(trt: Any, network: Any) -> None:
    """Allow attention without a fused kernel (in float32, on some GPUs) to be built from plain operators."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer  # the binding always returns the base class
            layer.attention.decomposable = True


def _declared(value: Any) -> tuple[Dimension, ...]:
    """Read the shape of an input: sizes, or the names that the graph gives them."""
    return tuple(size if size >= 0 else value.get_dimension_name(i) or "?" for i, size in enumerate(value.shape))


def _call_ranges(builder: Any, shapes: dict[str, tuple[Shape, Shape, Shape]]) -> Any:
    """Make the library's optimization profile from the least, the usual and the largest shape of every input."""
    ranges = builder.create_optimization_profile()
    for name, corners in shapes.items():
        ranges.set_shape(name, *corners)
    return ranges


def _attach_timing(library: Library, config: Any, path: Path) -> Any:
    if not library.times_kernels:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _scratch(trt: Any, logger: Any, serialized: Any) -> int | None:
    """Load an engine to read the size of its scratch memory; None without a GPU that can run it."""
    runtime = started(trt.Runtime, logger)
    loaded = None if runtime is None else runtime.deserialize_cuda_engine(serialized)
    return None if loaded is None else int(loaded.device_memory_size_v2)


def _monitor(trt: Any, on_advance: Callable[[int], bool]) -> Any:
    """Make a progress monitor that turns the nested phases of a build into one growing number."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()  # phases may run in several threads
            self._open: dict[str, tuple[str | None, int, int]] = {}
            self._done = 0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._open[name] = (parent, 0, steps)

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._open.pop(name, None)

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                if name in self._open:
                    parent, _, steps = self._open[name]
                    self._open[name] = (parent, step + 1, steps)
                    self._done = max(self._done, int(STEPS * self._share(name)))
                return on_advance(self._done)

        def _share(self, name: str) -> float:
            share = 0.0
            at: str | None = name
            while at is not None and at in self._open:
                parent, done, steps = self._open[at]
                share = min(1.0, (done + share) / max(1, steps))
                at = parent
            return share

    return Monitor()
