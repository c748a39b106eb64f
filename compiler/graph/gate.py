"""The gate: one operator, defined here for ONNX and in `torch_gate.py` for torch.

    gate(branch, gates, means)[b] = gates[b, index, KEEP] * branch[b] + gates[b, index, MEAN] * means[offset : offset +
    channels]

It sits on the edge where a branch joins the trunk. `gates` is [batch, component, 2], so each sample of a batch may have
a different ablation; a row of zeros drops the branch. In both graphs the gate is a single opaque node, so no optimiser
can fuse it away before `specialise` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from unetc.artifacts.profile import Component
from unetc.backend import DOMAIN
from unetc.treatments import Treatment

OPERATOR = "Gate"
KEEP, MEAN = 0, 1
"""Columns of the gate input; `unetc.treatments` holds the row of each treatment."""

GATES, MEANS, OUTPUT = "gates", "means", "out_sample"
"""Names of a gated graph's additional inputs and of its output."""

OPSET = 23
"""Includes Attention, GroupNormalization and RMSNormalization as operators; older opsets need ten nodes for each."""


def gate_values(components: Sequence[Component], treatments: Mapping[str, Treatment]) -> NDArray[np.float32]:
    """Encode an assignment as one sample's gates, [component, 2]; unnamed components are kept."""
    rows = [treatments.get(component.name, Treatment.KEEP).row.gates for component in components]
    return np.array(rows, dtype=np.float32).reshape(len(components), 2)


def _register_schema() -> None:
    """Register the ONNX operator with the exporter and the checker of this process."""
    schema = onnx.defs.OpSchema
    if not onnx.defs.has(OPERATOR, DOMAIN):
        onnx.defs.register_schema(
            schema(
                OPERATOR,
                DOMAIN,
                1,
                inputs=[schema.FormalParameter(name, "T") for name in ("branch", "gates", "means")],
                outputs=[schema.FormalParameter("gated", "T")],
                type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
                attributes=[
                    schema.Attribute(name, schema.AttrType.INTS, "")
                    for name in ("index", "begin", "end", "per_sample", "per_channel")
                ],
            )
        )


_register_schema()

_BODY = """
<opset_import: ["" : {opset}], domain: "unetc">
Gate <index, begin, end, per_sample, per_channel> (branch, gates, means) => (gated)
{{
    row_index = Constant <value_ints: ints = @index> ()
    row = Gather <axis = 1> (gates, row_index)
    keep_column, mean_column = Split <axis = 2, num_outputs = 2> (row)
    sample_shape = Constant <value_ints: ints = @per_sample> ()
    keep = Reshape (keep_column, sample_shape)
    use_mean = Reshape (mean_column, sample_shape)
    first = Constant <value_ints: ints = @begin> ()
    last = Constant <value_ints: ints = @end> ()
    own_means = Slice (means, first, last)
    channel_shape = Constant <value_ints: ints = @per_channel> ()
    mean = Reshape (own_means, channel_shape)
    kept = Mul (branch, keep)
    constant = Mul (mean, use_mean)
    gated = Add (kept, constant)
}}
"""


def onnx_function(opset: int) -> ir.Function:
    """Define the gate in standard ONNX operators, so that any runtime can run a gated graph."""
    return ir.serde.deserialize_function(onnx.parser.parse_function(_BODY.format(opset=opset)))


def is_gate(node: ir.Node) -> bool:
    """Check whether a node is a gate."""
    return node.op_type == OPERATOR and node.domain == DOMAIN


def gates_of(graph: ir.Graph) -> dict[int, ir.Node]:
    """Map the index of every component to its gate."""
    return {node.attributes["index"].as_ints()[0]: node for node in graph if is_gate(node)}
