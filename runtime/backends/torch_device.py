"""A device of torch, and programs that take its tensors; shared by all backends on a GPU."""

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
"""Computes tensors from tensors, all in a fixed order."""
CAPTURING = threading.Lock()
"""Held during the capture of a CUDA graph: a process captures one at a time, and must not wait for the GPU then."""


def gpu_of(target: str) -> torch.device:
    """Find the GPU that a target runs on: the current one of the thread that opens it.

    Raises:
        SessionError: If there is no GPU.
    """
    if not torch.cuda.is_available():
        raise SessionError(
            f"target {target} needs an NVIDIA GPU, and torch {torch.__version__} finds none. Install its driver and a "
            "build of torch for CUDA, or use onnxruntime:cpu: a bundle that was built there runs on any target."
        )
    return torch.device("cuda", torch.cuda.current_device())


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one of this thread, which libraries use; every thread starts with the first GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class TorchDevice:
    """A device of torch; calls on a GPU return before their work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._fuses = device.type == "cuda"
        self._forms: set[tuple[object, ...]] = set()
        """Forms of the kernel that were found to compute the right step."""

    def put(self, array: NDArray[Any]) -> Tensor:
        """Copy an array to the device; on the CPU the tensor shares its memory."""
        array = np.ascontiguousarray(array)
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self._device)

    def to_array(self, tensor: Tensor) -> Array:
        """Copy a tensor."""
        array: Array = tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
        return array

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Allocate a tensor to be written."""
        return torch.empty(tuple(shape), dtype=torch.float32, device=self._device)

    def full(self, shape: Sequence[int], value: float) -> Tensor:
        """Fill a new tensor with one value."""
        return torch.full(tuple(shape), value, dtype=torch.float32, device=self._device)

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join tensors along the batch."""
        return torch.cat(list(tensors))

    def rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Take rows of a tensor, as a view."""
        return tensor[start:stop]

    @property
    def captures_shapes(self) -> bool:
        """Whether programs prepare for every shape that they meet, as CUDA graphs do."""
        return self._device.type == "cuda"

    def exp(self, tensor: Tensor) -> Tensor:
        """Compute the exponential of every element."""
        return torch.exp(tensor)

    def is_finite(self, tensor: Tensor) -> bool:
        """Check whether no element is NaN or infinite; only this one number is copied from the device."""
        farthest = tensor if tensor.numel() == 1 else torch.linalg.vector_norm(tensor, math.inf)
        return math.isfinite(farthest.item())

    def fused_loop(self, start: Start) -> Loop | None:
        """Begin a trajectory of one kernel a step; None, logged once, where there is no such kernel."""
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
                with CAPTURING:  # two threads must not load a kernel at once, nor one thread during a capture
                    agreed = agrees(*tried)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:  # a compiler may raise anything
                return self._give_up_fusing((str(error).splitlines() or [type(error).__name__])[0])
            if not agreed:
                return self._give_up_fusing("its first step differs from the plain loop's")
            self._forms.add(loop.form)
        return loop

    def _give_up_fusing(self, why: str) -> Loop | None:
        """Log the reason, and use no fused kernel from now on."""
        logger.warning("each step takes many kernels in place of one, as the fused kernel cannot be used: %s", why)
        self._fuses = False
        return None

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""
        if self._device.type == "cuda":
            with CAPTURING:
                torch.cuda.synchronize(self._device)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Use a separate stream: copies by other libraries wait for the default stream and hold it up."""
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
        """Return the stream shared by all threads, made when it is first needed."""
        with self._lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            return self._stream


class TorchProgram:
    """A module that takes its tensors by name."""

    def __init__(self, module: Module, inputs: Sequence[str], outputs: Sequence[str], library: str = "torch") -> None:
        self._module = module
        self._library = library
        self._inputs = tuple(inputs)
        self._emitted = tuple(outputs[1:])

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run; the first result is copied into the output."""
        read = take_inputs(inputs, self._inputs)
        try:
            with torch.no_grad():
                prediction, *emitted = self._module(*read.values())
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise SessionError(f"{self._library} failed: {said}") from error
        if prediction.shape != output.shape:
            raise ShapeMismatch(
                f"an engine returns a prediction of {tuple(prediction.shape)}; expected {tuple(output.shape)}."
            )
        output.copy_(prediction)
        return dict(zip(self._emitted, emitted, strict=True))
