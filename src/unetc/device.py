"""Devices: the tensor operations of a sampling loop, so that the loop runs on the same device as the engines.

Tensors of every device support `+`, `-`, `*`, `clip`, slices and `shape`, like numpy arrays and torch tensors. Other
operations go through a `Device`. Between the noise and the last sample, a loop written this way reads only one value
per step from the device: whether the prediction was finite.
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
    """Creates, joins and reads the tensors of one device."""

    def __hash__(self) -> int:
        """Hash the device: values that stay the same in all steps are cached by device."""
        ...

    def put(self, array: NDArray[Any]) -> Tensor:
        """Create a tensor from an array; it may share the array's memory."""
        ...

    def to_array(self, tensor: Tensor) -> Array:
        """Copy a tensor, or an output of a program on this device, into an array."""
        ...

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Create an uninitialised float32 tensor."""
        ...

    def full(self, shape: Sequence[int], value: float) -> Tensor:
        """Create a float32 tensor filled with one value."""
        ...

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join tensors along the batch."""
        ...

    def rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Take rows of a tensor, or of an output of a program on this device; they may share its memory."""
        ...

    @property
    def captures_shapes(self) -> bool:
        """Whether programs prepare for every shape that they meet, so that few shapes are better than many."""
        ...

    def exp(self, tensor: Tensor) -> Tensor:
        """Compute the exponential of every element."""
        ...

    def is_finite(self, tensor: Tensor) -> bool:
        """Check that no element is NaN or infinite; waits until the tensor is computed."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        ...

    def stream(self) -> AbstractContextManager[object]:
        """Run the enclosed work on a separate stream, ordered after earlier work and before later work."""
        ...


class Host:
    """The memory of the process: tensors are numpy arrays, and every call returns with its work done."""

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array itself."""
        return array

    def to_array(self, tensor: Array) -> Array:
        """Copy an array."""
        return tensor.copy()

    def empty(self, shape: Sequence[int]) -> Array:
        """Create an uninitialised float32 array."""
        return np.empty(shape, dtype=np.float32)

    def full(self, shape: Sequence[int], value: float) -> Array:
        """Create a float32 array filled with one value."""
        return np.full(shape, value, dtype=np.float32)

    def concatenate(self, tensors: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Join arrays along the batch."""
        return np.concatenate(tensors)

    def rows(self, tensor: Array, start: int, stop: int) -> Array:
        """Take rows of an array, as a view."""
        return tensor[start:stop]

    @property
    def captures_shapes(self) -> bool:
        """Whether programs prepare for every shape that they meet: here they do not."""
        return False

    def exp(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Compute the exponential of every element."""
        result: NDArray[Any] = np.exp(tensor)
        return result

    def is_finite(self, tensor: Array) -> bool:
        """Check that no element is NaN or infinite."""
        return bool(np.isfinite(tensor).all())

    def synchronize(self) -> None:
        """Do nothing, because no work is ever pending."""

    def stream(self) -> AbstractContextManager[object]:
        """Do nothing, because every call finishes its work at once."""
        return nullcontext()


HOST = Host()
"""The only instance that is needed."""
