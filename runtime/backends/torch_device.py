"""A device of torch, and programs that are called with its tensors; what runs engines on a GPU shares them."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unetc.device import Array
from unetc.errors import SessionError, ShapeMismatch
from unetc.runtime.loop import Loop, PlainLoop, Start

from .registry import take_inputs

logger = logging.getLogger(__name__)

Module = Callable[..., tuple[Tensor, ...]]
"""Computes tensors from tensors, in order."""
CAPTURING = threading.Lock()
"""Held while a CUDA graph is captured: a process captures one at a time, and does not wait for the GPU meanwhile."""


def gpu_of(target: str) -> torch.device:
    """Find the GPU that a target runs on: that which is current where it is opened.

    Raises:
        SessionError: If there is none.
    """
    if not torch.cuda.is_available():
        raise SessionError(
            f"target {target} needs an NVIDIA GPU, and torch {torch.__version__} finds none. Install its driver and a "
            "build of torch for CUDA, or use onnxruntime:cpu: a bundle that was built there runs on any target."
        )
    return torch.device("cuda", torch.cuda.current_device())


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU that of this thread, which libraries take; every thread starts with the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TorchDevice:
    """A device of torch; calls on a GPU return before their work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._fuses = device.type == "cuda"
        self._forms: set[tuple[object, ...]] = set()
        """Of the kernel: those that were found to make the step that they should."""

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
        """Tell whether no element is NaN or infinite; this one number is copied from the device."""
        farthest = tensor if tensor.numel() == 1 else torch.linalg.vector_norm(tensor, math.inf)
        return math.isfinite(farthest.item())

    def fused_loop(self, start: Start) -> Loop | None:
        """Begin a trajectory of one kernel a step; None where that cannot be had, which is said once."""
        if not self._fuses:
            return None
        try:
            from .fused_loop import FusedLoop, agrees, can_fuse  # needs Triton
        except ImportError as error:
            return self._give_up_fusing(str(error))
        if not can_fuse(start):
            return None
        loop = FusedLoop(start, self, self._device)
        if loop.form not in self._forms:
            tried = FusedLoop(start, self, self._device), PlainLoop(start, self)
            try:
                with CAPTURING:  # as loading a kernel is no work for two threads, nor beside a capture
                    agreed = agrees(*tried)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:  # whatever a compiler may raise
                return self._give_up_fusing((str(error).splitlines() or [type(error).__name__])[0])
            if not agreed:
                return self._give_up_fusing("the step that it makes is another")
            self._forms.add(loop.form)
        return loop

    def _give_up_fusing(self, why: str) -> Loop | None:
        """Do without a kernel from now on."""
        logger.warning("a step takes many kernels in place of one, as Triton gives none: %s", why)
        self._fuses = False
        return None

    def synchronize(self) -> None:
        """Wait until everything that was asked of the device is done."""
        if self._device.type == "cuda":
            with CAPTURING:
                torch.cuda.synchronize(self._device)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Use a stream beside the default one, which every copy of other libraries would wait for and hold up."""
        if self._device.type != "cuda":
            yield
            return
        with current(self._device):
            around, own = torch.cuda.current_stream(), self._own_stream()
            own.wait_stream(around)
            try:
                with torch.cuda.stream(own):
                    yield
            finally:
                around.wait_stream(own)

    def _own_stream(self) -> torch.cuda.Stream:
        """Give the one stream of all threads, made when the first needs it."""
        with self._lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            return self._stream


class TorchProgram:
    """A module that is called with tensors by name."""

    def __init__(self, module: Module, inputs: Sequence[str], outputs: Sequence[str], library: str = "torch") -> None:
        self._module = module
        self._library = library
        self._inputs = tuple(inputs)
        self._emitted = tuple(outputs[1:])

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run; what comes first is copied into the output."""
        read = take_inputs(inputs, self._inputs)
        try:
            with torch.no_grad():
                prediction, *emitted = self._module(*read.values())
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise SessionError(f"{self._library} failed: {said}") from error
        if prediction.shape != output.shape:
            raise ShapeMismatch(f"an engine gives {tuple(prediction.shape)}; expected {tuple(output.shape)}.")
        output.copy_(prediction)
        return dict(zip(self._emitted, emitted, strict=True))
