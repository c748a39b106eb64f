"""Arithmetic over the names of sizes, as the shapes of a graph write it: `(height - 1)//2 + 1`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def compute(size: str, known: Mapping[str, int]) -> int:
    """Compute a size.

    Args:
        size: A name, or arithmetic over names and numbers.
        known: Sizes by name.

    Raises:
        ValueError: If it is anything else, or a name is not known.
    """
    try:
        return _compute(ast.parse(size.strip(), mode="eval").body, known)
    except (SyntaxError, KeyError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"cannot compute {size!r}") from error


def _compute(term: ast.expr, known: Mapping[str, int]) -> int:
    match term:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return known[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_compute(operand, known)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_compute(left, known), _compute(right, known))
    raise ValueError(ast.dump(term))
