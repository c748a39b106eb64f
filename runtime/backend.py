"""Find a backend by the name of a target."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from enum import StrEnum

from unetc.backend import Backend
from unetc.device import Tensor
from unetc.errors import SessionError


class Memory(StrEnum):
    """What a backend spends on weights."""

    FAST = "fast"
    """Every engine packs its own copy of the weights for speed."""
    LOW = "low"
    """All engines read one copy of the weights, mapped from a private temporary file. On a GPU, where TensorRT and
    onnxruntime give every engine its own: only the engines of this phase and the next are there."""


DEFAULT_TARGET = "onnxruntime:cpu"

BACKENDS: Mapping[str, str] = {
    "onnxruntime:cpu": "unetc.runtime.backends.onnxruntime",
    "torch:cpu": "unetc.runtime.backends.torch",
    "torch:cpu:compiled": "unetc.runtime.backends.torch",
    "torch:cuda": "unetc.runtime.backends.torch",
    "torch:cuda:compiled": "unetc.runtime.backends.torch",
    "onnxruntime:cuda": "unetc.runtime.backends.onnxruntime_gpu",
    "onnxruntime:tensorrt": "unetc.runtime.backends.onnxruntime_gpu",
    "tensorrt": "unetc.runtime.backends.tensorrt",
    "tensorrt:fp16": "unetc.runtime.backends.tensorrt",
    "tensorrt:bf16": "unetc.runtime.backends.tensorrt",
    "tensorrt-rtx": "unetc.runtime.backends.tensorrt",
    "tensorrt-rtx:fp16": "unetc.runtime.backends.tensorrt",
    "tensorrt-rtx:bf16": "unetc.runtime.backends.tensorrt",
    "null": "unetc.runtime.backends.null",
}
"""Module of each target's backend, imported on first use; a target is a library, a place, and how it runs there."""


def open_backend(target: str, *, threads: int, memory: Memory = Memory.FAST) -> Backend:
    """Open the backend of a target.

    Args:
        target: A key of `BACKENDS`.
        threads: Number of CPU threads; 0 lets the backend choose.
        memory: What to spend on weights.

    Raises:
        SessionError: If no backend has this name, or its place is not there.
        MissingDependency: If its library is not installed.
    """
    if target not in BACKENDS:
        raise SessionError(f"no backend for target {target!r}. Available: {', '.join(BACKENDS)}.")
    module = importlib.import_module(BACKENDS[target])
    backend: Backend = module.open_backend(target, threads=threads, memory=memory)
    return backend


def take_inputs(inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Take what a program reads from what it is called with.

    Raises:
        SessionError: If something is missing.
    """
    if missing := [name for name in names if name not in inputs]:
        raise SessionError(f"the engine needs {missing[0]}, which was not given. Pass it with the conditions.")
    return {name: inputs[name] for name in names}
