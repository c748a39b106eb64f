"""Slicing: narrow the readers of a concatenation with a constant part, so that the concatenation disappears.

`Concat([h, c])`, where c is a constant per channel, is read by convolutions, directly or after a group norm and an
activation. Both are split exactly, up to rounding:

- a norm over whole groups of h is a norm of h with fewer groups, and a group of constants alone is constant;
- in a group with channels of both, the statistics of h are combined with the constants. The constants then have a value
  per sample;
- a convolution becomes one over h with fewer weights, plus a term for the constants. The term is the same at all
  positions where no tap of the kernel reads padding. It is a bias if the convolution has no padding, and otherwise the
  sum of the taps that read no padding.

A value that replaces another takes its name. Measurements of the full graph's values (`lowering.py`) therefore hold for
a narrowed graph too.

Weights are sliced and folded by nodes over the shared initializers. A runtime computes these nodes once, when it loads
the graph, so an engine's file holds no copy of the weights. Any other reader keeps the concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .nodes import add_initializer, add_integers, add_node, add_reshape, add_slice, copy_node

PARTIAL = ".partial"
"""Ending of a name: the value before the term for the constants is added."""

Constants = Mapping[ir.Value, NDArray[np.float32]]
"""Values that are constant over batch and positions, with their number in each channel."""


@dataclass(frozen=True, slots=True)
class _Join:
    """A concatenation of one computed part, first or last, with constants."""

    output: ir.Value
    computed: ir.Value
    constant: NDArray[np.float32]
    computed_first: bool

    def split(self, channels: int) -> tuple[int, int]:
        """Return the begin and end of the computed channels."""
        width = channels - self.constant.size
        return (0, width) if self.computed_first else (channels - width, channels)


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive channels, each with the same value at all positions."""

    begin: int
    end: int
    value: ir.Value
    """[1 or batch, channel]."""
    per_sample: bool


@dataclass(frozen=True, slots=True)
class _Image:
    """Channels with one computed run; the other runs are constant, and channels outside the runs are zero."""

    computed: ir.Value
    """[batch, channel, ...]."""
    begin: int
    end: int
    runs: tuple[_Run, ...]


def slice_constants(graph: ir.Graph, constants: Constants) -> None:
    """Narrow the convolutions and norms that read constant channels; nodes that become dead stay in the graph.

    Args:
        graph: Changed in place; new nodes are appended unsorted. Dead nodes count as readers: remove them first.
        constants: The constant parts of concatenations.
    """
    for node in list(graph):
        if node.op_type == "Concat" and (join := _read(node, constants)):
            for reader in _readers(join.output):
                if _is_narrowable(reader, "Conv", join.output):
                    _narrow(graph, reader, _whole(graph, join, _channels(reader)))
                elif _is_narrowable(reader, "GroupNormalization", join.output):
                    _narrow_behind(graph, reader, join)


def _read(concat: ir.Node, constants: Constants) -> _Join | None:
    """Read a concatenation of channels if only its first or its last part is not constant."""
    parts = [part for part in concat.inputs if part is not None]
    computed = [part for part in parts if part not in constants]
    if concat.attributes["axis"].as_int() != 1 or len(computed) != 1 or len(parts) == 1:
        return None
    if computed[0] not in (parts[0], parts[-1]):
        return None
    constant = np.concatenate([constants[part] for part in parts if part in constants])
    return _Join(concat.outputs[0], computed[0], constant, computed[0] is parts[0])


def _readers(value: ir.Value) -> list[ir.Node]:
    """List the nodes that read a value, each once."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def _is_narrowable(node: ir.Node, operator: str, value: ir.Value) -> bool:
    """Check whether a node has an operator, reads a value as its image and has parameters that can be sliced."""
    attributes = node.attributes
    return (
        node.op_type == operator
        and node.inputs[0] is value
        and all(parameter is not None and parameter.const_value is not None for parameter in node.inputs[1:])
        and attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


def _sizes(node: ir.Node) -> tuple[int, ...]:
    """Return the shape of a convolution's weight or a norm's scale."""
    parameter = node.inputs[1]
    assert parameter is not None
    assert parameter.const_value is not None
    return tuple(parameter.const_value.shape.numpy())


def _channels(node: ir.Node) -> int:
    """Count the channels that a convolution or a norm reads."""
    return _sizes(node)[1 if node.op_type == "Conv" else 0]


def _narrow_behind(graph: ir.Graph, norm: ir.Node, join: _Join) -> None:
    """Narrow a norm and the convolutions after it if nothing else reads the norm or its activation."""
    activation = _activation(norm.outputs[0])
    last = (norm, *activation)[-1].outputs[0]
    convolutions = _readers(last)
    if any(node.outputs[0].is_graph_output() for node in (norm, *activation)):
        return
    if not all(_is_narrowable(reader, "Conv", last) for reader in convolutions):
        return

    def activate(value: ir.Value, ending: str) -> ir.Value:
        return _replay(graph, activation, norm.outputs[0], value, ending)

    image = _normalise(graph, norm, join, rank=len(_sizes(convolutions[0])))
    image.computed.name = norm.outputs[0].name
    runs = tuple(replace(run, value=activate(run.value, ".constant")) for run in image.runs)
    image = replace(image, computed=activate(image.computed, ""), runs=runs)
    for convolution in convolutions:
        _narrow(graph, convolution, image)


def _activation(value: ir.Value) -> tuple[ir.Node, ...]:
    """Find the activation that is the only reader of a value; return no nodes if there is another reader."""
    readers = sorted(_readers(value), key=lambda node: node.op_type, reverse=True)
    match [reader.op_type for reader in readers]:
        case ["Gelu" | "Mish" | "Relu"]:
            return tuple(readers)
        case ["Sigmoid", "Mul"]:
            gate = readers[0].outputs[0]
            is_silu = set(readers[1].inputs) == {value, gate} and _readers(gate) == readers[1:]
            return tuple(readers) if is_silu and not gate.is_graph_output() else ()
        case _:
            return ()


def _replay(graph: ir.Graph, nodes: Sequence[ir.Node], old: ir.Value, new: ir.Value, ending: str) -> ir.Value:
    """Apply copies of the elementwise nodes on one value to another; names get an ending."""
    values: dict[ir.Value | None, ir.Value] = {old: new}
    for node in nodes:
        new = values[node.outputs[0]] = copy_node(graph, node, [values[value] for value in node.inputs])
        new.name = f"{node.outputs[0].name}{ending}"
    return new


def _whole(graph: ir.Graph, join: _Join, channels: int) -> _Image:
    """Describe a concatenation as a convolution reads it."""
    begin, end = join.split(channels)
    image = _Image(join.computed, begin, end, ())
    if not join.constant.any():
        return image
    first = 0 if begin else end
    value = add_initializer(graph, f"{join.output.name}.constant", join.constant[np.newaxis])
    return replace(image, runs=(_Run(first, first + join.constant.size, value, per_sample=False),))


@dataclass(frozen=True, slots=True)
class _Groups:
    """Layout of a norm's groups over the channels of a concatenation."""

    size: int
    """Channels per group."""
    begin: int
    end: int
    """Range of the computed channels."""
    low: int
    high: int
    """Range of the groups with computed channels."""
    mixed: NDArray[np.float32]
    """Constants in the group that also has computed channels."""
    alone: NDArray[np.float32]
    """Constants in the other groups."""
    alone_begin: int

    @classmethod
    def of(cls, norm: ir.Node, join: _Join) -> Self:
        """Compute the layout for a norm that reads a concatenation."""
        channels = _channels(norm)
        size = channels // norm.attributes["num_groups"].as_int()
        begin, end = join.split(channels)
        low, high = begin // size * size, -(-end // size) * size
        seam = high - end if join.computed_first else low
        parts = join.constant[:seam], join.constant[seam:]
        mixed, alone = parts if join.computed_first else reversed(parts)
        return cls(size, begin, end, low, high, mixed, alone, high if join.computed_first else 0)

    @property
    def count(self) -> int:
        """Number of groups with computed channels."""
        return (self.high - self.low) // self.size


def _normalise(graph: ir.Graph, norm: ir.Node, join: _Join, *, rank: int) -> _Image:
    """Apply a group norm to a concatenation; `rank` is the number of axes of an image."""
    groups = _Groups.of(norm, join)
    if groups.mixed.size:
        image = _normalise_mixed(graph, norm, join, groups, rank)
    else:
        parameters = _parameters(graph, norm, groups.begin, groups.end)
        narrow = copy_node(graph, norm, [join.computed, *parameters], num_groups=groups.count)
        image = _Image(narrow, groups.begin, groups.end, ())
    if not groups.alone.size:
        return image
    begin, end = groups.alone_begin, groups.alone_begin + groups.alone.size
    scale, bias = _parameters(graph, norm, begin, end)
    if groups.alone.any():
        normal = add_initializer(graph, f"{norm.outputs[0].name}.alone", _normal(groups.alone, groups.size, norm))
        bias = add_node(graph, "Add", [add_node(graph, "Mul", [normal, scale]), bias])
    run = _Run(begin, end, add_reshape(graph, bias, 1, -1), per_sample=False)
    return replace(image, runs=(*image.runs, run))


def _parameters(graph: ir.Graph, norm: ir.Node, begin: int, end: int) -> tuple[ir.Value, ir.Value]:
    """Slice the scale and bias of a norm."""
    scale, bias = (add_slice(graph, value, begin, end, axis=0) for value in norm.inputs[1:3] if value is not None)
    return scale, bias


def _epsilon(norm: ir.Node) -> float:
    return norm.attributes.get_float("epsilon", 1e-5)


def _normal(constant: NDArray[np.float32], size: int, norm: ir.Node) -> NDArray[np.float32]:
    """Normalise groups of constants."""
    members = constant.astype(np.float64).reshape(-1, size)
    members -= members.mean(1, keepdims=True)
    members /= np.sqrt(np.square(members).mean(1, keepdims=True) + _epsilon(norm))
    return members.reshape(-1).astype(constant.dtype)


def _normalise_mixed(graph: ir.Graph, norm: ir.Node, join: _Join, groups: _Groups, rank: int) -> _Image:
    """Apply a group norm to the groups with computed channels, where one group also has constants.

    A group's mean and mean square are averages over its channels, and a constant's are known. The norm is then one
    factor and one summand per channel, for computed channels and constants alike.
    """

    def add(operator: str, *inputs: ir.Value) -> ir.Value:
        return add_node(graph, operator, inputs)

    width = groups.end - groups.begin
    before, after = groups.begin - groups.low, groups.high - groups.end
    name = norm.outputs[0].name

    def mean(values: ir.Value, known: NDArray[np.float32], name: str) -> ir.Value:
        """Average over the positions and the channels of each group; [batch, group, 1]."""
        positions = add_integers(graph, *range(2, rank))
        computed = add_node(graph, "ReduceMean", [values, positions], {"keepdims": 0})
        every = add("Pad", computed, add_integers(graph, 0, before, 0, after))
        if known.any():
            padded = np.pad(known, (width, 0) if after else (0, width))
            every = add("Add", every, add_initializer(graph, name, padded))
        return add("ReduceMean", add_reshape(graph, every, 0, groups.count, groups.size), add_integers(graph, 2))

    average = mean(join.computed, groups.mixed, f"{name}.mixed")
    squared = add("Mul", join.computed, join.computed)
    variance = add("Sub", mean(squared, groups.mixed**2, f"{name}.mixed_squared"), add("Mul", average, average))
    epsilon = add_initializer(graph, f"{name}.epsilon", np.array(_epsilon(norm), dtype=groups.mixed.dtype))
    deviation = add("Sqrt", add("Add", variance, epsilon))
    scale, bias = (
        add_reshape(graph, value, 1, groups.count, groups.size)
        for value in _parameters(graph, norm, groups.low, groups.high)
    )
    factor = add("Div", scale, deviation)
    summand = add("Sub", bias, add("Mul", average, factor))
    factor, summand = (add_reshape(graph, value, 0, -1) for value in (factor, summand))

    def part(value: ir.Value, begin: int, end: int) -> ir.Value:
        return add_slice(graph, value, begin - groups.low, end - groups.low, axis=1)

    def per_position(value: ir.Value) -> ir.Value:
        return add("Unsqueeze", part(value, groups.begin, groups.end), add_integers(graph, *range(2, rank)))

    computed = add("Add", add("Mul", join.computed, per_position(factor)), per_position(summand))
    begin, end = (groups.end, groups.high) if after else (groups.low, groups.begin)
    value = part(summand, begin, end)
    if groups.mixed.any():
        mixed = add_initializer(graph, f"{name}.seam", groups.mixed)
        value = add("Add", add("Mul", mixed, part(factor, begin, end)), value)
    return _Image(computed, groups.begin, groups.end, (_Run(begin, end, value, per_sample=True),))


def _narrow(graph: ir.Graph, convolution: ir.Node, image: _Image) -> None:
    """Replace a convolution with one over the computed channels, plus a term for the constant channels."""
    weight, *bias = (value for value in convolution.inputs[1:] if value is not None)
    inner = add_slice(graph, weight, image.begin, image.end, axis=1)
    border = any(convolution.attributes.get_ints("pads", ()))
    fixed = [run for run in image.runs if not run.per_sample]
    if fixed and not border:
        added = add_reshape(graph, _sum_of_taps(graph, convolution, fixed), -1)
        bias = [add_node(graph, "Add", [*bias, added])] if bias else [added]
    output = partial = copy_node(graph, convolution, [image.computed, inner, *bias])
    partial.name = f"{convolution.outputs[0].name}{PARTIAL}"
    if image.runs and border:
        output = add_node(graph, "Add", [output, _within_border(graph, convolution, image)])
    elif varying := [run for run in image.runs if run.per_sample]:
        positions = add_integers(graph, *range(2, len(_sizes(convolution))))
        added = add_node(graph, "Unsqueeze", [_sum_of_taps(graph, convolution, varying), positions])
        output = add_node(graph, "Add", [output, added])
    output.name = convolution.outputs[0].name
    convolution.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)


def _taps(graph: ir.Graph, convolution: ir.Node, runs: Sequence[_Run]) -> ir.Value:
    """Compute the term for constant channels at each tap of the kernel; [1 or batch, channel, tap]."""
    outputs, _, *kernel = _sizes(convolution)
    weight = convolution.inputs[1]
    assert weight is not None
    products = []
    for run in runs:
        own = add_slice(graph, weight, run.begin, run.end, axis=1)
        by_input = add_node(graph, "Transpose", [own], {"perm": [1, 0, *range(2, 2 + len(kernel))]})
        products.append(add_node(graph, "MatMul", [run.value, add_reshape(graph, by_input, run.end - run.begin, -1)]))
    total = products[0] if len(products) == 1 else add_node(graph, "Add", products)
    return add_reshape(graph, total, -1, outputs, math.prod(kernel))


def _sum_of_taps(graph: ir.Graph, convolution: ir.Node, runs: Sequence[_Run]) -> ir.Value:
    """Compute the term for constant channels where no tap reads padding; [1 or batch, channel]."""
    return add_node(graph, "ReduceSum", [_taps(graph, convolution, runs), add_integers(graph, 2)], {"keepdims": 0})


def _within_border(graph: ir.Graph, convolution: ir.Node, image: _Image) -> ir.Value:
    """Compute the term for constant channels at each position; [1 or batch, channel, ...]."""
    outputs, _, *kernel = _sizes(convolution)
    taps = _taps(graph, convolution, image.runs)
    one = add_initializer(graph, "one", np.ones([1] * (2 + len(kernel)), dtype=np.float32))
    size = add_node(graph, "Shape", [image.computed], {"start": 2})
    ones = add_node(graph, "Expand", [one, add_node(graph, "Concat", [add_integers(graph, 1, 1), size], {"axis": 0})])
    if not any(run.per_sample for run in image.runs):
        return copy_node(graph, convolution, [ones, add_reshape(graph, taps, outputs, 1, *kernel)])
    count = math.prod(kernel)
    each = np.eye(count, dtype=np.float32).reshape(count, 1, *kernel)
    inside = copy_node(graph, convolution, [ones, add_initializer(graph, f"taps.{'x'.join(map(str, kernel))}", each)])
    total = add_node(graph, "MatMul", [taps, add_reshape(graph, inside, 1, count, -1)])
    size = add_node(graph, "Shape", [inside], {"start": 2})
    shape = add_node(graph, "Concat", [add_integers(graph, -1, outputs), size], {"axis": 0})
    return add_node(graph, "Reshape", [total, shape])
