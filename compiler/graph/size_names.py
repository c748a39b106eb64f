"""Readable names for the dynamic sizes of a graph: `batch`, `height` and `width` instead of `s48`."""

from __future__ import annotations

import re

import onnx_ir as ir


def name_sizes(graph: ir.Graph, sample: str) -> None:
    """Rename the symbols in the shapes of a graph.

    Sizes of inner values are formulas over the sizes of inputs, such as `(height - 1)//2 + 1`.

    Args:
        graph: The graph; its shapes are changed in place.
        sample: Name of the input [batch, channel, height, width].
    """
    names: dict[str, str] = {}
    for value in sorted(graph.inputs, key=lambda value: value.name != sample):
        for axis, size in enumerate(value.shape or ()):
            symbol = None if isinstance(size, int) else size.value
            if symbol is not None and symbol.isidentifier() and symbol not in names:
                names[symbol] = _name(value, axis, sample, {*names.values()})
    for value in {*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)}:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _name(value: ir.Value, axis: int, sample: str, taken: set[str]) -> str:
    """Name an axis. Inputs share `batch`; the sample and the first sequence of tokens get the plain names."""
    if axis == 0:
        return "batch"
    rank = len(value.shape or ())
    plain = {2: "height", 3: "width"}.get(axis, f"axis{axis}") if rank == 4 else "tokens"
    return plain if value.name == sample or plain not in taken else f"{value.name}_{plain}"


def _renamed(size: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(size, int) or size.value is None:
        return size
    return ir.SymbolicDim(re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), size.value))
