"""The group norm: one node in a graph, whose definition every runtime computes precisely and fast.

onnxruntime has no kernel for ONNX's GroupNormalization. It runs the operator's definition, which takes the variance as
E[x²] − E[x]² and loses all digits of values far from zero. Graphs of unetc therefore call a function of their own. Its
definition, in the graph's file, goes through InstanceNormalization, which has kernels. A library that has a kernel for
the whole norm gets the norm whole: see `runtime/backends/torch_operators.py` and `compiler/tensorrt/builder.py`.

See `findings/groupnorm-loses-digits.sh` and `docs/decisions/064-a-group-norm-of-our-own.md`.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from unetc.backend import DOMAIN, GROUP_NORM

ONNX = "GroupNormalization"
"""The operator of ONNX."""

_BODY = """
<opset_import: ["" : {opset}], domain: "unetc">
GroupNorm <num_groups, epsilon> (x, scale, bias) => (y)
{{
    same = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    number = Constant <value_int: int = @num_groups> ()
    groups = Reshape (number, rest)
    channels = Shape (scale)
    wide = Cast <to = 1> (x)
    by_group = Concat <axis = 0> (same, groups, rest)
    grouped = Reshape (wide, by_group)
    ones = ConstantOfShape <value = float[1] {{1}}> (groups)
    zeros = ConstantOfShape <value = float[1] {{0}}> (groups)
    normal = InstanceNormalization <epsilon: float = @epsilon> (grouped, ones, zeros)
    by_channel = Concat <axis = 0> (same, channels, rest)
    each = Reshape (normal, by_channel)
    factor = Cast <to = 1> (scale)
    summand = Cast <to = 1> (bias)
    mean = ConstantOfShape <value = float[1] {{0}}> (channels)
    variance = ConstantOfShape <value = float[1] {{1}}> (channels)
    scaled = BatchNormalization <epsilon = 0.0> (each, factor, summand, mean, variance)
    size = Shape (x)
    shaped = Reshape (scaled, size)
    y = CastLike (shaped, x)
}}
"""
"""The statistics are computed in float32, as ONNX's operator does, whatever the type of x."""


def from_onnx(model: ir.Model) -> None:
    """Replace ONNX's group norms by calls of the function, and add its definition."""
    norms = [node for node in model.graph if node.op_type == ONNX and node.domain == ""]
    if not norms:
        return
    for node in norms:
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
        node.attributes.pop("stash_type", None)
        node.op_type, node.domain = GROUP_NORM, DOMAIN
    function = definition(model.opset_imports[""])
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1


def definition(opset: int) -> ir.Function:
    """Define the group norm in operators that have kernels in onnxruntime."""
    return ir.serde.deserialize_function(onnx.parser.parse_function(_BODY.format(opset=opset)))
