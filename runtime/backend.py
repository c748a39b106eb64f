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


def _in_each(precisions: Sequence[str], target: str, module: str) -> dict[str, str]:
    return {target + precision: module for precision in precisions}


BACKENDS: Mapping[str, str] = {
    "onnxruntime:cpu": "unetc.runtime.backends.onnxruntime",
    **_in_each(("", ":fp16", ":bf16"), "torch:cpu", "unetc.runtime.backends.torch"),
    **_in_each(("", ":fp16", ":bf16"), "torch:cpu:compiled", "unetc.runtime.backends.torch"),
    **_in_each(("", ":fp16", ":bf16"), "torch:cuda", "unetc.runtime.backends.torch"),
    **_in_each(("", ":fp16", ":bf16"), "torch:cuda:compiled", "unetc.runtime.backends.torch"),
    **_in_each(("", ":fp16"), "onnxruntime:cuda", "unetc.runtime.backends.onnxruntime_gpu"),
    **_in_each(("", ":fp16"), "onnxruntime:tensorrt", "unetc.runtime.backends.onnxruntime_gpu"),
    **_in_each(("", ":fp16", ":bf16"), "tensorrt", "unetc.runtime.backends.tensorrt"),
    **_in_each(("", ":fp16", ":bf16"), "tensorrt-rtx", "unetc.runtime.backends.tensorrt"),
    "null": "unetc.runtime.backends.null",
}
"""Module of each target's backend, imported on first use; a target is a library, a place, how it runs there, and in
which precision if not in float32."""


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
