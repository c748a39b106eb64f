"""Partial evaluation: set the gates of a gated graph to constants and remove everything that no longer matters.

For every assignment, the specialised graph equals the gated graph at those gates, up to rounding. A kept gate becomes a
wire. A dropped one becomes zero: `add(trunk, 0)` is the trunk, and nodes that only fed the branch are dead code. A
mean becomes a bias. The missing part of a `cat` is a constant of the trunk's height and width, and the readers of the
`cat` are narrowed where possible (`slicing.py`). A held branch becomes an input of the graph; an emitted branch becomes
an output.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.profile import Component
from unetc.backend import SerialisedGraph
from unetc.errors import CompileError
from unetc.treatments import EARLIER, EXTRAPOLATION, HELD, Recall, Treatment

from .gate import GATES, MEANS, OUTPUT, gates_of, is_gate
from .gated import GatedGraph, emit
from .nodes import Expression, add_initializer, add_name, add_repeated, add_reshape
from .slicing import slice_constants
from .weights import serialise


def specialise(
    gated: GatedGraph,
    treatments: Mapping[str, Treatment],
    means: NDArray[np.float32],
    emits: Collection[str] = (),
) -> SerialisedGraph:
    """Specialise a gated graph for one assignment.

    Args:
        gated: The graph; not changed.
        treatments: Treatment of each component by name; unnamed components are kept.
        means: Concatenated branch means, [channel of all components], float32; read only for components
            that are replaced by their mean.
        emits: Components whose branch becomes an output `computed.INDEX`, for engines that reuse it.

    Returns:
        A graph without gates whose large initializers still point into the gated graph's weights file. A held
        component adds an input `held.INDEX`; a forecast component also adds `earlier.INDEX` and `extrapolation.INDEX`.

    Raises:
        CompileError: If a component is unknown, is emitted without being computed, or gets a treatment that only the
            step can have.
    """
    known = {component.name for component in gated.components}
    if unknown := sorted({*treatments, *emits} - known):
        raise CompileError(f"the model has no component {unknown[0]!r}. `unetc inspect` lists its components.")
    given = {name: treatment for name, treatment in treatments.items() if treatment is not Treatment.KEEP}
    if absent := sorted(given.keys() & set(emits)):
        raise CompileError(
            f"an engine cannot emit {absent[0]!r}, because it does not compute it ({given[absent[0]]}). "
            "Emit it from an engine that keeps it."
        )
    for component in gated.components:
        treatment = given.get(component.name, Treatment.KEEP)
        if treatment.row.of_x0 and component.kind != "step":
            raise CompileError(
                f"{component.name!r} cannot get {treatment}: only the whole denoiser call, the component step, has a "
                "denoised sample. Use hold or forecast."
            )
    model = gated.model.clone()
    prediction = model.graph.outputs[0]
    gates = gates_of(model.graph)
    for component in gated.components:
        if component.name in emits:
            emit(model.graph, gates[component.index], component)
    for component in gated.components:
        gate = gates[component.index]
        if component.name not in given:
            _replace(gate.outputs[0], _branch(gate))
        elif recall := given[component.name].row.recall:
            _replace(gate.outputs[0], _recall(model.graph, _branch(gate), component, recall))
    spread: dict[ir.Value, NDArray[np.float32]] = {}
    for component in gated.components:
        factor = given[component.name].row.mean if component.name in given else None
        if factor is not None:
            own = means[component.offset : component.offset + component.channels]
            constant = np.float32(factor) * own if factor else np.zeros_like(own)
            repeated = _make_constant(model.graph, gates[component.index], component, constant)
            if repeated is not None:
                spread[repeated] = constant
    _remove_dead_nodes(model)
    slice_constants(model.graph, spread)
    # the step's gate had the name, type and shape of the prediction: restore them
    model.graph.outputs[0] = add_name(model.graph, model.graph.outputs[0], OUTPUT, like=prediction)
    _clean(model)
    return serialise(model)


def _branch(gate: ir.Node) -> ir.Value:
    branch = gate.inputs[0]
    assert branch is not None
    return branch


def _replace(old: ir.Value, new: ir.Value) -> None:
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _recall(graph: ir.Graph, branch: ir.Value, component: Component, recall: Recall) -> ir.Value:
    """Compute a branch from earlier branches, which become inputs of the graph."""

    @functools.cache
    def take(prefix: str) -> Expression:
        assert branch.shape is not None
        shape = branch.shape[:1] if prefix == EXTRAPOLATION else branch.shape
        value = ir.val(f"{prefix}{component.index}", type=branch.type, shape=ir.Shape(shape))
        graph.inputs.append(value)
        if prefix == EXTRAPOLATION:  # one factor per row, for every position of the row
            value = add_reshape(graph, value, -1, *[1] * (component.rank - 1))
        return Expression(graph, value)

    value: ir.Value = recall(take).value
    return value


def _make_constant(
    graph: ir.Graph, gate: ir.Node, component: Component, constant: NDArray[np.float32]
) -> ir.Value | None:
    """Replace a gate with a constant per channel that fits its join; return the constant part of a `Concat`."""
    zero = not constant.any()
    shape = [1 if i != component.axis else component.channels for i in range(component.rank)]
    if component.kind == "step":
        value = add_initializer(graph, f"mean.{component.index}", constant.reshape(shape))
        (sample,) = (value for value in graph.inputs if value.name == SAMPLE)
        _replace(gate.outputs[0], add_repeated(graph, value, sample, component.axis, name=_SPREAD))
        return None
    (join,) = {use.node for use in gate.outputs[0].uses()}
    if join.op_type == "Add":
        (trunk,) = (value for value in join.inputs if value is not gate.outputs[0])
        assert trunk is not None
        if zero:
            _replace(join.outputs[0], trunk)
        else:
            _replace(gate.outputs[0], add_initializer(graph, f"mean.{component.index}", constant.reshape(shape)))
    elif join.op_type == "Concat":
        value = add_initializer(graph, f"mean.{component.index}", constant.reshape(shape))
        like = _shape_source(graph, join, gate, component.axis)
        repeated = add_repeated(graph, value, like, component.axis, name=_SPREAD)
        _replace(gate.outputs[0], repeated)
        return repeated
    else:
        raise CompileError(
            f"component {component.name!r} joins at a {join.op_type}, expected Add or Concat. Please report the model."
        )
    return None


_SPREAD = "spread"
"""Name of the nodes that repeat a constant."""


def _shape_source(graph: ir.Graph, join: ir.Node, gate: ir.Node, axis: int) -> ir.Value:
    """Find a value with the batch and positions of a concatenation: a part that stays, or else the first match.

    Reading the shape of a removed part would compute everything below it.
    """
    parts = [value for value in join.inputs if value is not None]
    if computed := [part for part in parts if _is_computed(part)]:
        return computed[0]
    extents = {_extent(part, axis) for part in parts} - {None}
    values = (*graph.inputs, *(value for node in graph for value in node.outputs))
    return next((value for value in values if _extent(value, axis) in extents), _branch(gate))


def _extent(value: ir.Value, axis: int) -> tuple[str, ...] | None:
    """Return the sizes of a value along all axes but one; equal names mean equal sizes."""
    if value.shape is None or value.shape.has_unknown_dim():
        return None
    return tuple("" if i == axis else str(size) for i, size in enumerate(value.shape))


def _is_computed(value: ir.Value) -> bool:
    """Check whether a part of a concatenation stays in the graph."""
    producer = value.producer()
    return producer is None or not (is_gate(producer) or producer.name == _SPREAD)


def _is_unread(value: ir.Value) -> bool:
    """Check whether a value is an input that was added for a component and that nothing reads."""
    added = str(value.name).startswith((HELD, EARLIER, EXTRAPOLATION))
    return added and not value.uses() and not value.is_graph_output()


def _remove_dead_nodes(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads, in reverse topological order."""
    common.TopologicalSortPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _clean(model: ir.Model) -> None:
    """Remove dead nodes, unused weights and the gate inputs."""
    _remove_dead_nodes(model)
    if any(is_gate(node) for node in model.graph):
        raise CompileError("a gate is left in a specialised graph. Please report the model.")
    for value in [value for value in model.graph.inputs if value.name in (GATES, MEANS) or _is_unread(value)]:
        model.graph.inputs.remove(value)
    called = {node.op_identifier() for node in model.graph}
    for unused in model.functions.keys() - called:
        del model.functions[unused]
    common.RemoveUnusedOpsetsPass()(model)
    for node in model.graph:
        node.name = None
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None  # runtimes infer them again, and they take a third of the file
    common.NameFixPass()(model)
