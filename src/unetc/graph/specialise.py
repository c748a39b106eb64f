"""Partial evaluation: set the gates of a gated graph to constants and remove what no longer matters.

For every assignment, the specialised graph computes what the gated graph computes at those gates, to rounding. A kept
gate becomes a wire. A dropped one becomes zero: `add(trunk, 0)` is the trunk, and whatever only fed the branch is dead
code. A mean becomes a bias. A `cat` keeps its width: its missing part is a constant of the trunk's height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from unetc.artifacts.profile import Component, Treatment
from unetc.errors import CompileError
from unetc.graph.capture import GATES, MEANS
from unetc.graph.gate import DOMAIN
from unetc.graph.gated import GatedGraph, SerialisedGraph, gate_index, is_gate, serialise

SUPPORTED = frozenset({Treatment.KEEP, Treatment.DROP, Treatment.MEAN})
"""Treatments this version can specialise."""


def specialise(gated: GatedGraph, treatments: Mapping[str, Treatment], means: NDArray[np.float32]) -> SerialisedGraph:
    """Specialise a gated graph for one assignment.

    Args:
        gated: The graph; not changed.
        treatments: Treatment of each component by name; those not named are kept.
        means: Concatenated branch means, [channel of all components], float32; read for components treated by mean.

    Returns:
        A graph without gates whose large initializers still point into the gated graph's weights file.

    Raises:
        CompileError: If a component is unknown or a treatment cannot be specialised.
    """
    known = {component.name for component in gated.components}
    if unknown := sorted(treatments.keys() - known):
        raise CompileError(f"the model has no component {unknown[0]!r}. `unetc inspect` lists those it has.")
    if unsupported := sorted(set(treatments.values()) - SUPPORTED):
        raise CompileError(f"treatment {str(unsupported[0])!r} cannot be specialised; expected keep, drop or mean.")
    model = gated.model.clone()
    gates = {gate_index(node): node for node in model.graph if is_gate(node)}
    removed = [c for c in gated.components if treatments.get(c.name, Treatment.KEEP) is not Treatment.KEEP]
    for component in gated.components:
        if component not in removed:
            _replace(gates[component.index].outputs[0], _branch(gates[component.index]))
    for component in removed:
        own = means[component.offset : component.offset + component.channels]
        constant = own if treatments[component.name] is Treatment.MEAN else np.zeros_like(own)
        _make_constant(model.graph, gates[component.index], component, constant)
    _clean(model)
    return serialise(model)


def _branch(gate: ir.Node) -> ir.Value:
    branch = gate.inputs[0]
    assert branch is not None
    return branch


def _replace(old: ir.Value, new: ir.Value) -> None:
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _make_constant(graph: ir.Graph, gate: ir.Node, component: Component, constant: NDArray[np.float32]) -> None:
    """Replace a gate by a constant per channel, in the form its join can take."""
    (join,) = {use.node for use in gate.outputs[0].uses()}
    zero = not constant.any()
    shape = [1 if i != component.axis else component.channels for i in range(component.rank)]
    if join.op_type == "Add":
        (trunk,) = (value for value in join.inputs if value is not gate.outputs[0])
        assert trunk is not None
        if zero:
            _replace(join.outputs[0], trunk)
        else:
            _replace(gate.outputs[0], _initializer(graph, f"mean.{component.index}", constant.reshape(shape)))
    elif join.op_type == "Concat":
        value = _initializer(graph, f"mean.{component.index}", constant.reshape(shape))
        _replace(gate.outputs[0], _spread(graph, join, gate, value, component))
    else:
        raise CompileError(
            f"component {component.name!r} joins at a {join.op_type}, expected Add or Concat. Please report the model."
        )


_SPREAD = "spread"
"""Name of the nodes that repeat a constant."""


def _spread(graph: ir.Graph, join: ir.Node, gate: ir.Node, value: ir.Value, component: Component) -> ir.Value:
    """Repeat a constant per channel over the batch and positions of the other part of a concatenation."""
    axis = component.axis
    like = _shape_source(graph, join, gate, axis)
    before, after = (0, axis), (axis + 1, component.rank)
    parts = [_shape_part(join, like, *before)]
    parts.append(_initializer(graph, f"channels.{component.channels}", np.array([component.channels], dtype=np.int64)))
    if after[0] < after[1]:
        parts.append(_shape_part(join, like, *after))
    shape = _node(join, "Concat", parts, {"axis": 0})
    return _node(join, "Expand", [value, shape])


def _shape_source(graph: ir.Graph, join: ir.Node, gate: ir.Node, axis: int) -> ir.Value:
    """Find a value with the batch and positions of a concatenation: a part that stays, or the first one of the graph.

    Reading the shape of a removed part would compute everything below it.
    """
    parts = [value for value in join.inputs if value is not None]
    if computed := [part for part in parts if _is_computed(part)]:
        return computed[0]
    extents = {_extent(part, axis) for part in parts} - {None}
    values = (*graph.inputs, *(value for node in graph for value in node.outputs))
    return next((value for value in values if _extent(value, axis) in extents), _branch(gate))


def _extent(value: ir.Value, axis: int) -> tuple[str, ...] | None:
    """Name the size of a value along all axes but one; equal names mean equal sizes."""
    if value.shape is None or value.shape.has_unknown_dim():
        return None
    return tuple("" if i == axis else str(size) for i, size in enumerate(value.shape))


def _is_computed(value: ir.Value) -> bool:
    """Tell whether a part of a concatenation is neither removed yet nor about to be."""
    producer = value.producer()
    return producer is None or not (is_gate(producer) or producer.name == _SPREAD)


def _shape_part(join: ir.Node, like: ir.Value, start: int, end: int) -> ir.Value:
    return _node(join, "Shape", [like], {"start": start, "end": end})


def _node(join: ir.Node, operator: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None) -> ir.Value:
    """Insert a node before a join and return its output."""
    node = ir.node(operator, inputs, attributes or {}, name=_SPREAD)
    graph = join.graph
    assert graph is not None
    graph.insert_before(join, node)
    return node.outputs[0]


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def _clean(model: ir.Model) -> None:
    """Remove dead nodes, unused weights and the gate inputs."""
    common.RemoveUnusedNodesPass()(model)
    if any(is_gate(node) for node in model.graph):
        raise CompileError("a gate is left in a specialised graph. Please report the model.")
    for value in [value for value in model.graph.inputs if value.name in (GATES, MEANS)]:
        model.graph.inputs.remove(value)
    model.functions.clear()
    model.opset_imports.pop(DOMAIN, None)
    common.TopologicalSortPass()(model)
    for node in model.graph:
        node.name = None
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None  # any runtime infers them again; they are a third of the file
    common.NameFixPass()(model)
