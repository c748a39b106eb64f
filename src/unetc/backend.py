"""The contract between engines and whoever runs them; implemented in `unetc.runtime.backends`.

The analyzer is handed a backend too, so costs and damages are measured by the code that ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .device import Array as Array
from .device import Device, Tensor
from .precision import Precision

WEIGHTS = "weights.safetensors"
"""What graphs call the file that their external initializers lie in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialisedGraph:
    """An ONNX graph as bytes, with the names of the initializers it expects from the weights file."""

    graph: bytes
    weights: frozenset[str]
    """Those that are rounded from the file's are called as `unetc.precision` says."""


class Program(Protocol):
    """One loaded graph."""

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run the graph and write its first output into `output`, which has the right shape.

        Args:
            inputs: C-contiguous tensors of the backend's device, or what programs of this backend have emitted. What
                the graph does not read is ignored.
            output: The tensor to write into.

        Returns:
            The graph's further outputs by name, on the device; no later call overwrites them.
        """
        ...


class Loader(Protocol):
    """Loads graphs that read one weights file."""

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph."""
        ...


class Backend(Protocol):
    """Runs graphs on one device."""

    @property
    def device(self) -> Device:
        """Where inputs and outputs of its programs live."""
        ...

    def open_weights(self, weights: bytes) -> Loader:
        """Take a weights file, whole, in the form that loading graphs needs."""
        ...


@runtime_checkable
class LowPrecision(Backend, Protocol):
    """A backend that may compute in less than float32."""

    @property
    def reads(self) -> Precision:
        """Precision of the graphs that it loads: float32 where it lowers them itself, ahead of time."""
        ...

    def exact(self) -> Backend | None:
        """Give the same backend in float32; None if this one is."""
        ...
