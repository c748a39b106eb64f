"""Lower the precision of graphs: float16 or bfloat16 inside, float32 at their borders and where it matters.

Precision is a property of the graph, because the libraries that build engines no longer take flags for it. Inputs and
outputs stay float32 and are cast at the border. These nodes stay float32 too:

- elementwise operations on inputs alone. In float16, a timestep of 999 has a resolution of only 0.5, too coarse for its
  sine, and a forecast is a difference of two almost equal numbers;
- softmax, exponentials, squares and reductions, and elementwise operations on sums alone. These include the statistics
  of the norms that slicing spells out. Norms that are one operator compute their statistics in float32 anyway, because
  of their attribute stash_type;
- the last layer with weights before the prediction;
- the producers and readers of named values, which overflow when measured, and attention whose products do.

Lowered graphs of a bundle also share one weights file. It holds a weight once for each precision in which it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from unetc.backend import WEIGHTS, SerialisedGraph
from unetc.precision import LARGEST, Precision
from unetc.tensors import tensor_ranges

from .element_types import infer_types
from .slicing import PARTIAL
from .weights import serialise, write_tensors

LOGITS = ".logits"
"""Ends the name of the products of queries and keys inside an attention operator."""

_TYPES = {Precision.FP16: ir.DataType.FLOAT16, Precision.BF16: ir.DataType.BFLOAT16}

_REDUCTIONS = frozenset(
    ["ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceProd"]
)
WIDE_OPERATORS = _REDUCTIONS | frozenset(
    ["Softmax", "LogSoftmax", "Exp", "Log", "Sin", "Cos", "Pow", "Reciprocal", "CumSum", "Range"]
)
"""Operators that sum, amplify rounding errors or count; float16 has no odd numbers beyond 2048."""

_ELEMENTWISE = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Neg",
        "Sqrt",
        "Sin",
        "Cos",
        "Exp",
        "Cast",
        "Identity",
        "Concat",
        "Pad",
        "Slice",
        "Gather",
        "Expand",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Range",
    ]
)
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "MatMul", "Gemm"))
_FLOAT_ONLY = {"Resize": (1, 2)}
"""Inputs that must be float32 whatever the type of the others, by operator."""


def lower_graphs(
    folder: Path, names: Sequence[str], precision: Precision, into: Path, wide: Collection[str] = ()
) -> None:
    """Write graphs in a lower precision, with one weights file for all of them.

    Args:
        folder: Folder of the graphs and their weights file, all in float32.
        names: File names of the graphs.
        precision: Precision to compute in, lower than float32.
        into: Folder for the new files, which have the same names.
        wide: Names of values that overflow; their producers and readers stay float32.

    Raises:
        OSError: If a file cannot be read or written.
    """
    into.mkdir(parents=True, exist_ok=True)
    models = {name: ir.load(folder / name) for name in names}
    stored: dict[str, ir.TensorProtocol] = {}
    for model in models.values():
        stored |= _Lowering(model, precision, frozenset(wide)).run()
    write_tensors(into / WEIGHTS, stored)
    ranges = tensor_ranges(into / WEIGHTS)
    for name, model in models.items():
        for key, value in model.graph.initializers.items():
            if key in ranges:
                value.const_value = _pointer(stored[key], str(key), *ranges[key], into)
        (into / name).write_bytes(ir.to_proto(model).SerializeToString())


def lower_graph(graph: SerialisedGraph, precision: Precision, wide: Collection[str] = ()) -> SerialisedGraph:
    """Lower one graph without its weights, which get the names of `unetc.precision` and are rounded when loaded.

    Args:
        graph: A graph in float32.
        precision: Precision to compute in, lower than float32.
        wide: Names of values that overflow; their producers and readers stay float32.
    """
    model = ir.from_proto(onnx.load_model_from_string(graph.graph))
    for name, tensor in _Lowering(model, precision, frozenset(wide)).run().items():
        model.graph.initializers[name].const_value = _pointer(tensor, name, 0, tensor.nbytes, "")
    return serialise(model)


def _pointer(tensor: ir.TensorProtocol, name: str, begin: int, end: int, folder: Path | str) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        WEIGHTS, begin, end - begin, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=folder
    )


class _Lowering:
    """Lowers one graph in place."""

    def __init__(self, model: ir.Model, precision: Precision, wide: frozenset[str]) -> None:
        self._model = model
        self._graph = model.graph
        self._precision = precision
        self._low = _TYPES[precision]
        infer_types(model.graph)
        self._wide = _wide_nodes(model.graph, wide)
        self._floats = {value for value in _values(model.graph) if value.dtype == ir.DataType.FLOAT}
        self._types: dict[ir.Value, ir.DataType] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._stored: dict[str, ir.TensorProtocol] = {}

    def run(self) -> dict[str, ir.TensorProtocol]:
        """Lower the graph and return the tensors for the weights file by name."""
        for node in tuple(self._graph):
            self._lower(node)
        for i, value in enumerate(self._graph.outputs):
            if self._types.get(value) == self._low:
                self._widen_output(i, value)
        common.RemoveUnusedNodesPass()(self._model)
        common.TopologicalSortPass()(self._model)
        for node in self._graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = value.type = None
        for name, initializer in self._graph.initializers.items():
            if isinstance(initializer.const_value, ir.ExternalTensor):
                self._stored[str(name)] = initializer.const_value
        return {name: tensor for name, tensor in self._stored.items() if name in self._graph.initializers}

    def _lower(self, node: ir.Node) -> None:
        wanted = ir.DataType.FLOAT if node in self._wide else self._low
        fixed = _FLOAT_ONLY.get(node.op_type, ())
        floats = [i for i, value in enumerate(node.inputs) if value in self._floats and i not in fixed]
        for i in floats:
            value = node.inputs[i]
            assert value is not None
            node.replace_input_with(i, self._as_type(value, wanted))
        for value in node.outputs:
            if value in self._floats:
                made = wanted if floats else ir.DataType.FLOAT  # a float made from integers stays float32
                self._types[value] = made
                value.dtype = made

    def _as_type(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if self._types.get(value, ir.DataType.FLOAT) == wanted:
            return value
        if (value, wanted) not in self._casts:
            constant = value.const_value if value.is_initializer() else None
            self._casts[value, wanted] = (
                self._cast(value, wanted) if constant is None else self._convert(value, constant)
            )
        return self._casts[value, wanted]

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], {"to": wanted})
        node.outputs[0].name = f"{value.name}.{wanted.name.lower()}"
        self._graph.append(node)
        return node.outputs[0]

    def _convert(self, value: ir.Value, constant: ir.TensorProtocol) -> ir.Value:
        """Convert a constant to low precision; a large one is read only when it is written."""
        name = self._precision.name_of(str(value.name))
        largest = LARGEST[self._precision]

        def convert() -> ir.TensorProtocol:
            array = np.clip(constant.numpy(), -largest, largest)  # larger numbers become the largest one
            return ir.Tensor(array.astype(self._low.numpy()), dtype=self._low, name=name)

        if isinstance(constant, ir.ExternalTensor):
            shape = ir.Shape(constant.shape.numpy())
            tensor: ir.TensorProtocol = ir.LazyTensor(convert, dtype=self._low, shape=shape, name=name)
            self._stored[name] = tensor
        else:
            tensor = convert()
        lowered = ir.val(name, const_value=tensor)
        self._graph.register_initializer(lowered)
        return lowered

    def _widen_output(self, index: int, value: ir.Value) -> None:
        name, shape = value.name, value.shape
        value.name = f"{name}.{self._precision}"
        widened = self._cast(value, ir.DataType.FLOAT)
        widened.name, widened.dtype, widened.shape = name, ir.DataType.FLOAT, shape
        self._graph.outputs[index] = widened


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def logits_of(attention: ir.Node) -> str:
    """Name the products of queries and keys inside an attention operator, after its result."""
    return f"{attention.outputs[0].name}{LOGITS}"


def _wide_nodes(graph: ir.Graph, measured: frozenset[str]) -> frozenset[ir.Node]:
    """Choose the nodes that stay float32."""
    wide = {node for node in graph if node.op_type in WIDE_OPERATORS or _squares(node)}
    plain = set(graph.inputs)  # values computed from inputs and sums alone
    fixed: set[ir.Value] = set(graph.initializers.values())  # values computed from weights alone
    for node in graph:
        computed = [value for value in node.inputs if value is not None and value not in fixed]
        if not computed:
            fixed.update(node.outputs)
        elif node.op_type == "Shape" or node.op_type in _REDUCTIONS:
            plain.update(node.outputs)  # sizes are exact, even sizes of rounded values
        elif node.op_type in _ELEMENTWISE and plain.issuperset(computed):
            plain.update(node.outputs)
            wide.add(node)
    wide |= _last_layer(graph.outputs[0])
    for node in graph:
        touched = {str(v.name).removesuffix(PARTIAL) for v in (*node.inputs, *node.outputs) if v is not None}
        if node.op_type == "Attention":
            touched.add(logits_of(node))
        if not touched.isdisjoint(measured):
            wide.add(node)
    return frozenset(wide)


def _squares(node: ir.Node) -> bool:
    """Check whether a node multiplies a value by itself; in float16 the square of 256 overflows."""
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]


def _last_layer(prediction: ir.Value) -> set[ir.Node]:
    """Trace a prediction back to the last layer with weights."""
    path: set[ir.Node] = set()
    node = prediction.producer()
    while node is not None and node not in path:
        path.add(node)
        if node.op_type in _WEIGHTED:
            break
        before = next((value for value in node.inputs if value is not None and value.producer() is not None), None)
        node = None if before is None else before.producer()
    return path
