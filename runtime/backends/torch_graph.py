"""Translate an ONNX graph into a graph of torch.

The translation is a table of operators (`torch_operators`). Nothing else in a file is executed, and an operator that is
not in the table is refused by name. Values that depend only on weights and constants are computed once, here; this
folds the slices of narrowed engines. Integers that come from shapes stay Python numbers, so the graph has no tensor of
sizes, runs at any batch and size, and can be compiled without a break.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import inliner, shape_inference
from torch import Tensor, fx

from unetc.backend import DOMAIN, GROUP_NORM
from unetc.errors import SessionError

from .torch_operators import OPERATORS
from .torch_values import Builder, Unsupported, Value, tensor_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """A graph of torch, called with its inputs in order."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def translate(serialised: bytes, weights: Mapping[str, Tensor], device: torch.device) -> Translation:
    """Translate an ONNX graph.

    Args:
        serialised: The graph.
        weights: Its external initializers by name, on the device.
        device: The device that it will run on.

    Raises:
        SessionError: If the graph cannot be read, or has an operator that is not in the table.
    """
    try:
        model = inliner.inline_selected_functions(
            onnx.load_model_from_string(serialised), [(DOMAIN, GROUP_NORM)], exclude=True
        )
    except Exception as error:  # protobuf raises its own class
        raise SessionError(f"torch cannot load an engine: {str(error).splitlines()[0]}") from error
    graph, builder = model.graph, Builder(device)
    values: dict[str, Value | None] = {"": None}
    for initializer in graph.initializer:
        values[initializer.name] = _weight(initializer, weights, device)
    ranks = _ranks(model)

    def define(name: str, value: Value) -> None:
        values[name] = value
        if isinstance(value, fx.Node) and name in ranks:
            builder.ranks[value] = ranks[name]

    inputs = [value.name for value in graph.input if value.name not in values]
    for i, name in enumerate(inputs):
        define(name, builder.placeholder(f"input_{i}"))
    for node in graph.node:
        if missing := [name for name in node.input if name not in values]:
            raise SessionError(
                f"torch cannot load an engine: {node.op_type} reads {missing[0]!r}, which nothing before it computes."
            )
        for name, value in zip(node.output, _apply(node, builder, [values[name] for name in node.input]), strict=False):
            define(name, value)
    outputs = tuple(output.name for output in graph.output)
    return Translation(
        module=builder.finish([values[name] for name in outputs]),
        inputs=tuple(inputs),
        outputs=outputs,
    )


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Infer numbers of axes, which are needed to read a shape from an axis to the last one.

    onnx 1.23 infers nothing for GroupNormalization. Its output has the shape of its input, as with Identity.
    """
    alike = onnx.ModelProto.FromString(model.SerializeToString())
    for node in alike.graph.node:
        if node.op_type in (GROUP_NORM, "GroupNormalization"):
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output))
    graph = shape_inference.infer_shapes(alike).graph
    tensors = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info)}
    return {name: len(tensor.shape.dim) for name, tensor in tensors.items() if tensor.HasField("shape")}


def _weight(initializer: onnx.TensorProto, weights: Mapping[str, Tensor], device: torch.device) -> Tensor:
    if initializer.data_location == onnx.TensorProto.EXTERNAL:
        if initializer.name not in weights:
            raise SessionError(f"the weights file has no {initializer.name!r}. Build the bundle again.")
        return weights[initializer.name]
    return tensor_of(initializer).to(device)


def _apply(node: onnx.NodeProto, builder: Builder, inputs: Sequence[Value | None]) -> Sequence[Value]:
    """Translate one node; return its outputs."""
    operator: Callable[..., Any] | None = (
        OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx", DOMAIN) else None
    )
    if operator is None:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise SessionError(f"torch cannot run the operator {name}. Use the target onnxruntime:cpu.")
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    try:
        result = operator(builder, inputs, attributes)
    except Unsupported as error:
        raise SessionError(f"torch cannot run {node.op_type} with {error}. Use the target onnxruntime:cpu.") from error
    return result if isinstance(result, tuple) else (result,)
