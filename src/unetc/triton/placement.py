"""Where Triton's onnxruntime backend runs the engines, by the target of unetc."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from unetc.errors import CompileError


class Kind(StrEnum):
    """Kinds of instances, as Triton's configurations name them."""

    CPU = "KIND_CPU"
    GPU = "KIND_GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Instances of an engine."""

    kind: Kind
    accelerators: tuple[Mapping[str, Any], ...] = ()
    """Execution providers of onnxruntime on the GPU, with their options."""
    threads: bool = False
    """Whether the number of threads matters."""

    @property
    def optimization(self) -> Mapping[str, Any]:
        """The part of a configuration about the execution providers."""
        if not self.accelerators:
            return {}
        return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": self.accelerators}}}


_FLOAT32 = {"name": "cuda", "parameters": ({"key": "use_tf32", "value": "0"},)}
"""Without TF32, as in unetc's own backend."""

PLACEMENTS: Mapping[str, Placement] = {
    "onnxruntime:cpu": Placement(kind=Kind.CPU, threads=True),
    "onnxruntime:cuda": Placement(kind=Kind.GPU, accelerators=(_FLOAT32,)),
    "onnxruntime:tensorrt": Placement(kind=Kind.GPU, accelerators=({"name": "tensorrt"}, _FLOAT32)),
}


def placement_of(target: str) -> Placement:
    """Find the placement of a target.

    Raises:
        CompileError: If Triton has no backend for it; the message says why, and which targets there are.
    """
    if target in PLACEMENTS:
        return PLACEMENTS[target]
    known = ", ".join(PLACEMENTS)
    raise CompileError(f"cannot export for target {target!r}: {_reason(target)}. Pass --target with one of: {known}.")


def _reason(target: str) -> str:
    library = target.split(":")[0]
    if library == "torch":
        return "Triton has no backend that runs ONNX graphs in torch"
    if library == "tensorrt-rtx":
        return "Triton has no backend for TensorRT for RTX"
    if library == "tensorrt":
        return "its engines fit one GPU and one version of TensorRT, and a bundle never holds them"
    if library == "onnxruntime":
        return "its graphs read weights that are rounded when they are loaded, which Triton cannot do"
    return "Triton has no backend for it"
