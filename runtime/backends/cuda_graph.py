"""CUDA graphs of modules: captured once for every shape of the inputs, and replayed after that.

A graph computes in memory of its own, which its next replay overwrites, so what leaves it is copied. Since nothing else
does, graphs that take turns share their memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .torch_device import Module

logger = logging.getLogger(__name__)

_WARMUP_CALLS = 3
"""Calls before a capture: libraries choose their kernels and allocate their workspaces in the first ones."""
_KEPT_GRAPHS = 4
"""CUDA graphs kept per engine, those captured last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What CUDA graphs that never run at the same time share."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    memory: Any = field(default_factory=lambda: torch.cuda.graph_pool_handle())
    """Where they compute."""


class Replay:
    """A module captured as a CUDA graph."""

    def __init__(self, module: Module, inputs: Sequence[Tensor], pool: Pool) -> None:
        """Capture over copies of the inputs.

        Raises:
            RuntimeError: If the module does what cannot be captured.
        """
        self._module = module  # a library's own may be part of what is replayed
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARMUP_CALLS):
                module(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # What other threads do on the GPU meanwhile spoils no capture.
        with torch.cuda.graph(self._graph, pool=pool.memory, capture_error_mode="thread_local"):
            self._outputs = module(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Replay; the results are copies."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


class CapturedModule:
    """A module that is replayed as a CUDA graph, or called as it is where it cannot be captured."""

    def __init__(self, make: Callable[[], Module], pool: Pool) -> None:
        """Capture nothing yet.

        Args:
            make: Gives the module for inputs of one shape; it may be the same for all.
            pool: What it shares with others.
        """
        self._make = make
        self._pool = pool
        self._modules: dict[object, Module] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute; what is given back is overwritten by no later call."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        with self._pool.lock:
            if key not in self._modules:
                while len(self._modules) >= _KEPT_GRAPHS:
                    del self._modules[next(iter(self._modules))]
                self._modules[key] = self._capture(inputs)
            return self._modules[key](*inputs)

    def _capture(self, inputs: Sequence[Tensor]) -> Module:
        module = self._make()
        try:
            return Replay(module, inputs, self._pool)
        except RuntimeError as error:
            logger.warning("no CUDA graph could be captured, so kernels are launched one by one: %s", error)
            return module
