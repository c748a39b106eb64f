"""onnxruntime on an NVIDIA GPU, by its CUDA kernels or by TensorRT, over tensors of torch.

Inputs and the prediction are bound in place; further outputs stay on the GPU as values of onnxruntime. onnxruntime uses
a separate stream, so a call waits for torch first, and returns when its work is done.

onnxruntime silently runs elsewhere rather than fail. Here, a session must have the requested providers, and only the
arithmetic of shapes may be on the CPU. onnxruntime puts these nodes there on purpose, because it reads their results
there. (The option `session.disable_cpu_ep_fallback` refuses them too, and so every graph that takes more than one
size.) With `onnxruntime:tensorrt`, CUDA kernels run the nodes that TensorRT does not take.

This TensorRT computes in TF32 where it finds that faster, as no option of onnxruntime forbids it. Only
NVIDIA_TF32_OVERRIDE=0 in the environment does, if it is set before anything uses the GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from unetc.backend import Array, Loader, SerialisedGraph
from unetc.device import Device
from unetc.errors import MissingDependency, SessionError, brief
from unetc.precision import Precision
from unetc.runtime.engine_pool import StreamingLoader

from .onnxruntime import HandingLoader, open_session, run_bound  # first: its error names the package to install
from .registry import InPrecision, Memory, take_inputs

try:
    import onnxruntime
    import torch
    from torch import Tensor

    from .torch_device import TorchDevice, gpu_of
except Exception as error:  # a library that is broken raises anything
    raise MissingDependency(
        f"onnxruntime on a GPU keeps its tensors in torch ({brief(error)}): pip install torch, for CUDA"
    ) from error

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
PROVIDERS = {
    "cuda": ((CUDA, {"use_tf32": "0"}),),  # float32 means float32
    "tensorrt": ((TENSORRT, {"trt_load_user_initializer": "1"}), (CUDA, {"use_tf32": "0"})),  # weights above 2 GB too
}
"""Providers by place, in the order in which they may take nodes."""
MISSING = {
    CUDA: "It could not load its CUDA libraries: `python -c 'import onnxruntime; onnxruntime.preload_dlls()'` names "
    "those that are missing.",
    TENSORRT: "It is linked to the libraries of TensorRT 10: pip install 'tensorrt>=10,<11'; `unetc[tensorrt]` may "
    "have brought 11.",
}
"""Advice where a provider cannot be loaded: the missing libraries, and how to get them."""

SHAPE_ARITHMETIC = {"Shape", "Size", "Constant", "ConstantOfShape", "Range", "Gather", "Squeeze", "Unsqueeze", "Concat"}
SHAPE_ARITHMETIC |= {"Slice", "Reshape", "Expand", "Identity", "Cast", "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Sqrt"}
SHAPE_ARITHMETIC |= {"Min", "Max", "ReduceProd", "Equal", "Not", "And", "Where"}
"""Operators that may be on the CPU: onnxruntime computes there everything that depends on shapes alone.

This includes the nodes of inlined functions. They have no names, and onnxruntime reports no types, so nodes are
recognized by their operators.
"""


class OnnxRuntimeGpuProgram:
    """One session with its inputs and output bound to the caller's tensors."""

    def __init__(self, session: Any, weights: object, device: Device) -> None:
        self._session = session
        self._weights = weights  # must live as long as the session
        self._device = device
        self._inputs = tuple(value.name for value in session.get_inputs())
        self._output, *self._emitted = (value.name for value in session.get_outputs())

    def __call__(self, inputs: Mapping[str, Any], output: Tensor) -> Mapping[str, object]:
        """Run; inputs are read and the output is written in place, without a copy."""
        values = take_inputs(inputs, self._inputs)
        values |= {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
        binding = self._session.io_binding()
        for name, value in values.items():
            if isinstance(value, Tensor):
                binding.bind_input(name, *_place(value))
            else:
                binding.bind_ortvalue_input(name, value)
        binding.bind_output(self._output, *_place(output))
        for name in self._emitted:
            binding.bind_output(name, output.device.type, output.device.index or 0)
        self._device.synchronize()
        return run_bound(self._session, binding, self._emitted)


def _place(tensor: Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Describe a tensor for a binding: device, its index, type of the elements, shape, address."""
    kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
    return tensor.device.type, tensor.device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr()


class OnnxRuntimeDevice(TorchDevice):
    """A GPU, where further outputs of programs are values of onnxruntime."""

    def to_array(self, tensor: Any) -> Array:
        """Copy a tensor or an OrtValue."""
        if isinstance(tensor, Tensor):
            return super().to_array(tensor)
        array: Array = tensor.numpy()
        return array

    def rows(self, tensor: Any, start: int, stop: int) -> Tensor:
        """Take rows of a tensor or an OrtValue, as a view."""
        own = tensor if isinstance(tensor, Tensor) else torch.utils.dlpack.from_dlpack(tensor)
        return super().rows(own, start, stop)


def check_placement(session: Any, wanted: str) -> None:
    """Refuse a session that does not run on the requested provider.

    Args:
        session: A session opened with `session.record_ep_graph_assignment_info`.
        wanted: The requested provider.

    Raises:
        SessionError: If the session does not have it, or leaves more than shapes to the CPU.
    """
    providers = session.get_providers()
    if wanted not in providers:
        raise SessionError(
            f"onnxruntime {onnxruntime.__version__} opened a session with {', '.join(providers)}; expected {wanted}. "
            + MISSING[wanted]
        )
    on_cpu = {
        node.op_type
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name == CPU
        for node in subgraph.get_nodes()
    }
    if computed := sorted(on_cpu - SHAPE_ARITHMETIC):
        raise SessionError(
            f"onnxruntime {onnxruntime.__version__} would run {', '.join(computed)} on the CPU; {wanted} has no kernel "
            "for it. Use torch:cuda, or another version of onnxruntime-gpu."
        )


class OnnxRuntimeGpuBackend(InPrecision):
    """Loads ONNX graphs into sessions on a GPU."""

    def __init__(
        self,
        place: str,
        gpu: torch.device,
        *,
        threads: int,
        memory: Memory = Memory.FAST,
        precision: Precision = Precision.FP32,
    ) -> None:
        self.device: Device = OnnxRuntimeDevice(gpu)
        self.precision = precision
        number = {"device_id": str(gpu.index or 0)}
        self._providers = [(provider, {**options, **number}) for provider, options in PROVIDERS[place]]
        self._threads = threads
        self._memory = memory

    def open_weights(self, weights: bytes) -> Loader:
        """Keep the weights in memory."""
        loader = HandingLoader(weights, self._threads, self._open_program)
        return StreamingLoader(loader) if self._memory is Memory.LOW else loader

    def _open_program(self, graph: SerialisedGraph, options: Any, weights: object) -> OnnxRuntimeGpuProgram:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        wanted, _ = self._providers[0]
        try:
            session = open_session(graph, options, self._providers)
        except SessionError as error:
            if wanted != TENSORRT or "TensorRT libraries" not in str(error):
                raise
            raise SessionError(f"{error}. {MISSING[TENSORRT]}") from error
        check_placement(session, wanted)
        return OnnxRuntimeGpuProgram(session, weights, self.device)


def open_backend(target: str, *, threads: int, memory: Memory) -> OnnxRuntimeGpuBackend:
    """Open the backend.

    Raises:
        MissingDependency: If the installed onnxruntime is not the one for GPUs.
        SessionError: If there is no GPU.
    """
    _, place, *_ = target.split(":")
    wanted, _ = PROVIDERS[place][0]
    if wanted not in (available := onnxruntime.get_available_providers()):
        raise MissingDependency(
            f"target {target} needs {wanted}, and the installed onnxruntime {onnxruntime.__version__} has "
            f"{', '.join(available)}. The package for GPUs takes its place: pip uninstall onnxruntime; "
            "pip install 'unetc[gpu]'"
        )
    if wanted == TENSORRT:
        _load_tensorrt()
    precision = Precision.of_target(target)
    return OnnxRuntimeGpuBackend(place, gpu_of(target), threads=threads, memory=memory, precision=precision)


def _load_tensorrt() -> None:
    """Load TensorRT, which pip installs where onnxruntime does not look; onnxruntime uses a loaded library."""
    with suppress(ImportError, OSError):  # it may be installed where onnxruntime does look
        importlib.import_module("tensorrt")
