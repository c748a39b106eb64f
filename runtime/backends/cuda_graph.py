"""CUDA graphs of modules: captured once for every shape of the inputs, and replayed after that.

A graph computes in private memory, which its next replay overwrites, so its outputs are copied. Nothing else leaves
that memory, so graphs that run in turns share it. A turn ends when the GPU has finished it, in any stream.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Protocol, runtime_checkable
from weakref import ref

import torch
from torch import Tensor

from .torch_device import CAPTURING, Module, current

logger = logging.getLogger(__name__)

_WARMUP_CALLS = 3
"""Calls before a capture: libraries choose their kernels and allocate their workspaces in the first calls."""
KEPT_GRAPHS = 6
"""CUDA graphs kept per engine, as many as a server prepares; the least recently used ones are deleted."""


@runtime_checkable
class CaptureCheck(Protocol):
    """A module that may refuse to be captured."""

    def is_capturable(self) -> bool:
        """Check, after a call, whether further calls can be captured in the current stream."""
        ...


class Pool:
    """Shared state of modules that never run at the same time; only `turn` may be used outside a turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Run the body after all earlier turns, on the GPU too."""
        with self._lock, current(self._device):
            if self._device.type != "cuda":
                yield
                return
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def wait(self) -> None:
        """Wait until the GPU has finished all earlier turns."""
        if self._device.type == "cuda":
            self._done.synchronize()

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """Stream in which modules are tried and captured."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @cached_property
    def memory(self) -> Any:
        """Memory in which graphs compute."""
        return torch.cuda.graph_pool_handle()

    def abandon_memory(self) -> None:
        """Give later graphs new memory: torch does not end a failed capture, and cannot begin another in its memory."""
        device = torch.cuda.current_device()
        with suppress(AttributeError, RuntimeError):  # private to torch; RuntimeError: the capture was ended
            torch._C._cuda_endAllocateToPool(device, self.memory)
            torch._C._cuda_releasePool(device, self.memory)
        del self.memory

    @cached_property
    def _done(self) -> torch.cuda.Event:
        """The end of the last turn."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]


class Replay:
    """A module captured as a CUDA graph; an input that is the same tensor as in the previous call is not copied again.

    Conditions are therefore copied once per trajectory, and held branches once per computation.
    """

    def __init__(self, module: Module, inputs: Sequence[Tensor], pool: Pool) -> None:
        """Capture over copies of the inputs.

        Raises:
            RuntimeError: If the module cannot be captured.
        """
        self._module = module  # the replay may use memory that the module owns
        with torch.inference_mode(False):  # a tensor made in inference mode can only be written to in that mode
            self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._copied: list[_Version | None] = [None for _ in inputs]
        aside, around = pool.stream, torch.cuda.current_stream()
        aside.wait_stream(around)
        try:
            with torch.cuda.stream(aside):
                for _ in range(_WARMUP_CALLS):
                    module(*self._inputs)
                if isinstance(module, CaptureCheck) and not module.is_capturable():
                    raise RuntimeError("its library says that it cannot be captured")
                self._graph = torch.cuda.CUDAGraph()
                with _capturing(self._graph, pool):
                    self._outputs = module(*self._inputs)
        finally:
            around.wait_stream(aside)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Replay; the results are copies."""
        new = [i for i, tensor in enumerate(inputs) if not _is(tensor, self._copied[i])]
        for i in new:
            self._copied[i] = None
        if new:
            torch._foreach_copy_([self._inputs[i] for i in new], [inputs[i] for i in new])
        for i in new:
            if not inputs[i].is_inference():
                self._copied[i] = ref(inputs[i]), inputs[i]._version
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


_Version = tuple[ref[Tensor], int]
"""A weak reference to a tensor, and the number of times that it had been written to."""


def _is(tensor: Tensor, version: _Version | None) -> bool:
    """Check whether a tensor is the one that was seen, and has not been written to since."""
    return version is not None and version[0]() is tensor and version[1] == tensor._version


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Pool) -> Iterator[None]:
    """Capture the body.

    cuBLAS keeps a workspace for each stream. All graphs captured in the stream would share it, whatever their pools,
    and it is freed with the first of them (pytorch#193402). It is cleared before and after, so that each graph has a
    workspace in its pool.
    """
    with CAPTURING:
        _clear_workspaces()
        try:
            # The work of other threads on the GPU does not break the capture.
            with torch.cuda.graph(graph, pool=pool.memory, stream=pool.stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            pool.abandon_memory()
            raise
        finally:
            _clear_workspaces()


def _clear_workspaces() -> None:
    with suppress(AttributeError):  # private to torch
        torch._C._cuda_clearCublasWorkspaces()


class CapturedModule:
    """A module that is replayed as a CUDA graph, or called directly where it cannot be captured."""

    def __init__(self, make: Callable[[], Module], pool: Pool) -> None:
        """Capture nothing yet.

        Args:
            make: Returns the module for inputs of one shape; it may return the same one for all shapes.
            pool: State shared with other modules.
        """
        self._make = make
        self._pool = pool
        self._modules: dict[object, Module] = {}
        """Modules by shapes and types of the inputs, the most recently used one last."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute; no later call overwrites the results."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        with self._pool.turn():
            module = self._modules.pop(key, None)
            if module is None:
                module = self._capture(inputs)
            self._modules[key] = module
            return module(*inputs)

    def _capture(self, inputs: Sequence[Tensor]) -> Module:
        """Capture the module for inputs of another shape; if there are too many graphs, delete the oldest in use."""
        while len(self._modules) >= KEPT_GRAPHS:
            self._pool.wait()  # it may still be running
            del self._modules[next(iter(self._modules))]
        module = self._make()
        try:
            return Replay(module, inputs, self._pool)
        except RuntimeError as error:
            said = str(error.__context__ or error)  # ending a failed capture fails too
            logger.warning("no CUDA graph could be captured, so kernels are launched one by one: %s", said)
            return module
