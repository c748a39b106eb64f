"""Run a graph in float32 to find the values that half precision cannot hold.

Only float16 overflows: bfloat16 has the range of float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from unetc.errors import EngineBuildError, MissingDependency

from .element_types import infer_types
from .lowering import logits_of
from .nodes import add_initializer, add_node, add_reshape

try:
    import onnxruntime
except ImportError as error:
    raise MissingDependency("finding values that overflow needs onnxruntime: pip install 'unetc[cpu]'") from error

LIMIT = 65504 / 8
"""Values on other inputs may be eight times as large before float16 overflows."""
_PRODUCTS = 3
"""Output of Attention with the scaled products of queries and keys."""
_LARGEST, _INFINITY = "largest", "infinity"

Values = Mapping[str, NDArray[Any]]


def overflowing(path: Path, probes: Sequence[Values]) -> tuple[frozenset[str], tuple[Values, ...]]:
    """Find the values of a graph that exceed `LIMIT` in any run.

    Args:
        path: ONNX file in float32; its weights file is in the same folder.
        probes: Inputs by name, one mapping per run; names that the graph does not read are ignored.

    Returns:
        Names of these values, and the graph's own outputs in every run. The products of queries and keys inside an
        attention operator have the names of `logits_of`.

    Raises:
        EngineBuildError: If onnxruntime cannot run the graph.
    """
    model = ir.load(path)
    own = [str(value.name) for value in model.graph.outputs]
    names = _measure(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # fusion hides values
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    largest, outputs = np.zeros(len(names), np.float32), []
    try:
        graph = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        read = [value.name for value in session.get_inputs()]
        for probe in probes:
            *produced, found = session.run([*own, _LARGEST], {name: probe[name] for name in read})
            largest = np.fmax(largest, np.where(np.isfinite(found), found, np.inf))
            outputs.append(dict(zip(own, produced, strict=True)))
    except Exception as error:  # onnxruntime raises unrelated exception classes
        raise EngineBuildError(f"cannot run {path.name} to find values that overflow: {str(error)[:300]}") from error
    return frozenset(name for name, size in zip(names, largest, strict=True) if size > LIMIT), tuple(outputs)


def _measure(model: ir.Model) -> list[str]:
    """Add an output with the largest magnitude of every float32 value; return the values' names in its order."""
    graph = model.graph
    infer_types(graph)
    values = [value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    infinity = add_initializer(graph, _INFINITY, np.array(np.inf, dtype=np.float32))
    sizes = []
    for value in values:
        # ReduceMax of onnxruntime skips a NaN that does not come first: findings/reducemax-hides-nan.sh
        magnitude = add_node(
            graph, "Where", [add_node(graph, "IsNaN", [value]), infinity, add_node(graph, "Abs", [value])]
        )
        size = add_node(graph, "ReduceMax", [magnitude], {"keepdims": 0})
        sizes.append(add_reshape(graph, size, 1))
    attentions = [node for node in graph if node.op_type == "Attention" and node.outputs[0].dtype == ir.DataType.FLOAT]
    sizes += [add_reshape(graph, _largest_logit(graph, node), 1) for node in attentions]
    names = [str(value.name) for value in values] + [logits_of(node) for node in attentions]
    output = add_node(graph, "Concat", sizes, {"axis": 0})
    output.name, output.dtype, output.shape = _LARGEST, ir.DataType.FLOAT, ir.Shape([len(names)])
    graph.outputs.append(output)
    return names


def _largest_logit(graph: ir.Graph, attention: ir.Node) -> ir.Value:
    """Add nodes for the largest magnitude of the products of queries and keys inside an attention operator.

    These are the largest values of many graphs, so they are reduced without a copy of their magnitudes. A NaN among
    them comes from a query or a key, which are measured too.
    """
    attention.resize_outputs(_PRODUCTS + 1)
    products = attention.outputs[_PRODUCTS]
    products.name, products.dtype = logits_of(attention), ir.DataType.FLOAT
    for unused in attention.outputs[1:_PRODUCTS]:
        unused.name = unused.name or ""
    highest = add_node(graph, "ReduceMax", [products], {"keepdims": 0})
    lowest = add_node(graph, "ReduceMin", [products], {"keepdims": 0})
    return add_node(graph, "Max", [highest, add_node(graph, "Neg", [lowest])])
