"""The inputs and outputs of a graph, read from the graph itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import onnx

from unetc.compiler.tensorrt.references import check_references
from unetc.compiler.tensorrt.shapes import Dimension
from unetc.errors import CompileError, CorruptArtifactError, brief


class DataType(StrEnum):
    """Element types of tensors, as Triton's configurations name them."""

    FP32 = "TYPE_FP32"
    INT32 = "TYPE_INT32"
    INT64 = "TYPE_INT64"
    STRING = "TYPE_STRING"
    UINT8 = "TYPE_UINT8"


_TYPES: Mapping[int, DataType] = {
    onnx.TensorProto.FLOAT: DataType.FP32,
    onnx.TensorProto.INT32: DataType.INT32,
    onnx.TensorProto.INT64: DataType.INT64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """One input or output."""

    name: str
    data_type: DataType
    axes: tuple[Dimension, ...]
    """Sizes; names and arithmetic over names are sizes that a call chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Inputs and outputs of a graph, in the graph's order."""

    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]

    @property
    def batched(self) -> bool:
        """Whether a call chooses the first size of every input and output."""
        return all(one.axes and isinstance(one.axes[0], str) for one in (*self.inputs, *self.outputs))


def read_signature(graph: bytes, name: str, weights_bytes: int) -> Signature:
    """Read a graph, whose bytes were verified.

    Args:
        graph: An ONNX graph.
        name: Its name in errors.
        weights_bytes: Length of the weights file next to it; 0 without one.

    Raises:
        CorruptArtifactError: If it is not a graph, or refers to anything but the weights file.
        CompileError: If a tensor has a type that Triton's configurations do not name.
    """
    check_references(graph, name, weights_bytes)
    try:
        model = onnx.load_model_from_string(graph)
    except Exception as error:  # protobuf raises its own class
        raise CorruptArtifactError(f"{name} is not an ONNX graph: {brief(error)}. Build the bundle again.") from error
    return Signature(inputs=_facts(model.graph.input, name), outputs=_facts(model.graph.output, name))


def _facts(values: Iterable[Any], graph: str) -> tuple[TensorFacts, ...]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        if tensor.elem_type not in _TYPES:
            raise CompileError(
                f"{value.name} of {graph} has the ONNX type {tensor.elem_type}. Expected float32 or whole numbers: "
                "export a bundle with graphs in float32."
            )
        axes = tuple(axis.dim_param or int(axis.dim_value) for axis in tensor.shape.dim)
        found.append(TensorFacts(name=value.name, data_type=_TYPES[tensor.elem_type], axes=axes))
    return tuple(found)
