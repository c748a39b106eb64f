"""onnxruntime on the CPU.

`memory="fast"` lets every session pack its own copy of the weights. `memory="low"` shares one copy: prepacking and the
layout changes that would copy convolution weights are switched off, which costs some speed.

Threads never spin: a session's idle threads would otherwise burn the cores while another session's engine runs, which
made switching engines twice as slow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetc.backend import Array
from unetc.errors import MissingDependency, SessionError

from ..backend import Memory

try:
    import onnxruntime
except ImportError as error:
    raise MissingDependency("target onnxruntime:cpu needs onnxruntime: pip install 'unetc[cpu]'") from error


class OnnxRuntimeProgram:
    """One session with its inputs and output bound to the caller's arrays."""

    def __init__(self, session: Any, owned: tuple[Any, ...]) -> None:
        self._session = session
        self._owned = owned  # shared initializers: must live as long as the session
        self._inputs = tuple(value.name for value in session.get_inputs())
        self._output, *self._emitted = (value.name for value in session.get_outputs())

    def __call__(self, inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
        """Run; inputs are read and the output is written in place, nothing is copied."""
        binding = self._session.io_binding()
        for name in self._inputs:
            value = inputs[name]
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        binding.bind_output(self._output, "cpu", 0, np.float32, output.shape, output.ctypes.data)
        for name in self._emitted:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own unrelated classes
            raise SessionError(f"onnxruntime failed: {str(error).splitlines()[0]}") from error
        return dict(zip(self._emitted, binding.get_outputs()[1:], strict=True)) if self._emitted else {}


class OnnxRuntimeBackend:
    """Loads ONNX graphs into CPU sessions."""

    def __init__(self, *, threads: int, memory: Memory) -> None:
        self._threads = threads
        self._memory = memory
        self._shared: dict[int, tuple[Any, Any]] = {}

    def load(self, graph: bytes, weights: Mapping[str, NDArray[np.generic]]) -> OnnxRuntimeProgram:
        """Load a graph; its external initializers are handed over from memory, no file is opened."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # failures reach the caller as exceptions, not as lines on stderr
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        if self._memory is Memory.LOW:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.add_session_config_entry("session.disable_prepacking", "1")
        values = [self._share(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own unrelated classes
            raise SessionError(f"onnxruntime cannot load an engine: {str(error).splitlines()[0]}") from error
        return OnnxRuntimeProgram(session, tuple(values))

    def to_array(self, emitted: Any) -> Array:
        """Copy an OrtValue."""
        array: Array = emitted.numpy().copy()
        return array

    def _share(self, array: NDArray[np.generic]) -> Any:
        """Wrap an array once, however many engines read it; keeping the array keeps its identity its own."""
        if id(array) not in self._shared:
            self._shared[id(array)] = array, onnxruntime.OrtValue.ortvalue_from_numpy(array)
        return self._shared[id(array)][1]


def open_backend(*, threads: int, memory: Memory) -> OnnxRuntimeBackend:
    """Open the backend."""
    return OnnxRuntimeBackend(threads=threads, memory=memory)
