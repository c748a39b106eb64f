"""Where tensors live: what a sampling loop needs beside arithmetic, so that it runs where the engines do.

A device's tensors know `+`, `-`, `*`, `clip`, slices and `shape`, as arrays of numpy and tensors of torch do. What they
cannot do alike is here. A loop that is written in these terms takes nothing from the device between the noise and the
last sample but, once a step, whether the prediction was finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

Tensor = Any
"""A tensor of a device."""


class Device(Protocol):
    """Makes, joins and reads tensors of one device."""

    def __hash__(self) -> int:
        """Hash: what is the same in all steps is kept by device."""
        ...

    def put(self, array: NDArray[Any]) -> Tensor:
        """Bring an array to the device; the tensor may share its memory."""
        ...

    def to_array(self, tensor: Tensor) -> Array:
        """Copy a tensor, or what a program of this device has emitted, into an array."""
        ...

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Make a float32 tensor of a shape, to be written."""
        ...

    def full(self, shape: Sequence[int], value: float) -> Tensor:
        """Make a float32 tensor of one value."""
        ...

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join tensors along the batch."""
        ...

    def exp(self, tensor: Tensor) -> Tensor:
        """Take the exponential of every element."""
        ...

    def is_finite(self, tensor: Tensor) -> bool:
        """Tell whether no element is NaN or infinite; waits until the tensor is computed."""
        ...

    def synchronize(self) -> None:
        """Wait until everything that was asked of the device is done."""
        ...

    def stream(self) -> AbstractContextManager[object]:
        """Give what is asked of the device inside a stream of its own, after all before it and before all after it."""
        ...


class Host:
    """The memory of the process: tensors are numpy arrays, and calls return when their work is done."""

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        """Give the array itself."""
        return array

    def to_array(self, tensor: Array) -> Array:
        """Copy an array."""
        return tensor.copy()

    def empty(self, shape: Sequence[int]) -> Array:
        """Make an array to be written."""
        return np.empty(shape, dtype=np.float32)

    def full(self, shape: Sequence[int], value: float) -> Array:
        """Make an array of one value."""
        return np.full(shape, value, dtype=np.float32)

    def concatenate(self, tensors: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Join arrays along the batch."""
        return np.concatenate(tensors)

    def exp(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Take the exponential of every element."""
        result: NDArray[Any] = np.exp(tensor)
        return result

    def is_finite(self, tensor: Array) -> bool:
        """Tell whether no element is NaN or infinite."""
        return bool(np.isfinite(tensor).all())

    def synchronize(self) -> None:
        """Do nothing: nothing is pending."""

    def stream(self) -> AbstractContextManager[object]:
        """Do nothing: everything is done when it is asked for."""
        return nullcontext()


HOST = Host()
