"""ONNX values during translation: a known tensor, a node of the new graph, or numbers derived from shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

Number = int | float | bool | fx.Node
"""A number, or the node that computes it."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers that depend on the shapes of inputs; a vector or a scalar in ONNX."""

    elements: tuple[Number, ...]
    scalar: bool = False


Value = Tensor | fx.Node | Numbers
"""A known tensor, a node that computes a tensor, or numbers."""


class Unsupported(Exception):
    """An operator is known, but not in this form; caught inside the translation."""


def tensor_of(constant: TensorProto) -> Tensor:
    """Copy a tensor of ONNX; bfloat16 is converted through float32, as numpy does not have it."""
    array = numpy_helper.to_array(constant)
    if constant.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array.copy())


class Builder:
    """Builds the graph; operations on known values are computed at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graph = fx.Graph()
        self._root = nn.Module()
        self._attributes: dict[int, tuple[Tensor, fx.Node]] = {}
        self.ranks: dict[fx.Node, int] = {}
        """Numbers of axes, where they are known."""

    def placeholder(self, name: str) -> fx.Node:
        """Add an input."""
        return self._graph.placeholder(name)

    def rank(self, value: Value) -> int:
        """Count the axes of a value."""
        if isinstance(value, Tensor):
            return value.dim()
        if isinstance(value, fx.Node) and value in self.ranks:
            return self.ranks[value]
        raise Unsupported("an unknown number of axes")

    def emit(self, function: Callable[..., Any] | str, *arguments: Any, **options: Any) -> Any:
        """Call a function, or a method by name: at once if all arguments are known, else when the graph runs."""
        found: list[fx.Node] = []
        map_arg((arguments, options), found.append)
        if not found:
            call = getattr(arguments[0], function) if isinstance(function, str) else function
            return call(*(arguments[1:] if isinstance(function, str) else arguments), **options)
        arguments = tuple(self._attribute(item) for item in arguments)
        options = {name: self._attribute(item) for name, item in options.items()}
        if isinstance(function, str):
            return self._graph.call_method(function, arguments, options)
        return self._graph.call_function(function, arguments, options)

    def finish(self, outputs: Sequence[Value | None]) -> fx.GraphModule:
        """Finish the graph with its outputs."""
        self._graph.output(tuple(self._attribute(self.tensor(value)) for value in outputs))
        self._graph.eliminate_dead_code()
        return fx.GraphModule(self._root, self._graph).eval()

    def _attribute(self, argument: Any) -> Any:
        """Turn known tensors, alone or in a list, into attributes of the module."""
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._attribute(item) for item in argument)
        if not isinstance(argument, Tensor):
            return argument
        if id(argument) not in self._attributes:
            name = f"constant_{len(self._attributes)}"
            self._root.register_buffer(name, _dense(argument))
            self._attributes[id(argument)] = argument, self._graph.get_attr(name)
        return self._attributes[id(argument)][1]

    def tensor(self, value: Value | None) -> Tensor | fx.Node:
        """Turn numbers into a tensor."""
        if value is None:
            raise Unsupported("a missing input")
        if not isinstance(value, Numbers):
            return value
        made: Tensor | fx.Node = self.emit(_stack, value.elements, value.scalar, self.device)
        return made

    def operand(self, value: Value | None) -> Tensor | fx.Node | float:
        """Turn scalars that are known or come from shapes into Python numbers, which cost nothing on a device."""
        if isinstance(value, Tensor) and value.dim() == 0:
            number: float = value.item()
            return number
        if isinstance(value, Numbers) and value.scalar:
            return value.elements[0]
        return self.tensor(value)

    def numbers(self, value: Value | None) -> tuple[Number, ...]:
        """Read the numbers that an operator needs as Python numbers: a shape, the bounds of a slice.

        Raises:
            Unsupported: If they are in an unknown tensor.
        """
        if isinstance(value, Numbers):
            return value.elements
        if isinstance(value, Tensor):
            return tuple(value.flatten().tolist())
        raise Unsupported("numbers that are computed by tensors")

    def known(self, value: Value | None) -> list[Any]:
        """Read numbers that do not depend on shapes.

        Raises:
            Unsupported: If they do.
        """
        elements = self.numbers(value)
        if any(isinstance(element, fx.Node) for element in elements):
            raise Unsupported("numbers that depend on the size")
        return list(elements)


def are_numbers(*values: Value | None) -> bool:
    """Check whether values are numbers, possibly together with known scalars and vectors."""
    return any(isinstance(value, Numbers) for value in values) and all(
        isinstance(value, Numbers) or (isinstance(value, Tensor) and value.dim() <= 1) for value in values
    )


def each(builder: Builder, function: Callable[..., Any], *values: Value | None) -> Numbers:
    """Apply a function to numbers one by one; a single number is repeated."""
    rows = [builder.numbers(value) for value in values]
    count = max(len(row) for row in rows)
    scalar = all(value.scalar if isinstance(value, Numbers) else value.dim() == 0 for value in values)  # type: ignore[union-attr]
    columns = zip(*(row * count if len(row) == 1 else row for row in rows), strict=True)
    return Numbers(tuple(builder.emit(function, *column) for column in columns), scalar)


def size(tensor: Tensor, axis: int) -> int:
    """Read the size of a tensor along an axis."""
    return tensor.shape[axis]


def _dense(tensor: Tensor) -> Tensor:
    """Copy a slice, which kernels would otherwise copy in every call; a transposed matrix needs no copy."""
    is_transposed = tensor.dim() == 2 and tensor.t().is_contiguous()
    return tensor if is_transposed else tensor.contiguous()


def _stack(elements: Sequence[float], scalar: bool, device: torch.device) -> Tensor:
    kinds = {type(element) for element in elements}
    dtype = torch.float32 if float in kinds else torch.bool if kinds == {bool} else torch.int64
    scalars = [torch.full((), element, dtype=dtype, device=device) for element in elements]
    return scalars[0] if scalar else torch.stack(scalars)
