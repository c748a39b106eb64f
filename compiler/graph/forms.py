"""Forms of components: the work that their removal takes out of the graph, and its place.

Components of one form save the same time, so one of them can be timed for all. The residual blocks of a level mostly
have one form, and so have its attentions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import onnx_ir as ir

from unetc.artifacts.profile import Component

from .gate import gates_of, is_gate
from .gated import GatedGraph
from .size_arithmetic import compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What the removal of a component takes out of the graph."""

    form: Hashable
    """Equal for components whose removal saves the same work."""
    weights: frozenset[str]
    """Initializers that nothing else reads."""


def removals_of(gated: GatedGraph, sample_shape: tuple[int, int, int]) -> dict[str, Removal]:
    """Find out what the removal of every component takes out of the graph, without removing any.

    Args:
        gated: The graph.
        sample_shape: [channel, height, width] at which work is compared: two blocks of the same layers differ in size.
    """
    known = {"height": sample_shape[1], "width": sample_shape[2]}
    gates = gates_of(gated.model.graph)
    return {one.name: _removal(one, gates[one.index], known) for one in gated.components}


def _removal(component: Component, gate: ir.Node, known: dict[str, int]) -> Removal:
    dead = _dead_without(gate)
    narrowed = [
        reader
        for use in gate.outputs[0].uses()
        if use.node.op_type == "Concat"
        for reader in (use.node, *(other.node for other in use.node.outputs[0].uses()))
    ]
    return Removal(
        form=(
            component.kind,
            _size(gate.inputs[0], known),
            *(_size(node.outputs[0], known) for node in narrowed[:1]),
            _kinds(dead),
            _kinds(narrowed),
        ),
        weights=frozenset(
            str(value.name)
            for node in dead
            for value in node.inputs
            if value is not None and value.is_initializer() and all(use.node in dead for use in value.uses())
        ),
    )


def _dead_without(gate: ir.Node) -> set[ir.Node]:
    """Find the nodes that nothing needs once the output of a gate is a constant."""
    dead, pending = {gate}, [gate]
    while pending:
        for value in pending.pop().inputs:
            node = None if value is None else value.producer()
            if node is not None and node not in dead and _is_unused(node, dead):
                dead.add(node)
                pending.append(node)
    return dead


def _is_unused(node: ir.Node, dead: set[ir.Node]) -> bool:
    return all(not value.is_graph_output() and all(use.node in dead for use in value.uses()) for value in node.outputs)


def _kinds(nodes: Iterable[ir.Node]) -> frozenset[tuple[Hashable, int]]:
    """Count nodes by their operator, their attributes and the shapes of their weights."""
    return frozenset(Counter(map(_kind, nodes)).items())


def _kind(node: ir.Node) -> Hashable:
    if is_gate(node):
        return node.op_type
    attributes = sorted(f"{name}={attribute.value}" for name, attribute in node.attributes.items())
    constants = [
        None if value is None or value.const_value is None else tuple(value.const_value.shape.numpy())
        for value in node.inputs
    ]
    return node.domain, node.op_type, tuple(attributes), tuple(constants)


def _size(value: ir.Value | None, known: dict[str, int]) -> tuple[object, ...]:
    """Compute the size of a value; sizes that are not known stay names."""

    def size(one: int | ir.SymbolicDim) -> object:
        if isinstance(one, int):
            return one
        try:
            return compute(str(one.value), known)
        except ValueError:
            return str(one.value)

    return () if value is None or value.shape is None else tuple(map(size, value.shape))
