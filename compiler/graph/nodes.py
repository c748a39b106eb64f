"""Add nodes and small constants to a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Attributes = Mapping[str, int | float | Sequence[int]]


def add_node(
    graph: ir.Graph,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Attributes | None = None,
    *,
    name: str | None = None,
) -> ir.Value:
    """Add a node, which a later sort moves to its place, and return its output."""
    node = ir.node(operator, inputs, attributes or {}, name=name)
    graph.append(node)
    return node.outputs[0]


def add_name(graph: ir.Graph, value: ir.Value, name: str, like: ir.Value) -> ir.Value:
    """Add a named copy of a value with the type and shape of another, as outputs of a graph need."""
    named = add_node(graph, "Identity", [value])
    named.name, named.type, named.shape = name, like.type, like.shape
    return named


def add_initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Return the constant with a name, and add it if the graph has none."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def add_integers(graph: ir.Graph, *numbers: int) -> ir.Value:
    """Add a constant list of integers, such as a shape, axes or a bound."""
    name = "integers." + "_".join(map(str, numbers))
    return add_initializer(graph, name, np.array(numbers, dtype=np.int64))


def copy_node(graph: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], **changed: int) -> ir.Value:
    """Add a copy of a node with other inputs and, where given, other integer attributes."""
    attributes = {name: attribute for name, attribute in node.attributes.items() if name not in changed}
    given = map(ir.AttrInt64, changed, changed.values())
    copy = ir.Node(node.domain, node.op_type, inputs, [*attributes.values(), *given])
    graph.append(copy)
    return copy.outputs[0]


def add_slice(graph: ir.Graph, value: ir.Value, begin: int, end: int, axis: int) -> ir.Value:
    """Slice a range of one axis."""
    return add_node(graph, "Slice", [value, *(add_integers(graph, number) for number in (begin, end, axis))])


def add_reshape(graph: ir.Graph, value: ir.Value, *sizes: int) -> ir.Value:
    """Reshape a value; 0 keeps a size, and -1 is inferred from the other sizes."""
    return add_node(graph, "Reshape", [value, add_integers(graph, *sizes)])


def add_repeated(
    graph: ir.Graph, constant: ir.Value, like: ir.Value, axis: int, *, name: str | None = None
) -> ir.Value:
    """Repeat a constant over the sizes of another value.

    Args:
        graph: The graph.
        constant: A constant of as many axes as the result, each of size 1 but one.
        like: The value whose sizes the result has along all axes but one.
        axis: The axis along which the result has the size of the constant.
        name: Name of the added nodes.
    """
    assert constant.const_value is not None
    sizes = constant.const_value.shape.numpy()
    parts = [add_node(graph, "Shape", [like], {"start": 0, "end": axis}, name=name)]
    parts.append(add_integers(graph, sizes[axis]))
    if axis + 1 < len(sizes):
        parts.append(add_node(graph, "Shape", [like], {"start": axis + 1, "end": len(sizes)}, name=name))
    shape = add_node(graph, "Concat", parts, {"axis": 0}, name=name)
    return add_node(graph, "Expand", [constant, shape], name=name)


@dataclass(frozen=True, slots=True)
class Expression:
    """A value of a graph in a formula; each operation adds a node and returns its output."""

    graph: ir.Graph
    value: ir.Value

    def __add__(self, other: Expression) -> Expression:
        return self._with("Add", other)

    def __sub__(self, other: Expression) -> Expression:
        return self._with("Sub", other)

    def __mul__(self, other: Expression) -> Expression:
        return self._with("Mul", other)

    def _with(self, operator: str, other: Expression) -> Expression:
        return Expression(self.graph, add_node(self.graph, operator, [self.value, other.value]))


def input_of(graph: ir.Graph, name: str) -> ir.Value:
    """Return the input of a graph with a name."""
    return next(value for value in graph.inputs if value.name == name)


def shape_of(value: ir.Value) -> ir.Shape:
    """Return the shape of a value, which must have one."""
    assert value.shape is not None
    return value.shape
