"""One input of a denoiser: its name, its shape and its kind of values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetc.errors import ShapeMismatch

from .classes import Classes
from .record import Record, require

SAMPLE = "sample"
"""Name of the first input, [batch, channel, height, width]."""


class CallInput(Record, frozen=True, kw_only=True):
    """One input of a denoiser, besides the timestep."""

    name: str
    axes: tuple[int | str, ...]
    """Sizes after the batch: a number, or the name of a size that a call may choose; equal names are equal sizes."""
    classes: Classes | None = None
    """Classes whose labels the values are; None for real numbers."""
    optional: bool = False
    """Whether a UNet may be called without it, which is the same as zeros."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        require(all(isinstance(size, str) or size > 0 for size in self.axes), "sizes must be positive", got=self)

    def describe(self) -> str:
        """Describe its shape, as in `[batch, tokens, 768]`."""
        return f"[{', '.join(map(str, ('batch', *self.axes)))}]"

    def read(self, value: Any) -> NDArray[Any]:
        """Return a value in the element type that a graph reads: float32, or int64 for labels.

        Raises:
            ShapeMismatch: If labels are not whole numbers of known classes.
        """
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ShapeMismatch(f"{self.name} has elements of type {array.dtype}. Expected numbers.")
        if self.classes is None:
            return array.astype(np.float32, copy=False)
        whole = array.astype(np.int64, copy=False)
        if (whole != array).any() or ((whole < 0) | (whole >= self.classes.count)).any():
            raise ShapeMismatch(
                f"{self.name} are {array.ravel()[:8].tolist()}. Expected whole numbers from 0 to "
                f"{self.classes.count - 1}: the model knows {self.classes.count} classes."
            )
        return whole
