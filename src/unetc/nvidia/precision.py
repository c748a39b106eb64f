"""The precision that an engine computes in."""

from __future__ import annotations

import hashlib
from enum import StrEnum

from safetensors.numpy import save

from unetc.errors import EngineBuildError

NO_WEIGHTS = hashlib.sha256(save({})).hexdigest()
"""Hash of a weights file that has nothing in it."""


class Precision(StrEnum):
    """What most of a graph computes in; `lowering.py` of the compiler says what stays float32."""

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

    def over(self, weights_sha256: str) -> Precision:
        """Tell what graphs compute in that read this weights file; one with its own weights, a decoder, in float32."""
        return Precision.FP32 if weights_sha256 == NO_WEIGHTS else self
