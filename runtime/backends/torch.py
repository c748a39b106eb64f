"""torch, on the CPU or an NVIDIA GPU, from the same graphs and weights as every other backend.

Places are `cpu` and `cuda`, each with `:compiled` behind it if torch is to compile the engines. That takes up to
minutes for each engine and shape of its inputs, so it is a target of its own, with costs of its own.

All engines of a loader read one copy of the weights on the device, whatever `memory` says; what is sliced for a
narrowed engine is copied besides. torch has one number of threads for the whole process: that of the backend opened
last.

On a GPU a call is a CUDA graph, captured at the first call with inputs of these shapes and replayed after that. A graph
computes in memory of its own, which its next replay overwrites, so what leaves it is copied. Since nothing else does,
all graphs of a loader share their memory, and take turns.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetc.backend import Loader, SerialisedGraph
from unetc.device import Array, Device
from unetc.errors import MissingDependency, SessionError, ShapeMismatch

from ..backend import Memory

try:
    import torch
    from safetensors.torch import load
    from torch import Tensor

    from .torch_graph import translate
except ImportError as error:
    raise MissingDependency("targets torch:* need torch and onnx: pip install 'unetc[torch]'") from error

logger = logging.getLogger(__name__)

COMPILED = "compiled"
"""What follows the place where engines are compiled."""

_COMPILERS = ("g++", "c++", "clang++")

_WARMUP_CALLS = 3
"""Calls before a capture: libraries choose their kernels and allocate their workspaces in the first ones."""
_KEPT_GRAPHS = 4
"""CUDA graphs kept per engine, those captured last."""

Module = Callable[..., tuple[Tensor, ...]]


class TorchDevice:
    """A device of torch; calls on a GPU return before their work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def put(self, array: NDArray[Any]) -> Tensor:
        """Copy an array to the device; on the CPU the tensor shares its memory."""
        array = np.ascontiguousarray(array)
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self._device)

    def to_array(self, tensor: Tensor) -> Array:
        """Copy a tensor."""
        array: Array = tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
        return array

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Make a tensor to be written."""
        return torch.empty(tuple(shape), dtype=torch.float32, device=self._device)

    def full(self, shape: Sequence[int], value: float) -> Tensor:
        """Make a tensor of one value."""
        return torch.full(tuple(shape), value, dtype=torch.float32, device=self._device)

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join tensors along the batch."""
        return torch.cat(list(tensors))

    def exp(self, tensor: Tensor) -> Tensor:
        """Take the exponential of every element."""
        return torch.exp(tensor)

    def is_finite(self, tensor: Tensor) -> bool:
        """Tell whether no element is NaN or infinite; this one flag is copied from the device."""
        return bool(torch.isfinite(tensor).all())

    def synchronize(self) -> None:
        """Wait until everything that was asked of the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class TorchProgram:
    """A module that is called with tensors by name."""

    def __init__(self, module: Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._module = module
        self._inputs = tuple(inputs)
        self._emitted = tuple(outputs[1:])

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run; what comes first is copied into the output."""
        if missing := [name for name in self._inputs if name not in inputs]:
            raise SessionError(f"the engine needs {missing[0]}, which was not given. Pass it with the conditions.")
        try:
            with torch.no_grad():
                prediction, *emitted = self._module(*(inputs[name] for name in self._inputs))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise SessionError(f"torch failed: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
        if prediction.shape != output.shape:
            raise ShapeMismatch(f"an engine gives {tuple(prediction.shape)}; expected {tuple(output.shape)}.")
        output.copy_(prediction)
        return dict(zip(self._emitted, emitted, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A CUDA graph and the memory it reads and writes."""

    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What CUDA graphs that never run at the same time share."""

    lock: threading.Lock
    pool: Any
    """Where they compute."""


class CapturedModule:
    """A module that is replayed as a CUDA graph, or called as it is where it cannot be captured."""

    def __init__(self, module: Module, turns: Turns) -> None:
        self._module = module
        self._turns = turns
        self._captures: dict[object, Capture | None] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Replay the graph for inputs of these shapes; the results are copies."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        with self._turns.lock:
            if key not in self._captures:
                while len(self._captures) >= _KEPT_GRAPHS:
                    del self._captures[next(iter(self._captures))]
                self._captures[key] = self._capture(inputs)
            capture = self._captures[key]
            if capture is None:
                return self._module(*inputs)
            for own, given in zip(capture.inputs, inputs, strict=True):
                own.copy_(given)
            capture.graph.replay()
            return tuple(output.clone() for output in capture.outputs)

    def _capture(self, inputs: Sequence[Tensor]) -> Capture | None:
        """Capture a graph over copies of the inputs; None if that fails."""
        try:
            own = tuple(tensor.clone() for tensor in inputs)
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARMUP_CALLS):
                    self._module(*own)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._turns.pool):
                outputs = self._module(*own)
        except RuntimeError as error:
            logger.warning("no CUDA graph could be captured, so kernels are launched one by one: %s", error)
            return None
        return Capture(graph=graph, inputs=own, outputs=tuple(outputs))


class TorchLoader:
    """Translates graphs over one copy of the weights on the device."""

    def __init__(self, weights: bytes, device: torch.device, *, compiled: bool) -> None:
        self._device = device
        self._compiled = compiled
        self._weights = {name: tensor.to(device) for name, tensor in load(weights).items()}
        self._turns = None
        if device.type == "cuda":
            self._turns = Turns(lock=threading.Lock(), pool=torch.cuda.graph_pool_handle())

    def load(self, graph: SerialisedGraph) -> TorchProgram:
        """Translate a graph."""
        translation = translate(graph.graph, self._weights, self._device)
        module: Module = translation.module
        if self._compiled:
            module = torch.compile(module, fullgraph=True)
        if self._turns is not None:
            module = CapturedModule(module, self._turns)
        return TorchProgram(module, translation.inputs, translation.outputs)


class TorchBackend:
    """Runs graphs in torch."""

    def __init__(self, device: torch.device, *, compiled: bool) -> None:
        self.device: Device = TorchDevice(device)
        self._device = device
        self._compiled = compiled

    def open_weights(self, weights: bytes) -> Loader:
        """Copy the weights to the device, once for all engines."""
        return TorchLoader(weights, self._device, compiled=self._compiled)


def open_backend(*, place: str, threads: int, memory: Memory) -> TorchBackend:
    """Open the backend.

    Raises:
        SessionError: If there is no GPU, or no compiler.
    """
    name, _, mode = place.partition(":")
    if name == "cuda" and not torch.cuda.is_available():
        raise SessionError(
            f"target torch:{place} needs an NVIDIA GPU, and torch {torch.__version__} finds none. "
            "Install its driver and a build of torch for CUDA, or use torch:cpu."
        )
    if mode == COMPILED and not any(map(shutil.which, _COMPILERS)):
        raise SessionError(
            f"target torch:{place} needs a C++ compiler, and none of {', '.join(_COMPILERS)} is on the path. "
            f"Install one, or use torch:{name}."
        )
    if threads:
        torch.set_num_threads(threads)
    return TorchBackend(torch.device(name), compiled=mode == COMPILED)
