"""Write weights files tensor by tensor, because all tensors together may not fit in memory.

Source:
    https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from unetc.backend import WEIGHTS, SerialisedGraph
from unetc.errors import CompileError
from unetc.tensors import tensor_ranges

_TYPES = {ir.DataType.BFLOAT16: "BF16", ir.DataType.FLOAT16: "F16", ir.DataType.FLOAT: "F32", ir.DataType.DOUBLE: "F64"}
_INLINE_BELOW_BYTES = 64
"""Smaller initializers, such as shapes and scalars, stay inside each graph."""
_ALIGNMENT = 8
"""Bytes. Tensors begin at multiples of their element size, because the longest elements come first."""


def serialise(model: ir.Model) -> SerialisedGraph:
    """Convert a graph to bytes; large initializers stay in the weights file."""
    external = {
        str(name)
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    return SerialisedGraph(graph=ir.to_proto(model).SerializeToString(), weights=frozenset(external))


def write_tensors(path: Path, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """Write a safetensors file, copying at most one tensor at a time.

    Raises:
        CompileError: If a tensor has a type that a weights file cannot hold.
        OSError: If the file cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise CompileError(
                f"cannot store {name!r} of type {tensor.dtype}; expected bfloat16, float16, float32 or float64."
            )
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape = tensors[name].shape.numpy()
        header[name] = {"dtype": _TYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(tensors[name].tobytes())  # little-endian in both formats


def externalise(model: ir.Model, path: Path) -> None:
    """Move the initializers into one safetensors file and make the model point into it."""
    tensors = {
        str(name): value.const_value
        for name, value in sorted(model.graph.initializers.items())
        if value.const_value is not None
        and value.const_value.nbytes >= _INLINE_BELOW_BYTES
        and value.const_value.dtype.is_floating_point()
    }
    write_tensors(path, tensors)
    for name, (begin, end) in tensor_ranges(path).items():
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            WEIGHTS,
            begin,
            end - begin,
            tensors[name].dtype,
            shape=ir.Shape(tensors[name].shape.numpy()),
            name=name,
            base_dir=path.parent,
        )
