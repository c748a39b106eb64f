"""Slicing: narrow the readers of a concatenation with a constant part, so that the concatenation disappears.

`Concat([h, c])`, where c is a constant per channel, is read by convolutions, directly or after a group norm and an
activation. Both are split exactly, up to rounding:

- a norm over whole groups of h is a norm of h with fewer groups, and a group of constants alone is constant;
- in a group with channels of both, the constants are joined to h again. There are fewer of them than a group has
  channels. Convolutions then read a multiple of `ALIGNMENT` channels, the last of which may be zero;
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

from unetc.backend import GROUP_NORM

from .nodes import add_initializer, add_integers, add_node, add_repeated, add_reshape, add_slice, copy_node

ALIGNMENT = 4
"""Kernels are slower with other numbers of channels: findings/odd-channels-cost-more.sh."""
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
    """[1, channel]."""


@dataclass(frozen=True, slots=True)
class _Image:
    """Channels with one computed run, and perhaps a constant one; channels outside the runs are zero."""

    computed: ir.Value
    """[batch, channel, ...]."""
    begin: int
    end: int
    constant: _Run | None = None
    padding: int = 0
    """Number of zero channels at the end of the computed ones."""


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
                elif _is_narrowable(reader, GROUP_NORM, join.output):
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
    image = _align(graph, replace(image, computed=activate(image.computed, "")))
    if run := image.constant:
        image = replace(image, constant=replace(run, value=activate(run.value, ".constant")))
    for convolution in convolutions:
        _narrow(graph, convolution, image)


def _align(graph: ir.Graph, image: _Image) -> _Image:
    """Append zero channels up to a multiple of `ALIGNMENT`."""
    padding = -(image.end - image.begin) % ALIGNMENT
    return replace(image, computed=_pad(graph, image.computed, padding), padding=padding)


def _pad(graph: ir.Graph, value: ir.Value, channels: int) -> ir.Value:
    """Append zeros along the axis of channels."""
    if not channels:
        return value
    return add_node(graph, "Pad", [value, add_integers(graph, 0, channels), None, add_integers(graph, 1)])


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
    image = _Image(join.computed, begin, end)
    if not join.constant.any():
        return image
    first = 0 if begin else end
    value = add_initializer(graph, f"{join.output.name}.constant", join.constant[np.newaxis])
    return replace(image, constant=_Run(first, first + join.constant.size, value))


@dataclass(frozen=True, slots=True)
class _Groups:
    """Layout of a norm's groups over the channels of a concatenation."""

    size: int
    """Channels per group."""
    low: int
    high: int
    """Range of the groups with computed channels."""
    seam: NDArray[np.float32]
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
        split = high - end if join.computed_first else low
        parts = join.constant[:split], join.constant[split:]
        seam, alone = parts if join.computed_first else reversed(parts)
        return cls(size, low, high, seam, alone, high if join.computed_first else 0)

    @property
    def count(self) -> int:
        """Number of groups with computed channels."""
        return (self.high - self.low) // self.size


def _normalise(graph: ir.Graph, norm: ir.Node, join: _Join, *, rank: int) -> _Image:
    """Apply a group norm to a concatenation; `rank` is the number of axes of an image."""
    groups = _Groups.of(norm, join)
    computed = _join_seam(graph, norm, join, groups.seam, rank) if groups.seam.size else join.computed
    parameters = _parameters(graph, norm, groups.low, groups.high)
    narrow = copy_node(graph, norm, [computed, *parameters], num_groups=groups.count)
    image = _Image(narrow, groups.low, groups.high)
    if not groups.alone.size:
        return image
    begin, end = groups.alone_begin, groups.alone_begin + groups.alone.size
    scale, bias = _parameters(graph, norm, begin, end)
    if groups.alone.any():
        normal = add_initializer(graph, f"{norm.outputs[0].name}.alone", _normal(groups.alone, groups.size, norm))
        bias = add_node(graph, "Add", [add_node(graph, "Mul", [normal, scale]), bias])
    return replace(image, constant=_Run(begin, end, add_reshape(graph, bias, 1, -1)))


def _join_seam(graph: ir.Graph, norm: ir.Node, join: _Join, seam: NDArray[np.float32], rank: int) -> ir.Value:
    """Join the computed channels with the constants that share a group with them."""
    value = add_initializer(graph, f"{norm.outputs[0].name}.seam", seam.reshape(1, -1, *[1] * (rank - 2)))
    constants = add_repeated(graph, value, join.computed, axis=1)
    parts = [join.computed, constants] if join.computed_first else [constants, join.computed]
    return add_node(graph, "Concat", parts, {"axis": 1})


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


def _narrow(graph: ir.Graph, convolution: ir.Node, image: _Image) -> None:
    """Replace a convolution with one over the computed channels, plus a term for the constant channels."""
    weight, *bias = (value for value in convolution.inputs[1:] if value is not None)
    inner = _pad(graph, add_slice(graph, weight, image.begin, image.end, axis=1), image.padding)
    run, border = image.constant, any(convolution.attributes.get_ints("pads", ()))
    if run and not border:
        added = add_node(graph, "ReduceSum", [_taps(graph, convolution, run), add_integers(graph, 1)], {"keepdims": 0})
        bias = [add_node(graph, "Add", [*bias, added])] if bias else [added]
    output = partial = copy_node(graph, convolution, [image.computed, inner, *bias])
    partial.name = f"{convolution.outputs[0].name}{PARTIAL}"
    if run and border:
        output = add_node(graph, "Add", [output, _within_border(graph, convolution, image.computed, run)])
    output.name = convolution.outputs[0].name
    convolution.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)


def _taps(graph: ir.Graph, convolution: ir.Node, run: _Run) -> ir.Value:
    """Compute the term for constant channels at each tap of the kernel; [output channel, tap]."""
    outputs, _, *kernel = _sizes(convolution)
    weight = convolution.inputs[1]
    assert weight is not None
    own = add_slice(graph, weight, run.begin, run.end, axis=1)
    by_input = add_node(graph, "Transpose", [own], {"perm": [1, 0, *range(2, 2 + len(kernel))]})
    taps = add_node(graph, "MatMul", [run.value, add_reshape(graph, by_input, run.end - run.begin, -1)])
    return add_reshape(graph, taps, outputs, math.prod(kernel))


def _within_border(graph: ir.Graph, convolution: ir.Node, like: ir.Value, run: _Run) -> ir.Value:
    """Compute the term for constant channels at each position of an image; [1, output channel, ...]."""
    outputs, _, *kernel = _sizes(convolution)
    one = add_initializer(graph, "one", np.ones([1] * (2 + len(kernel)), dtype=np.float32))
    size = add_node(graph, "Shape", [like], {"start": 2})
    ones = add_node(graph, "Expand", [one, add_node(graph, "Concat", [add_integers(graph, 1, 1), size], {"axis": 0})])
    taps = add_reshape(graph, _taps(graph, convolution, run), outputs, 1, *kernel)
    return copy_node(graph, convolution, [ones, taps])
