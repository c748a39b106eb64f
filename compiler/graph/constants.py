"""Constants of a graph with the bits that torch computes.

The exporter folds values that depend on no input, such as the frequencies of a timestep's embedding, by numpy. Its
`exp` differs from torch's in the last bit. A timestep of 1,000 multiplies that error, so every engine would differ from
its pipeline by up to 1e-5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

_ROUNDING = 1e-5
"""Largest relative difference of values that are the same but for rounding."""


def as_in_torch(model: ir.Model, graph: fx.Graph) -> None:
    """Replace the folded constants of an exported model by those of the graph that it was exported from."""
    values = _constants(graph)
    for name, value in model.graph.initializers.items():
        folded = value.const_value
        if folded is None or not isinstance(own := values.get(str(name)), torch.Tensor):
            continue
        array, before = own.numpy(), folded.numpy()
        same = array.shape == before.shape and array.dtype == before.dtype
        if same and np.allclose(array, before, rtol=_ROUNDING, atol=0):
            value.const_value = ir.tensor(array.copy(), name=str(name))


def _constants(graph: fx.Graph) -> dict[str, Any]:
    """Compute all nodes that depend on no input and no weight."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "call_function" and values.keys() >= set(node.all_input_nodes):
                arguments, named = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*arguments, **named)
    return {node.name: value for node, value in values.items()}
