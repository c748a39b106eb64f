"""Infer the element type of every value of a graph.

The inference of onnx 1.23 does not cover GroupNormalization or any value computed from its result.
"""

from __future__ import annotations

import onnx_ir as ir

_OF_RESULT = {
    **dict.fromkeys(("Shape", "Size", "ArgMax", "ArgMin", "NonZero"), ir.DataType.INT64),
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"), ir.DataType.BOOL),
    **dict.fromkeys(("Not", "And", "Or", "Xor", "IsNaN", "IsInf"), ir.DataType.BOOL),
}
"""Operators with a fixed result type; the result of most others has the type of their first input."""
_SECOND = ("Where",)
"""Operators whose result has the type of their second input."""


def infer_types(graph: ir.Graph) -> None:
    """Set the type of every value that a graph computes; nodes must be in topological order."""
    for node in graph:
        made = _type_of(node)
        for value in node.outputs:
            if value.dtype is None and made is not None:
                value.dtype = made


def _type_of(node: ir.Node) -> ir.DataType | None:
    if node.op_type in _OF_RESULT:
        return _OF_RESULT[node.op_type]
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Constant", "ConstantOfShape"):
        tensor = node.attributes.get("value")
        return ir.DataType.FLOAT if tensor is None else tensor.as_tensor().dtype
    source = node.inputs[1 if node.op_type in _SECOND else 0] if node.inputs else None
    return None if source is None else source.dtype
