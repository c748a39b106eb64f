"""onnxruntime on the CPU.

`memory="fast"` hands the weights over from memory, and every session packs its own copy of them. `memory="low"` lets
onnxruntime map them from a file, so all sessions read the same pages, and they share one arena for their results.
Prepacking is switched off, and so are the layout changes that would copy convolution weights; this costs some speed.

The mapped bytes are the verified ones: they are written to a separate file in a private folder. The bundle's file could
be changed after its hash was checked.

Threads never spin. The idle threads of a session would otherwise occupy the cores while another session's engine runs;
that made switching engines twice as slow.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unetc.backend import WEIGHTS, Array, Loader, Program, SerialisedGraph
from unetc.device import Device, Host
from unetc.errors import MissingDependency, SessionError, brief
from unetc.precision import LARGEST, Precision, rounded_from
from unetc.temporary import PrivateFolder, no_room
from unetc.tensors import load_tensors

from .registry import InPrecision, Memory, take_inputs

try:
    import onnxruntime
except Exception as error:  # a library that is broken raises anything
    raise MissingDependency(
        f"target onnxruntime:cpu needs onnxruntime ({brief(error)}): pip install 'unetc[cpu]'"
    ) from error


_TYPES = {Precision.FP16: np.float16}
"""Types of weights; numpy has no bfloat16, so no target of onnxruntime uses it."""


class OnnxRuntimeProgram:
    """One session with its inputs and output bound to the caller's arrays."""

    def __init__(self, session: Any, weights: object) -> None:
        self._session = session
        self._weights = weights  # must live as long as the session
        self._inputs = tuple(value.name for value in session.get_inputs())
        self._output, *self._emitted = (value.name for value in session.get_outputs())

    def __call__(self, inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
        """Run; inputs are read and the output is written in place, nothing is copied."""
        binding = self._session.io_binding()
        for name, value in take_inputs(inputs, self._inputs).items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        binding.bind_output(self._output, "cpu", 0, np.float32, output.shape, output.ctypes.data)
        for name in self._emitted:
            binding.bind_output(name, "cpu")
        return run_bound(self._session, binding, self._emitted)


def run_bound(session: Any, binding: Any, emitted: Sequence[str]) -> Mapping[str, object]:
    """Run a session whose inputs and outputs are bound; return the outputs after the first one, by name.

    Raises:
        SessionError: If onnxruntime fails.
    """
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime raises its own unrelated classes
        raise SessionError(f"onnxruntime failed: {str(error).splitlines()[0]}") from error
    return dict(zip(emitted, binding.get_outputs()[1:], strict=True)) if emitted else {}


OpenProgram = Callable[[SerialisedGraph, Any, object], Program]
"""Makes a program from a graph and a session's options; the weights must live as long as the session."""


class HandingLoader:
    """Hands the weights over from memory; no file is opened."""

    def __init__(self, weights: bytes, threads: int, open_program: OpenProgram | None = None) -> None:
        self._threads = threads
        self._open_program = open_program or _open_program
        self._values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in load_tensors(weights).items()
        }
        self._rounded: dict[str, Any] = {}

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph."""
        values = {name: self._value(name) for name in sorted(graph.weights)}
        options = _options(self._threads, os.devnull)
        options.add_external_initializers(list(values), list(values.values()))
        return self._open_program(graph, options, values)

    def _value(self, name: str) -> Any:
        """Return a weight, rounded where its name asks for it."""
        source = rounded_from(name, self._values)
        if source is None:
            if name not in self._values:
                raise SessionError(f"the weights file has no {name!r}. Build the bundle again.")
            return self._values[name]
        if name not in self._rounded:
            weight, precision = source
            clipped = np.clip(self._values[weight].numpy(), -LARGEST[precision], LARGEST[precision])
            self._rounded[name] = onnxruntime.OrtValue.ortvalue_from_numpy(clipped.astype(_TYPES[precision]))
        return self._rounded[name]


class MappingLoader:
    """Maps the weights from a private folder, which is deleted with the last program that reads them."""

    def __init__(self, weights: bytes, threads: int) -> None:
        self._threads = threads
        _register_arena()
        try:
            self._folder = PrivateFolder()
            (self._folder.path / WEIGHTS).write_bytes(weights)
        except OSError as error:
            problem = no_room(f"{len(weights)} bytes of weights", error)
            raise SessionError(f'{problem} Or load with memory="fast".') from error

    def load(self, graph: SerialisedGraph) -> OnnxRuntimeProgram:
        """Load a graph."""
        options = _options(self._threads, str(self._folder.path))
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        return _open_program(graph, options, self)


@functools.cache
def _register_arena() -> None:
    """Register the arena of this process, once: a second one would replace it."""
    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    as_requested = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1})  # the default grows in powers of two
    onnxruntime.create_and_register_allocator(place, as_requested)


def _options(threads: int, folder: str) -> Any:
    """Make the options of a session that finds external weights in a folder."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # failures reach the caller as exceptions, not as lines on stderr
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return options


def _open_program(graph: SerialisedGraph, options: Any, weights: object) -> OnnxRuntimeProgram:
    return OnnxRuntimeProgram(open_session(graph, options, ["CPUExecutionProvider"]), weights)


def open_session(graph: SerialisedGraph, options: Any, providers: Sequence[object]) -> Any:
    """Load a graph for the given providers, without falling back to others if they fail."""
    try:
        return onnxruntime.InferenceSession(graph.graph, options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own unrelated classes
        raise SessionError(f"onnxruntime cannot load an engine: {str(error).splitlines()[0]}") from error


class OnnxRuntimeHost(Host):
    """The host, where outputs of programs are values of onnxruntime."""

    def to_array(self, tensor: Any) -> Array:
        """Copy an array or an OrtValue."""
        return _array_of(tensor).copy()

    def rows(self, tensor: Any, start: int, stop: int) -> Array:
        """Take rows of an array or an OrtValue, as a view."""
        return _array_of(tensor)[start:stop]


def _array_of(tensor: Any) -> Array:
    """Return an array, or the memory of an OrtValue as one."""
    array: Array = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
    return array


class OnnxRuntimeBackend(InPrecision):
    """Loads ONNX graphs into CPU sessions."""

    device: Device = OnnxRuntimeHost()

    def __init__(self, *, threads: int, memory: Memory) -> None:
        self._threads = threads
        self._loader = MappingLoader if memory is Memory.LOW else HandingLoader

    def open_weights(self, weights: bytes) -> Loader:
        """Keep the weights in memory, or write them to a private file that sessions map."""
        return self._loader(weights, self._threads)


def open_backend(target: str, *, threads: int, memory: Memory) -> OnnxRuntimeBackend:
    """Open the backend; the CPU is its only device."""
    return OnnxRuntimeBackend(threads=threads, memory=memory)
