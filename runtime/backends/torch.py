"""torch, on the CPU or an NVIDIA GPU, from the same graphs and weights as every other backend.

Places are `cpu` and `cuda`, each with `:compiled` behind it if torch is to compile the engines. That takes up to
minutes for each engine and shape of its inputs, so it is a target of its own, with costs of its own.

All engines of a loader read one copy of the weights on the device, whatever `memory` says; what is sliced for a
narrowed engine is copied besides. torch has one number of threads for the whole process: that of the backend opened
last.

On a GPU a call is a CUDA graph (`cuda_graph.py`), captured at the first call with inputs of these shapes; all graphs of
a loader take turns.
"""

from __future__ import annotations

import shutil

from unetc.backend import Loader, SerialisedGraph
from unetc.device import Device
from unetc.errors import MissingDependency, SessionError

from ..backend import Memory

try:
    import torch
    from safetensors.torch import load

    from .cuda_graph import CapturedModule, Pool
    from .torch_device import Module, TorchDevice, TorchProgram, gpu_of
    from .torch_graph import translate
except ImportError as error:
    raise MissingDependency("targets torch:* need torch and onnx: pip install 'unetc[torch]'") from error

COMPILED = "compiled"
"""What follows the place where engines are compiled."""

_COMPILERS = ("g++", "c++", "clang++")


class TorchLoader:
    """Translates graphs over one copy of the weights on the device."""

    def __init__(self, weights: bytes, device: torch.device, *, compiled: bool) -> None:
        self._device = device
        self._compiled = compiled
        self._weights = {name: tensor.to(device) for name, tensor in load(weights).items()}
        self._pool = Pool() if device.type == "cuda" else None

    def load(self, graph: SerialisedGraph) -> TorchProgram:
        """Translate a graph."""
        translation = translate(graph.graph, self._weights, self._device)
        module: Module = translation.module
        if self._compiled:
            module = torch.compile(module, fullgraph=True)
        if self._pool is not None:
            module = CapturedModule(lambda own=module: own, self._pool)  # type: ignore[misc]
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


def open_backend(target: str, *, threads: int, memory: Memory) -> TorchBackend:
    """Open the backend.

    Raises:
        SessionError: If there is no GPU, or no compiler.
    """
    _, place, *mode = target.split(":")
    device = gpu_of(target) if place == "cuda" else torch.device(place)
    if mode and not any(map(shutil.which, _COMPILERS)):
        raise SessionError(
            f"target {target} needs a C++ compiler, and none of {', '.join(_COMPILERS)} is on the path. "
            f"Install one, or use torch:{place}."
        )
    if threads:
        torch.set_num_threads(threads)
    return TorchBackend(device, compiled=mode == [COMPILED])
