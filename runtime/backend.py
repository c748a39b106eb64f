"""Find a backend by the name of a target."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum

from unetc.backend import Backend
from unetc.device import Tensor
from unetc.errors import SessionError
from unetc.precision import Precision


class Memory(StrEnum):
    """What a backend spends on weights."""

    FAST = "fast"
    """Every engine packs its own copy of the weights for speed."""
    LOW = "low"
    """All engines read one copy of the weights, mapped from a private temporary file. On a GPU, where TensorRT and
    onnxruntime give every engine its own: only the engines of this phase and the next are there."""


DEFAULT_TARGET = "onnxruntime:cpu"
_FOR_TESTS = "null"
"""A target that nobody is offered."""


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
    _FOR_TESTS: "unetc.runtime.backends.null",
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
        raise SessionError(f"no backend for target {target!r}. {_advice(target)} `unetc doctor` lists all.")
    module = importlib.import_module(BACKENDS[target])
    backend: Backend = module.open_backend(target, threads=threads, memory=memory)
    return backend


def _advice(target: str) -> str:
    """Name the targets that may be meant."""
    if target.endswith(f":{Precision.FP32}"):
        return f"A target without a suffix is one of {Precision.FP32}: {target.rpartition(':')[0]}."
    named = [known for known in BACKENDS if known != _FOR_TESTS]
    plain = [known for known in named if Precision.of_target(known) is Precision.FP32]
    wanted = target.lower().replace("_", "-")
    close = [known for known in plain if wanted in known] or get_close_matches(wanted, named)
    return f"Close ones: {', '.join(close)}." if close else f"Available: {', '.join(plain)}."


def take_inputs(inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Take what a program reads from what it is called with.

    Raises:
        SessionError: If something is missing.
    """
    if missing := [name for name in names if name not in inputs]:
        raise SessionError(f"the engine needs {missing[0]}, which was not given. Pass it with the conditions.")
    return {name: inputs[name] for name in names}
