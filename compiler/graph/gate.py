"""The gate: one operator, defined once for torch and once for ONNX.

    gate(branch, gates, means)[b] = gates[b, index, KEEP] * branch[b] + gates[b, index, MEAN] * means[offset : offset +
    channels]

It sits on the edge where a branch joins the trunk. `gates` is [batch, component, 2], so each sample of a batch may have
a different ablation; a row of zeros drops the branch. In both graphs the gate is a single opaque node, so no optimiser
can fuse it away before `specialise` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from numpy.typing import NDArray
from torch import Tensor

from unetc.artifacts.profile import Component
from unetc.backend import DOMAIN
from unetc.treatments import Treatment

OPERATOR = "Gate"
KEEP, MEAN = 0, 1
"""Columns of the gate input; `unetc.treatments` holds the row of each treatment."""


def gate_values(components: Sequence[Component], treatments: Mapping[str, Treatment]) -> NDArray[np.float32]:
    """Encode an assignment as one sample's gates, [component, 2]; unnamed components are kept."""
    rows = [treatments.get(component.name, Treatment.KEEP).row.gates for component in components]
    return np.array(rows, dtype=np.float32).reshape(len(components), 2)


@torch.library.custom_op("unetc::gate", mutates_args=())
def gate(branch: Tensor, gates: Tensor, means: Tensor, index: int, offset: int, axis: int) -> Tensor:
    """Gate a branch [batch, ...]; see the module docstring."""
    per_sample = [-1] + [1] * (branch.ndim - 1)
    per_channel = [branch.shape[i] if i == axis else 1 for i in range(branch.ndim)]
    mean = means[offset : offset + branch.shape[axis]].reshape(per_channel)
    return branch * gates[:, index, KEEP].reshape(per_sample) + mean * gates[:, index, MEAN].reshape(per_sample)


@gate.register_fake
def _(branch: Tensor, gates: Tensor, means: Tensor, index: int, offset: int, axis: int) -> Tensor:
    return torch.empty_like(branch)


def _register_schema() -> onnxscript.values.Opset:
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
    return onnxscript.values.Opset(DOMAIN, 1)


_OPSET = _register_schema()


def to_onnx(branch: Any, gates: Any, means: Any, index: int, offset: int, axis: int) -> Any:
    """Translate the torch operator during ONNX export; all numbers become attributes."""
    rank, channels = len(branch.shape), int(branch.shape[axis])
    return _OPSET.Gate(
        branch,
        gates,
        means,
        index=[index],
        begin=[offset],
        end=[offset + channels],
        per_sample=[-1] + [1] * (rank - 1),
        per_channel=[-1 if i == axis else 1 for i in range(rank)],
    )


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.unetc.gate.default: to_onnx}
"""Translations for `torch.onnx.export`."""

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
