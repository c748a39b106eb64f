"""The contract between engines and whoever runs them; implemented in `unetc.runtime.backends`.

The analyzer is handed a backend too, so costs and damages are measured by the code that ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

WEIGHTS = "weights.safetensors"
"""What graphs call the file that their external initializers lie in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialisedGraph:
    """An ONNX graph as bytes, with the names of the initializers it expects from the weights file."""

    graph: bytes
    weights: frozenset[str]


class Program(Protocol):
    """One loaded graph."""

    def __call__(self, inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
        """Run the graph and write its first output into `output`, which has the right shape.

        Args:
            inputs: C-contiguous arrays, or tensors that programs of this backend have emitted. What the graph does not
                read is ignored.
            output: Where to write.

        Returns:
            The graph's further outputs by name, as tensors on the device.
        """
        ...


class Loader(Protocol):
    """Loads graphs that read one weights file."""

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph."""
        ...


class Backend(Protocol):
    """Runs graphs on one device."""

    def open_weights(self, weights: bytes) -> Loader:
        """Take a weights file, whole, in the form that loading graphs needs."""
        ...

    def to_array(self, emitted: object) -> Array:
        """Copy what a program has emitted into an array."""
        ...
