"""Find a backend by the name of a target."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from difflib import get_close_matches
from enum import StrEnum
from typing import Self

from unetc.arguments import whole_number
from unetc.backend import Backend, EngineBackend, Loader, Preparation, TargetBackend
from unetc.device import Device, Tensor
from unetc.errors import MissingDependency, SessionError
from unetc.precision import Precision


class Memory(StrEnum):
    """How much memory a backend spends on weights."""

    FAST = "fast"
    """Every engine packs its own copy of the weights for speed."""
    LOW = "low"
    """All engines read one copy of the weights, mapped from a private temporary file. On a GPU, TensorRT and
    onnxruntime give every engine its own copy; there, only the engines of this phase and the next are loaded."""


DEFAULT_TARGET = "onnxruntime:cpu"
MOST_THREADS = 1024
"""Most CPU threads of a backend; libraries start as many as they are asked for, each with memory."""


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
"""Module of each target's backend, imported on first use. A target names a library, a place, the way in which it runs
there, and the precision unless that is float32."""
OFFERED = tuple(target for target in BACKENDS if target != "null")
"""Targets that compute something."""


class InPrecision(ABC):
    """A backend that computes in one precision, and loads graphs of this precision."""

    device: Device
    precision: Precision = Precision.FP32

    @abstractmethod
    def open_weights(self, weights: bytes) -> Loader:
        """Take the content of a weights file, in the form that loading graphs needs."""

    @property
    def reads(self) -> Precision:
        """Precision of the graphs that it loads."""
        return self.precision

    def exact(self) -> Self | None:
        """Return the same backend in float32; None if this one is."""
        if self.precision is Precision.FP32:
            return None
        other = copy(self)
        other.precision = Precision.FP32
        return other

    def prepared_by(self, preparation: Preparation) -> Backend:
        """Return a backend that takes every graph in float32, and lowers it to the precision that this one reads."""
        return preparation.lower(self, self.reads)


def open_backend(target: str, *, threads: int, memory: Memory = Memory.FAST) -> TargetBackend:
    """Open the backend of a target.

    Args:
        target: A key of `BACKENDS`.
        threads: Number of CPU threads; 0 lets the backend choose.
        memory: How much memory to spend on weights.

    Raises:
        SessionError: If no backend has this name, its device is missing, or the number of threads is not whole or
            out of range.
        MissingDependency: If its library is not installed.
    """
    threads = whole_number("threads", threads)
    if not 0 <= threads <= MOST_THREADS:
        raise SessionError(
            f"cannot run with {threads} CPU threads. Expected 1 to {MOST_THREADS}, or 0 for the default."
        )
    check_target(target)
    module = importlib.import_module(BACKENDS[target])
    backend: TargetBackend = module.open_backend(target, threads=threads, memory=memory)
    return backend


def check_target(target: str) -> None:
    """Refuse a target that no machine has.

    Raises:
        SessionError: If no backend has this name.
    """
    if target not in BACKENDS:
        raise SessionError(f"no backend for target {target!r}. {_advice(target)} `unetc doctor` lists all.")


def takes_graphs(backend: Backend, *, threads: int) -> Backend:
    """Return a backend that loads any graph: the given one, unless it runs engines that must be built first.

    In its place, torch runs graphs on the GPU, or else onnxruntime or torch on the CPU.

    Args:
        backend: The backend of the engines.
        threads: Number of CPU threads of another backend; 0 lets it choose.

    Raises:
        MissingDependency: If none is installed.
    """
    if not isinstance(backend, EngineBackend):
        return backend
    for target in ("torch:cuda", DEFAULT_TARGET):
        try:
            return open_backend(target, threads=threads)
        except (SessionError, MissingDependency):
            continue
    return open_backend("torch:cpu", threads=threads)


def _advice(target: str) -> str:
    """List the targets that the user may have meant."""
    if target.endswith(f":{Precision.FP32}"):
        return f"A target without a suffix is one of {Precision.FP32}: {target.rpartition(':')[0]}."
    plain = [known for known in OFFERED if Precision.of_target(known) is Precision.FP32]
    wanted = target.lower().replace("_", "-")
    close = [known for known in plain if wanted in known] or get_close_matches(wanted, OFFERED)
    return f"Close ones: {', '.join(close)}." if close else f"Available: {', '.join(plain)}."


def take_inputs(inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Select the inputs that a program reads.

    Raises:
        SessionError: If an input is missing.
    """
    if missing := [name for name in names if name not in inputs]:
        raise SessionError(f"the engine needs {missing[0]}, which was not given. Pass it with the conditions.")
    return {name: inputs[name] for name in names}
