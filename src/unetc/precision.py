"""The precision that an engine computes in, and the weights that it reads then.

A bundle has every weight once, in float32. What a graph in half precision reads is called after the weight that it is
rounded from, so that whoever loads the graph rounds it: `conv.weight.fp16` is `conv.weight` in float16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from enum import StrEnum

from safetensors.numpy import save

from .errors import EngineBuildError

NO_WEIGHTS = hashlib.sha256(save({})).hexdigest()
"""Hash of a weights file that has nothing in it."""


class Precision(StrEnum):
    """What most of a graph computes in; `lowering.py` of the compiler says what stays float32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read a precision, in small letters or large.

        Raises:
            EngineBuildError: If there is none of this name.
        """
        try:
            return cls(text.lower())
        except ValueError as error:
            raise EngineBuildError(f"unknown precision {text!r}. Available: {', '.join(cls)}.") from error

    @classmethod
    def of_target(cls, target: str) -> Precision:
        """Tell what a target computes in: what its name ends with, or float32."""
        last = target.rpartition(":")[2]
        return cls(last) if last in tuple(cls) else cls.FP32

    def over(self, weights_sha256: str) -> Precision:
        """Tell what graphs compute in that read this weights file; one with its own weights, a decoder, in float32."""
        return Precision.FP32 if weights_sha256 == NO_WEIGHTS else self

    def name_of(self, weight: str) -> str:
        """Name a weight that was rounded to this precision."""
        return f"{weight}.{self}"


LARGEST: Mapping[Precision, float] = {Precision.FP16: 65504.0, Precision.BF16: 3.3895313892515355e38}
"""Numbers; what is larger in a weight becomes this one."""


def rounded_from(name: str, known: Container[str]) -> tuple[str, Precision] | None:
    """Tell which known weight another one is rounded from, and to what; None if it is none of these."""
    weight, _, last = name.rpartition(".")
    lower = next((precision for precision in LARGEST if precision == last), None)
    return (weight, lower) if lower is not None and weight in known and name not in known else None
