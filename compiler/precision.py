"""The precision that an engine computes in."""

from __future__ import annotations

from enum import StrEnum

from unetc.errors import EngineBuildError


class Precision(StrEnum):
    """What most of a graph computes in; `lowering.py` says what stays float32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read a precision.

        Raises:
            EngineBuildError: If there is none of this name.
        """
        try:
            return cls(text)
        except ValueError as error:
            raise EngineBuildError(f"unknown precision {text!r}. Available: {', '.join(cls)}.") from error
