"""torch, on the CPU or an NVIDIA GPU, from the same graphs and weights as every other backend.

Places are `cpu` and `cuda`, followed by `:compiled` if torch is to compile the engines. Compiling takes up to minutes
for each engine and shape of its inputs, so it is a separate target with separate costs. A target that ends with `:fp16`
or `:bf16` loads the half-precision graphs of a bundle.

All engines of a loader read one copy of the weights on the device, whatever `memory` is; slices for a narrowed engine
are copied in addition. torch has one number of threads for the whole process, set by the backend that was opened last;
one that leaves the choice to torch ends the choice of an earlier one.

On a GPU a call is a CUDA graph (`cuda_graph.py`), captured at the first call with inputs of these shapes. All graphs of
a loader run in turns.
"""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping

from unetc.backend import Loader, SerialisedGraph
from unetc.device import Device
from unetc.errors import MissingDependency, SessionError, brief
from unetc.precision import LARGEST, Precision, rounded_from
from unetc.tensors import load_tensors

from .registry import InPrecision, Memory

try:
    import torch
    from torch import Tensor, fx
    from torch._inductor.exc import InductorError

    from .cuda_graph import CapturedModule, Pool
    from .torch_device import Module, TorchDevice, TorchProgram, gpu_of
    from .torch_graph import translate
except Exception as error:  # a library that is broken raises anything
    raise MissingDependency(
        f"targets torch:* need torch and onnx ({brief(error)}): pip install 'unetc[torch]'"
    ) from error

logger = logging.getLogger(__name__)

COMPILED = "compiled"
"""Part of a target's name, after the place, where torch compiles the engines."""

_COMPILERS = ("g++", "c++", "clang++")

_TYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


class _Threads:
    """torch's number of threads, and the one that it had before a backend chose another."""

    def __init__(self) -> None:
        self._before = self._chosen = 0

    def take(self, threads: int) -> None:
        """Set the number; 0 takes back the choice of a backend, unless someone else has changed it since."""
        now = torch.get_num_threads()
        if now != self._chosen:
            self._before = now
        self._chosen = threads
        if now != (wanted := threads or self._before):
            torch.set_num_threads(wanted)


_THREADS = _Threads()


def on_host(weights: bytes) -> Mapping[str, Tensor]:
    """View the tensors of a weights file, which nothing may write to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: torch.from_numpy(array) for name, array in load_tensors(weights).items()}


class WeightsOnDevice(Mapping[str, Tensor]):
    """The weights of a file, rounded where their name asks for it; each is copied to a device when it is first read.

    Most of them are read in half precision alone; copying the whole file would take three times the memory.
    """

    def __init__(self, weights: bytes, device: torch.device) -> None:
        self._host = on_host(weights)
        self._device = device
        self._there: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight."""
        if name not in self._there:
            self._there[name] = self._rounded(name).to(self._device)
        return self._there[name]

    def _rounded(self, name: str) -> Tensor:
        source = rounded_from(name, self._host)
        if source is None:
            return self._host[name]
        weight, precision = source
        largest = LARGEST[precision]
        return self._host[weight].clamp(-largest, largest).to(_TYPES[precision])

    def __iter__(self) -> Iterator[str]:
        """List the weights of the file."""
        return iter(self._host)

    def __len__(self) -> int:
        """Count the weights of the file."""
        return len(self._host)


class Compiled:
    """A module that torch compiles when it is called.

    It is compiled once for the sizes of the first call, then once for all sizes. Where the compiler fails at that, it
    is compiled for each size, however many there are.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._original = module
        self._module: Module = torch.compile(module, fullgraph=True)
        self._any_size = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute.

        Raises:
            RuntimeError: If it cannot be compiled or computed.
        """
        try:
            with torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
                return self._computed(inputs)
        except (MemoryError, RuntimeError):
            raise
        except Exception as error:  # a compiler may raise anything
            raise RuntimeError(f"the compiler fails with {type(error).__name__}: {brief(error)}") from error

    def _computed(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        try:
            return self._module(*inputs)
        except InductorError as error:
            if not self._any_size:
                raise
            said = str(error).splitlines()[0]
            logger.warning(
                "torch cannot compile an engine for all sizes (%s); it is compiled for each size separately", said
            )
            self._any_size = False
            self._module = torch.compile(self._original, fullgraph=True, dynamic=False)
            return self._module(*inputs)


class TorchLoader:
    """Translates graphs over one copy of the weights on the device."""

    def __init__(self, weights: bytes, device: torch.device, *, compiled: bool, reads: Precision) -> None:
        self._device = device
        self._compiled = compiled
        self._weights: Mapping[str, Tensor]
        if reads is Precision.FP32:
            self._weights = {name: tensor.to(device) for name, tensor in on_host(weights).items()}
        else:
            self._weights = WeightsOnDevice(weights, device)
        self._pool = Pool(device) if device.type == "cuda" else None

    def load(self, graph: SerialisedGraph) -> TorchProgram:
        """Translate a graph."""
        translation = translate(graph.graph, self._weights, self._device)
        module: Module = translation.module.forward  # unlike the module, it prints no traceback of a call that fails
        if self._compiled:
            module = Compiled(translation.module)
        if self._pool is not None:
            module = CapturedModule(lambda own=module: own, self._pool)  # type: ignore[misc]
        return TorchProgram(module, translation.inputs, translation.outputs)


class TorchBackend(InPrecision):
    """Runs graphs in torch."""

    def __init__(self, device: torch.device, *, compiled: bool, precision: Precision = Precision.FP32) -> None:
        self.device: Device = TorchDevice(device)
        self.precision = precision
        self._device = device
        self._compiled = compiled

    def open_weights(self, weights: bytes) -> Loader:
        """Take the weights; they are copied to the device once for all engines."""
        return TorchLoader(weights, self._device, compiled=self._compiled, reads=self.reads)


def open_backend(target: str, *, threads: int, memory: Memory) -> TorchBackend:
    """Open the backend.

    Raises:
        SessionError: If there is no GPU, or no compiler.
    """
    _, place, *mode = target.split(":")
    device = gpu_of(target) if place == "cuda" else torch.device(place)
    compiled = COMPILED in mode
    if compiled and not any(map(shutil.which, _COMPILERS)):
        raise SessionError(
            f"target {target} needs a C++ compiler, and none of {', '.join(_COMPILERS)} is on the path. "
            f"Install one, or use torch:{place}."
        )
    _THREADS.take(threads)
    return TorchBackend(device, compiled=compiled, precision=Precision.of_target(target))
