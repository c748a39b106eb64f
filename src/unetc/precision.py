"""Precision of engines, and the names of their weights.

A bundle holds every weight once, in float32. A graph in half precision refers to rounded weights by name:
`conv.weight.fp16` is `conv.weight` rounded to float16. The loader of the graph does the rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from enum import StrEnum

from .errors import EngineBuildError
from .tensors import save_tensors

NO_WEIGHTS = hashlib.sha256(save_tensors({})).hexdigest()
"""Hash of an empty weights file."""


class Precision(StrEnum):
    """Precision of most of a graph; `lowering.py` of the compiler lists the operations that stay in float32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Parse a precision; upper and lower case are equal.

        Raises:
            EngineBuildError: If no precision has this name.
        """
        try:
            return cls(text.lower())
        except ValueError as error:
            raise EngineBuildError(f"unknown precision {text!r}. Available: {', '.join(cls)}.") from error

    @classmethod
    def of_target(cls, target: str) -> Precision:
        """Return the precision of a target: the suffix of its name, or float32."""
        last = target.rpartition(":")[2]
        return cls(last) if last in tuple(cls) else cls.FP32

    def over(self, weights_sha256: str) -> Precision:
        """Return the precision of graphs that read this weights file.

        An empty file belongs to a graph with embedded weights, such as a decoder, which computes in float32.
        """
        return Precision.FP32 if weights_sha256 == NO_WEIGHTS else self

    def name_of(self, weight: str) -> str:
        """Return the name of a weight rounded to this precision."""
        return f"{weight}.{self}"


LARGEST: Mapping[Precision, float] = {Precision.FP16: 65504.0, Precision.BF16: 3.3895313892515355e38}
"""Largest finite number of each precision; larger elements of a weight are clipped to it."""


def rounded_from(name: str, known: Container[str]) -> tuple[str, Precision] | None:
    """Find the known weight behind a rounded one, and the precision.

    Args:
        name: Name of a weight, such as `conv.weight.fp16`.
        known: Names of the weights that exist in float32.

    Returns:
        Such as `conv.weight` and float16; None if the name does not describe a rounded weight.
    """
    weight, _, last = name.rpartition(".")
    lower = next((precision for precision in LARGEST if precision == last), None)
    return (weight, lower) if lower is not None and weight in known and name not in known else None
